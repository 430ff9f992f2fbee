"""Workers do what they are told, and end with the process that asked."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from support import take_interrupts

from qlora_exp.utils.processes.workers import forks, in_order, result, workers

SLEEP = """
import os, sys, time
from qlora_exp.utils.processes.workers import result, workers
def slow(): time.sleep(60)
if __name__ == "__main__":
    with workers(2, "fork") as pool:
        waiting = [pool.submit(slow) for _ in range(4)]
        print(*pool._processes, flush=True)
        [result(one) for one in waiting]
"""


def test_workers_return_results():
    with workers(3, "forkserver") as pool:
        assert [result(pool.submit(pow, *two)) for two in ((2, 3), (3, 2), (4, 2))] == [8, 9, 16]


def test_results_come_in_order_whoever_is_first():
    def slowly(number: int) -> int:
        time.sleep(0.02 * (number % 3 == 0))
        return -number

    assert [*in_order(slowly, range(20), 3)] == [*in_order(slowly, range(20), 1)] == [-number for number in range(20)]


@pytest.mark.parametrize("processes", [1, 2])
def test_error_comes_after_the_results_of_earlier_items(processes: int):
    def items() -> Iterator[int]:
        yield from (1, 2, 0)
        raise OSError("the source ended")

    found = in_order(lambda number: 1 / number, items(), processes)
    assert [next(found), next(found)] == [1, 0.5]
    with pytest.raises(ZeroDivisionError):  # before that of the source, though that was read ahead
        next(found)
    found = in_order(lambda number: number, items(), processes)
    assert [next(found) for _ in range(3)] == [1, 2, 0]
    with pytest.raises(OSError, match="the source ended"):
        next(found)


def test_daemons_and_small_work_stay_in_one_process():
    assert forks(0) == forks(1) == 1
    with multiprocessing.get_context("fork").Pool(1) as pool:  # its processes are daemons
        assert pool.apply(forks, (8,)) == 1


def test_error_inside_the_block_ends_the_workers():
    with pytest.raises(KeyError), workers(2, "forkserver") as pool:
        for _ in range(3):
            pool.submit(time.sleep, 60)
        raise KeyError
    assert pool._processes is None


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(how, tmp_path):
    (tmp_path / "slow.py").write_text(SLEEP)
    asking = subprocess.Popen(
        [sys.executable, "slow.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=take_interrupts,
    )
    assert asking.stdout is not None
    pids = [int(word) for word in asking.stdout.readline().split()]
    assert len(pids) == min(2, os.cpu_count() or 1)
    asking.send_signal(how)
    asking.wait(10)
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive == []


@pytest.mark.parametrize("before", [0, 1])
def test_objects_that_forks_share_are_not_collected_meanwhile(before: int):
    """The collector writes into each object: without this every fork would have a copy of all."""
    gc.unfreeze()
    if before:
        gc.freeze()  # as a run does once it has imported everything
    try:
        counts = [*in_order(lambda _: gc.get_freeze_count(), range(4), 2)]
        assert min(counts) > 1000
        assert (gc.get_freeze_count() > 0) == bool(before)
    finally:
        gc.unfreeze()
