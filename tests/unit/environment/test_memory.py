import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from qlora_exp.environment import memory
from qlora_exp.environment.memory import MemoryMonitor, resettable, reuse_freed_memory
from qlora_exp.utils.units import MIB

linux = pytest.mark.skipif(not resettable(), reason="this kernel cannot reset the high-water mark")


def take(mebibytes: int) -> None:
    """Use memory for a moment only, as a training step does; sampling would miss it."""
    bytearray(mebibytes * MIB)


@linux
def test_short_peak_is_measured():
    monitor = MemoryMonitor()
    with monitor.phase("step"):
        take(300)
    assert 290 < monitor.peaks["step"]["rss"] - monitor.baseline["rss"] < 400


@linux
def test_peak_belongs_to_its_phase_only():
    monitor = MemoryMonitor()
    with monitor.phase("large"):
        take(300)
    with monitor.phase("small"):
        take(20)
    assert monitor.peaks["large"]["rss"] - monitor.peaks["small"]["rss"] > 200


@linux
def test_inner_phase_does_not_count_for_the_outer_phase():
    monitor = MemoryMonitor()
    with monitor.phase("outer"):
        take(50)
        with monitor.phase("inner"):
            take(300)
        take(10)
    assert monitor.peaks["inner"]["rss"] - monitor.peaks["outer"]["rss"] > 150


@linux
def test_repeated_phase_keeps_its_largest_peak():
    monitor = MemoryMonitor()
    for size in (300, 10):
        with monitor.phase("step"):
            take(size)
    assert monitor.peaks["step"]["rss"] - monitor.baseline["rss"] > 250


@linux
def test_peaks_survive_an_exception():
    monitor = MemoryMonitor()
    with pytest.raises(ValueError, match="boom"), monitor.phase("step"):
        take(200)
        raise ValueError("boom")
    assert monitor.peaks["step"]["rss"] > monitor.baseline["rss"] + 150


def test_unmeasurable_peak_is_absent(monkeypatch):
    monkeypatch.setattr(memory, "_resettable", False)
    monitor = MemoryMonitor()
    with monitor.phase("step"):
        take(10)
    assert monitor.summary() == {}


class FakeCuda:
    """torch.cuda's memory statistics, with a peak that a reset clears."""

    def __init__(self) -> None:
        self.peak = 0

    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return 0

    def empty_cache(self) -> None:
        pass

    def reset_peak_memory_stats(self, device: int) -> None:
        self.peak = 0

    def max_memory_allocated(self, device: int) -> int:
        return self.peak if device == 0 else 0

    def max_memory_reserved(self, device: int) -> int:
        return 2 * self.peak if device == 0 else 0

    def mem_get_info(self, device: int) -> tuple[int, int]:
        assert device == 0, "CUDA was begun on a GPU that the run does not use"
        return 100 * MIB, 400 * MIB


def test_cuda_reports_allocated_reserved_and_driver(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr("torch.cuda", cuda)
    monitor = MemoryMonitor("cuda")
    with monitor.phase("step"):
        cuda.peak = 50 * MIB
    with monitor.phase("save"):
        cuda.peak = 10 * MIB
    found = monitor.summary()
    assert (found["step/allocated_peak_mib"], found["step/reserved_peak_mib"]) == (50, 100)
    assert (found["save/allocated_peak_mib"], found["allocated_peak_mib"]) == (10, 50)
    assert found["step/driver_peak_mib"] == 300


def test_each_call_has_the_peaks_of_its_own_steps(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr("torch.cuda", cuda)
    monitor = MemoryMonitor("cuda")

    def peaks(phase: str, mebibytes: int) -> float | None:
        with monitor.phase(phase):
            cuda.peak = mebibytes * MIB
        return monitor.of_steps().get("allocated")

    with monitor.phase("load"):
        cuda.peak = 90 * MIB
    assert [peaks("first_step", 50), peaks("steady", 20), peaks("evaluation", 80), peaks("steady", 30)] == [
        50, 20, None, 30
    ]  # fmt: skip
    with monitor.phase("steady"):
        cuda.peak = 70 * MIB
        assert monitor.of_steps()["reserved"] == 140
        cuda.peak = 40 * MIB
        peaks_now = monitor.of_steps()
        assert (peaks_now["allocated"], peaks_now["reserved"], "driver" in peaks_now) == (40, 80, False)
    assert monitor.peaks["steady"]["allocated"] == 70


@linux
def test_peak_of_a_step_does_not_count_for_the_next():
    monitor = MemoryMonitor()
    peaks = []
    with monitor.phase("steady"):
        for size in (300, 10):
            take(size)
            peaks.append(monitor.of_steps()["rss"])
    assert peaks[0] - peaks[1] > 200
    assert monitor.peaks["steady"]["rss"] == peaks[0]


@pytest.mark.skipif(not reuse_freed_memory(), reason="not glibc")
def test_allocator_setting_is_accepted_and_memory_is_released():
    assert reuse_freed_memory()
    memory.release_freed_memory()


THREADS = """
import sys, threading
import numpy as np
from qlora_exp.environment.memory import reuse_freed_memory, share_freed_memory
reuse_freed_memory()
if sys.argv[1] == "shared":
    assert share_freed_memory()
ends = threading.Event()

def step(done):
    blocks = [np.ones(3 * 2**20) for _ in range(4)]  # 24 MiB each
    del blocks
    done.set()
    ends.wait()

for _ in range(6):
    done = threading.Event()
    threading.Thread(target=step, args=(done,)).start()
    done.wait()
print([int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmRSS")][0])
ends.set()
"""


@linux
def test_threads_take_the_memory_that_others_have_freed():
    taken = {
        kind: int(
            subprocess.run([sys.executable, "-c", THREADS, kind], capture_output=True, text=True, check=True).stdout
        )
        for kind in ("own", "shared")
    }
    assert taken["own"] > taken["shared"] + 150  # of 6 times 96 MiB


@pytest.mark.parametrize(
    ("group", "space", "left", "by"),
    [(None, None, None, ""), (4, None, 4, "its control group"), (4, 5, 2.4, "ulimit -v"), (9, 1, 0, "ulimit -v")],
)
def test_memory_of_a_run_is_what_the_machine_and_its_limits_leave(group, space, left, by, monkeypatch, tmp_path):
    limits = {"group": group, "address space": space}
    monkeypatch.setattr(memory, "limits", lambda: {name: gib * 2**30 for name, gib in limits.items() if gib})
    found, limited = memory.capacity()
    assert limited == by
    assert found / 2**30 == pytest.approx(psutil.virtual_memory().total / 2**30 if left is None else left, abs=0.01)
    assert memory.free() <= found
    monkeypatch.setattr(memory, "limits", lambda: {"group": 1, "address space": 1})
    assert memory.free() == 0


def test_free_memory_is_what_others_leave_and_this_process_has(monkeypatch):
    machine, own = SimpleNamespace(total=16 * 2**30, available=3 * 2**30), SimpleNamespace(rss=2**30)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(memory.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: own))
    for group, gib in ((None, 4), (8, 4), (2, 2)):
        monkeypatch.setattr(memory, "limits", lambda group=group: {"group": group * 2**30} if group else {})
        assert memory.free() == gib * 2**30
