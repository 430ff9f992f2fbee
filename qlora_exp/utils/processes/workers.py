"""Run work in several processes, on all cores. The processes end when the main process does."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

MOST_WORKERS = 8


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
