"""Run work in several processes, on all cores. The processes end when the main process does."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_WORKERS = 8
ORPHAN_SECONDS = 10.0
"""Seconds that a process gets to record its end after its parent was killed."""


_function: Callable[[Any], Any]  # of `in_order`; workers get it by being forked, as closures cannot be pickled


def forks(pieces: int, shared_by: int = 1) -> int:
    """Return in how many processes to work on so many pieces; 1: in this one.

    Daemons can have no children. On macOS its own libraries forbid forks.

    Args:
        pieces: number of pieces of work that are large enough for a process each.
        shared_by: number of processes of this machine that do the same at the same time.
    """
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return max(1, min(pieces, len(os.sched_getaffinity(0)) // shared_by, MOST_WORKERS))


def in_order(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """Yield the result of each item, in their order, computed by so many forks of this process; 1: by this one.

    Only a few items are taken ahead. The forks must not use a GPU. An error is raised after the results of all earlier
    items; also an error of `items`.

    Args:
        function: any function; what it returns and raises is pickled.
        items: its arguments, which are pickled.
        processes: number of processes (`forks`).

    Raises:
        BrokenProcessPool: a process was killed, such as for its memory.
    """
    if processes < 2:
        yield from map(function, items)
        return
    global _function
    _function = function
    taken, failed = iter(items), None
    pending: deque[Future[Result]] = deque()
    with _uncollected(), workers(processes, "fork") as pool:
        while failed is None:
            try:
                pending.append(pool.submit(_call, next(taken)))
            except StopIteration:
                break
            except Exception as error:
                failed = error
            if len(pending) > 2 * processes:
                yield result(pending.popleft())
        while pending:
            yield result(pending.popleft())
    if failed is not None:
        raise failed


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector from the objects that forks share with this process.

    It writes into each object that it looks at, so that each process would have its own copy. Source: gc.freeze.
    """
    is_frozen = gc.get_freeze_count() > 0
    if is_frozen:
        gc.collect()  # what is frozen is never collected again, if this process was frozen before
    gc.freeze()
    try:
        yield
    finally:
        if not is_frozen:
            gc.unfreeze()


def _call(item: Any) -> Any:
    return _function(item)


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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has its parent's handlers
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
