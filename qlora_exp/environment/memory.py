"""Measure peak memory by phase and source, and set up the host's allocator, which determines a CPU run's memory.

On Linux, the kernel's high-water mark of the process (VmHWM) is reset at each phase. So no peak is missed, as it could
be with sampling. On CUDA, torch's allocator records peaks and the driver reports the memory in use. Values that a
platform does not report are absent, never zero. Sources: proc(5), `clear_refs` and `status`; torch.cuda memory
statistics.
"""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

import psutil

from qlora_exp.utils.units import GIB, MIB

_PROC = Path("/proc/self")


class MemoryMonitor:
    """Monitor of the peak memory in MiB of each phase of a run; phases may be nested and repeated.

    `peaks[phase]` has `rss` (process, imports included), and on CUDA also `allocated`, `reserved` (torch's peaks) and
    `driver` (all processes on the device, read when a phase ends), summed over the devices that the process uses. A
    phase's peak counts only while no inner phase is open. Of several runs in one process, each has its own monitor, and
    the peaks of each are the process's.
    """

    _STEPS: ClassVar = ("first_step", "steady")
    """Phases of training steps."""
    _all: ClassVar[WeakSet["MemoryMonitor"]] = WeakSet()

    def __init__(self, device: str = "cpu") -> None:
        self.peaks: dict[str, dict[str, float]] = {}
        self._cuda = device == "cuda"
        self.phases: list[str] = []
        self.step_peaks: dict[str, float] = {}
        """Peaks of training steps since the last call of `of_steps`."""
        self._all.add(self)
        self.baseline: dict[str, float] = {}
        """MiB used before the model is loaded: by the interpreter, its imports and the rows."""
        self.mark_baseline()

    def mark_baseline(self) -> None:
        """Measure `baseline` again: memory that is used from now on belongs to phases."""
        self._reset()
        self.baseline = self._read()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the memory peak within the context for the phase `name`, except in inner phases."""
        self._switch()
        self.phases.append(name)
        try:
            yield
        finally:
            self._switch()
            self.phases.pop()

    def of_steps(self) -> dict[str, float]:
        """Return the peaks of training steps since the last call, without the driver's; nothing is freed."""
        self._record()
        self._clear()
        peaks, self.step_peaks = self.step_peaks, {}
        return peaks

    def _switch(self) -> None:
        """Record the peak of the innermost phase, and reset the high-water marks."""
        self._reset()

    def _reset(self) -> None:
        """Record the peaks of all phases of this process, free what is unused, and reset the high-water marks."""
        self._record()
        if resettable():
            release_freed_memory()  # memory of an earlier phase must not count for this one
        if self._cuda:
            import torch

            torch.cuda.empty_cache()
        self._clear()

    def _record(self) -> None:
        """Record the peaks since the last reset, for the innermost phase of each monitor of this process."""
        for monitor in (monitor for monitor in self._all if monitor.phases):
            phase = monitor.phases[-1]
            for source, value in self._read().items():
                peaks = monitor.peaks.setdefault(phase, {})
                peaks[source] = max(value, peaks.get(source, 0.0))
                if phase in self._STEPS and source != "driver":  # which has no peak
                    monitor.step_peaks[source] = max(value, monitor.step_peaks.get(source, 0.0))

    def _clear(self) -> None:
        """Reset the high-water marks."""
        if resettable():
            (_PROC / "clear_refs").write_text("5")
        if self._cuda:
            import torch

            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)

    def _read(self) -> dict[str, float]:
        values = {}
        if resettable():
            values["rss"] = _peak_rss() / MIB
        if self._cuda:
            import torch

            used = [index for index in range(torch.cuda.device_count()) if torch.cuda.max_memory_reserved(index)]
            devices = {torch.cuda.current_device(), *used}  # a query to another device would initialize CUDA there
            free_and_total = [torch.cuda.mem_get_info(device) for device in devices]
            values["allocated"] = sum(torch.cuda.max_memory_allocated(device) for device in devices) / MIB
            values["reserved"] = sum(torch.cuda.max_memory_reserved(device) for device in devices) / MIB
            values["driver"] = sum(total - free for free, total in free_and_total) / MIB
        return values

    def summary(self) -> dict[str, float]:
        """Return the metrics: `PHASE/SOURCE_peak_mib`, `baseline/SOURCE_mib`, and `SOURCE_peak_mib` over all phases."""
        metrics = {f"baseline/{source}_mib": value for source, value in self.baseline.items()}
        for phase, sources in self.peaks.items():
            for source, value in sources.items():
                metrics[f"{phase}/{source}_peak_mib"] = value
                key = f"{source}_peak_mib"
                metrics[key] = max(value, metrics.get(key, 0.0))
        return metrics


_CGROUP = tuple(map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")))


_MAPPED = int(2.6 * GIB)
"""Address space that a run takes beyond its tensors and the memory of its libraries: files, stacks, what the allocator
keeps. As measured with torch 2.13 for CPUs, where it was 1.7 to 2.8 GiB (`VmPeak` of runs of the built-in model and a
tiny one).
"""


def limits() -> dict[str, int]:
    """Return limits of this process's memory in bytes that are below the machine's: of `address space`, of its `group`.

    The first is `ulimit -v`. The second is that of the control group of a container or a SLURM job.
    """
    total, found = psutil.virtual_memory().total, {}
    for file in _CGROUP:
        if file.is_file() and (text := file.read_text("ascii").strip()).isdecimal() and int(text) < total:
            found["group"] = int(text)
    if sys.platform != "win32":
        import resource

        if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
            found["address space"] = limit
    return found


def capacity() -> tuple[int, str]:
    """Return the bytes of memory that a run on this CPU can take, its libraries included, and what limits them.

    The second is empty if nothing but the machine's memory does.
    """
    found = {kind: limit - _MAPPED * (kind == "address space") for kind, limit in limits().items()}
    kind = min(found, key=found.__getitem__, default="")
    total = psutil.virtual_memory().total
    by = {"address space": "ulimit -v", "group": "its control group"}
    return (max(0, found[kind]), by[kind]) if kind and found[kind] < total else (total, "")


def free() -> int:
    """Return the bytes that a run in the place of this process can take now, its libraries included."""
    return min(capacity()[0], psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def resettable() -> bool:
    """Return whether this kernel can reset the process's high-water mark (Linux, but not every sandbox)."""
    global _resettable
    if _resettable is None:
        try:
            (_PROC / "clear_refs").write_text("5")
            _resettable = True
        except OSError:
            _resettable = False
    return _resettable


_resettable: bool | None = None


def reuse_freed_memory() -> bool:
    """Make glibc keep freed blocks for the next tensor, instead of returning each to the kernel.

    A training step on a CPU allocates and frees the same large tensors repeatedly. By default, the kernel maps each
    again and fills its pages with zeros again. Larger limits would save even more time, but cost memory by
    fragmentation. `nox -s bench` measures both. Source: mallopt(3).

    Returns:
        Whether the allocator accepted the setting.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    return _set_allocator({m_mmap_threshold: 64 * MIB, m_trim_threshold: 256 * MIB})


def share_freed_memory() -> bool:
    """Make glibc keep the freed blocks of all threads in one place, where the next thread takes them.

    By default each thread has an arena of its own, and keeps there what its training step has freed. Threads that
    began before keep theirs. Source: mallopt(3), M_ARENA_MAX.

    Returns:
        Whether the allocator accepted the setting.
    """
    m_arena_max = -8
    return _set_allocator({m_arena_max: 1})


def _set_allocator(settings: Mapping[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return all(mallopt(*setting) for setting in settings.items())


def release_freed_memory() -> None:
    """Return freed blocks to the kernel now, if the allocator can do so. Source: malloc_trim(3)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: other allocators are not set up here to keep blocks
        return


def _peak_rss() -> int:
    """Return the process's resident high-water mark in bytes, since it was last reset."""
    for line in (_PROC / "status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")
