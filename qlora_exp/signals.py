"""What the signals of a scheduler or of `kill` mean here: the run ends as with Ctrl-C, or as one out of time."""

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qlora_exp.errors import TimeLimitError

OUT_OF_TIME = signal.SIGUSR1
GRACE_SECONDS = 30.0
"""What a process gets to write down how it ended, before it is killed."""


@contextmanager
def heeded() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside, `OUT_OF_TIME` TimeLimitError; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeLimitError("the time limit of the job is over")

    before = {number: signal.signal(number, act) for number, act in ((signal.SIGTERM, interrupt), (OUT_OF_TIME, stop))}
    try:
        yield
    finally:
        for number, act in before.items():
            signal.signal(number, act)


@contextmanager
def time_limit(seconds: float | None, note: Path) -> Iterator[None]:
    """After `seconds` inside, this process gets `OUT_OF_TIME`; if it is still inside `GRACE_SECONDS` later, it ends.

    Then with the tracebacks of all threads on stderr, and however it hangs: that needs no lock of Python's. The file
    `note` says to others that the time was over.
    """
    note.unlink(missing_ok=True)
    if seconds is None:
        yield
        return

    def tell() -> None:
        note.touch()
        os.kill(os.getpid(), OUT_OF_TIME)

    timer = threading.Timer(seconds, tell)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()
