"""Workers do what they are told, and end with the process that asked."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from support import take_interrupts

from qlora_exp.utils.processes.workers import result, workers

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
