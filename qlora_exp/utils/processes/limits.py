"""Run functions on what a stranger wrote in a process of its own, with limits of time and memory.

A chat template or a regular expression can run for ever or fill the memory, inside a single call that nothing in the
same process can interrupt. So such calls are made in a fork of this process: it has everything imported, it starts in
milliseconds, and it can be killed.
"""

import gc
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from pickle import PicklingError
from typing import Any, NoReturn

from qlora_exp.utils.errors import first_line
from qlora_exp.utils.units import MIB


class FailedError(Exception):
    """A function raised an error in its process; the text is the first line of that error's."""


class LimitError(Exception):
    """A function needed more time or memory than it may use; the text says which."""


class LimitedProcess:
    """A process that calls functions for this one, each with the same limits. It starts with the first call.

    After an exceeded limit the next call starts another process. The functions must not use a GPU or several threads.
    """

    def __init__(self, seconds: int = 10, mib: int = 1024) -> None:
        """Set the limits: `seconds` for each call, and `mib` of memory in addition to what this process has."""
        self._seconds, self._mib = seconds, mib
        self._pipe: Connection | None = None
        self._owner = self._child = 0
        self._lock = threading.Lock()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `function` returns; function, arguments and result are pickled.

        Raises:
            FailedError: the function raised an error.
            LimitError: it exceeded a limit, or its process ended.
        """
        with self._lock:
            if self._pipe is None or self._owner != os.getpid():  # another process may have inherited this object
                self._start()
            assert self._pipe is not None
            try:
                self._pipe.send((function, arguments))
                succeeded, value = self._pipe.recv()
            except (EOFError, ConnectionError) as error:
                in_time = self._stop() != -signal.SIGALRM
                limit = f"{self._mib} MiB of memory" if in_time else f"{self._seconds} seconds"
                raise LimitError(f"more than {limit}") from error
            except BaseException:  # also Ctrl-C: the answer of this call must not become that of the next one
                self._stop()
                raise
        if not succeeded:
            raise value
        return value

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._pipe is not None and self._owner == os.getpid():
                self._stop()

    def _start(self) -> None:
        own, its = Pipe()
        sys.stdout.flush()
        if not (child := os.fork()):
            try:
                _serve(its, self._seconds, self._mib * MIB)
            finally:  # a fork must never continue in its parent's code
                os._exit(1)
        its.close()
        self._pipe, self._child, self._owner = own, child, os.getpid()

    def _stop(self) -> int:
        """Kill the process; return its exit code, or minus the signal that had ended it before."""
        assert self._pipe is not None
        self._pipe.close()
        self._pipe = None
        os.kill(self._child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])


def call_limited(function: Callable[..., Any], *arguments: Any, seconds: int, mib: int = 1024) -> Any:
    """Call a function once in a `LimitedProcess`, and end that process."""
    process = LimitedProcess(seconds, mib)
    try:
        return process.call(function, *arguments)
    finally:
        process.close()


def _serve(pipe: Connection, seconds: int, memory: int) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; this process ends when its pipe does
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    os.closerange(3, pipe.fileno())  # the locks and sockets of the parent must not live as long as this process
    os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = used + memory if hard == resource.RLIM_INFINITY else min(used + memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.freeze()
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        signal.alarm(seconds)  # the kernel ends this process then, whatever it does
        try:
            reply = True, function(*arguments)
        except MemoryError:
            reply = False, LimitError(f"more than {memory // MIB} MiB of memory")
        except BaseException as error:  # also the panics of Rust libraries
            reply = False, FailedError(first_line(error))
        signal.alarm(0)
        try:
            pipe.send(reply)
        except (TypeError, AttributeError, PicklingError) as error:  # nothing was sent yet
            pipe.send((False, FailedError(first_line(error))))
