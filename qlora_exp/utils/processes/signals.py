"""Turn signals of a scheduler or of `kill` into exceptions: a run ends as with Ctrl-C, or as at its time limit."""

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from qlora_exp.utils.errors import TimeLimitError

OUT_OF_TIME = signal.SIGUSR1
"""Signal that means: the time limit is over."""
GRACE_SECONDS = 30.0
"""Time that a process has to record how it ended, before it is killed."""


@dataclass
class _Deferred:
    """The first signal's exception inside `defer_signals`, and how many such blocks are open."""

    depth: int = 0
    first: BaseException | None = None


_deferred = _Deferred()


@dataclass
class _Ending:
    """What ends this process, and whether it waits until a checkpoint is saved."""

    waits: bool = False
    call: Callable[[], object] | None = None


_ending = _Ending()


@contextmanager
def handle_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and Ctrl-C inside, and TimeLimitError on `OUT_OF_TIME`.

    SIGTERM, with which schedulers announce the end, waits for a checkpoint (`checkpoint_first`); a second one does not.
    Does nothing outside the main thread. Leaves Ctrl-C alone if another handler is installed for it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupted(_signal: int, _frame: FrameType | None) -> None:
        interrupt()

    def terminated(_signal: int, _frame: FrameType | None) -> None:
        end(interrupt)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        _raise_or_defer(TimeLimitError("the time limit of the job is over"))

    handlers = {signal.SIGTERM: terminated, OUT_OF_TIME: stop}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = interrupted
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ignore_signals() -> Iterator[None]:
    """Ignore SIGTERM and `OUT_OF_TIME` inside, while the end of a run is recorded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, OUT_OF_TIME)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_or_defer(error: BaseException) -> None:
    if _deferred.depth and _deferred.first is None:
        _deferred.first = error
    else:
        raise error


@contextmanager
def defer_signals() -> Iterator[None]:
    """Defer the exception of a first signal inside until the end of the block; raise that of a second signal at once.

    For work that must not be interrupted halfway: an interrupted transaction of MLflow's SQL store leaves its database
    locked as long as the exception lives, so that not even the end of the run could be recorded.
    """
    _deferred.depth += 1
    try:
        yield
    finally:
        _deferred.depth -= 1
        if not _deferred.depth and (first := _deferred.first):
            _deferred.first = None
            raise first


def end(call: Callable[[], object]) -> None:
    """Call what ends this process: at once, or after `checkpoint_first`, if the process is inside."""
    if _ending.waits and _ending.call is None:
        _ending.call = call
    else:
        call()


def interrupt() -> None:
    """Raise KeyboardInterrupt, or defer it as a signal's."""
    _raise_or_defer(KeyboardInterrupt())


def is_ending() -> bool:
    """Return whether something waits to end this process until a checkpoint is saved."""
    return _ending.call is not None


@contextmanager
def checkpoint_first() -> Iterator[None]:
    """Let `end` wait until the end of the block, which saves a checkpoint and stops once `is_ending`."""
    _ending.waits = True
    try:
        yield
        _ending.waits = False
        if _ending.call is not None:
            _ending.call()
    finally:
        _ending.waits, _ending.call = False, None


@contextmanager
def time_limit(seconds: float | None, note: Path) -> Iterator[None]:
    """Send this process `OUT_OF_TIME` after `seconds` inside, and kill it if it is still inside `GRACE_SECONDS` later.

    The kill prints the tracebacks of all threads on stderr. It needs no lock of Python's, so it also ends a process
    that hangs.

    Args:
        seconds: time limit in seconds; None: no limit.
        note: file that is created at the time limit, for other processes to see.
    """
    note.unlink(missing_ok=True)
    if seconds is None:
        yield
        return

    def send_signal() -> None:
        note.touch()
        os.kill(os.getpid(), OUT_OF_TIME)

    timer = threading.Timer(seconds, send_signal)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()
