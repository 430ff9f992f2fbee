"""Work in processes beside this one, on all cores, that end when it does. Knows nothing of what is worked out."""

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
    """A pool of at most `most` processes; an error or Ctrl-C inside ends them at once.

    Args:
        most: as there are things to do.
        start: how they are started: fork, forkserver, spawn.
    """
    count = max(1, min(most, os.cpu_count() or 1, MOST_WORKERS))
    context = multiprocessing.get_context(start)
    pool = ProcessPoolExecutor(count, context, _follow)
    try:
        yield pool
    except BaseException:  # Ctrl-C too: nobody waits any more for what they work on
        for process in [*(pool._processes or {}).values()]:  # Python has no public way before 3.14
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def result(future: Future[Any]) -> Any:
    """What came of a job. Ctrl-C is heeded within half a second, even one that comes just as the waiting begins."""
    while not future.done():
        futures.wait([future], 0.5)
    return future.result()


def _follow() -> None:
    """In a worker: Ctrl-C is for the parent to heed, and nobody works on for one that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
