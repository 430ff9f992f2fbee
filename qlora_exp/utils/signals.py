"""What the signals of a scheduler or of `kill` mean here: the run ends as with Ctrl-C, or as one out of time."""

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from qlora_exp.utils.errors import TimeLimitError

OUT_OF_TIME = signal.SIGUSR1
GRACE_SECONDS = 30.0
"""What a process gets to write down how it ended, before it is killed."""


@dataclass
class _Held:
    depth: int = 0
    first: BaseException | None = None


_held = _Held()


@contextmanager
def heeded() -> Iterator[None]:
    """SIGTERM and Ctrl-C raise KeyboardInterrupt inside, `OUT_OF_TIME` TimeLimitError.

    Does nothing outside the main thread, and leaves Ctrl-C alone where somebody else sees to it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        _come(KeyboardInterrupt())

    def stop(_signal: int, _frame: FrameType | None) -> None:
        _come(TimeLimitError("the time limit of the job is over"))

    acts = {signal.SIGTERM: interrupt, OUT_OF_TIME: stop}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        acts[signal.SIGINT] = interrupt
    before = {number: signal.signal(number, act) for number, act in acts.items()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _come(error: BaseException) -> None:
    if _held.depth and _held.first is None:
        _held.first = error
    else:
        raise error


@contextmanager
def held() -> Iterator[None]:
    """What is heeded and comes inside is raised at the end; a second one at once.

    For work that must not be torn: an interrupted transaction of MLflow's SQL store leaves its database locked for as
    long as the exception lives, and so could not even record how the run ended.
    """
    _held.depth += 1
    try:
        yield
    finally:
        _held.depth -= 1
        if not _held.depth and (first := _held.first):
            _held.first = None
            raise first


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
