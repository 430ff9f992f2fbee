"""Run work in several processes, on all cores. The processes end when the main process does."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

MOST_WORKERS = 8
ORPHAN_SECONDS = 10.0
"""Seconds that a process gets to record its end after its parent was killed."""


@contextmanager
def workers(most: int, start: str) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of at most `most` processes. An error or Ctrl-C inside ends them at once.

    Args:
        most: largest number of processes, such as the number of tasks; also limited by cores and `MOST_WORKERS`.
        start: how processes start: fork, forkserver or spawn.
    """
    count = max(1, min(most, os.cpu_count() or 1, MOST_WORKERS))
    context = multiprocessing.get_context(start)
    pool = ProcessPoolExecutor(count, context, _follow_parent)
    try:
        yield pool
    except BaseException:  # Ctrl-C too: nobody waits for the results any more
        for process in [*(pool._processes or {}).values()]:  # Python has no public method for this before 3.14
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def result(future: Future[Any]) -> Any:
    """Wait for a task and return its result. Ctrl-C takes effect within half a second.

    It waits in short intervals, so that this also holds for a Ctrl-C that comes just as the waiting begins.
    """
    while not future.done():
        futures.wait([future], 0.5)
    return future.result()


def _follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent process, and end when the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def end_with_parent() -> None:
    """End this process when its parent ends, even if that was killed: otherwise its work could be done twice."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def write_into(output: Path) -> None:
    """Redirect the output of this process, and of processes it starts, to the end of the file `output`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
