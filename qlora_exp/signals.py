"""What the signals of a scheduler or of `kill` mean here: the run ends as with Ctrl-C, or as one out of time."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_exp.errors import TimeLimitError

OUT_OF_TIME = signal.SIGUSR1


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
