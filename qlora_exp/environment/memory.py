"""Peak memory by phase and by source, and the host's allocator, which decides what a CPU run's memory is.

On Linux the kernel's high-water mark of the process (VmHWM) is reset at each phase, so that no peak is missed, as
sampling would; on CUDA torch's allocator keeps peaks and the driver says what is taken. What a platform
does not tell is absent, never zero. Sources: proc(5), `clear_refs` and `status`; torch.cuda memory statistics.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_exp.utils.units import MIB

_PROC = Path("/proc/self")


class MemoryMonitor:
    """Peaks in MiB for each phase of a run; phases may nest, and may come again.

    `peaks[phase]` holds `rss` (process, imports included), on CUDA also `allocated`, `reserved` (torch's peaks) and
    `driver` (all processes on the device, read when a phase ends), summed over the devices that the process uses. A
    phase's peak is what was reached while it was the innermost.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.peaks: dict[str, dict[str, float]] = {}
        self._cuda = device == "cuda"
        self._open: list[str] = []
        self.baseline: dict[str, float] = {}
        """MiB before the model is loaded: the interpreter, its imports, the rows."""
        self.mark_baseline()

    def mark_baseline(self) -> None:
        """Measure `baseline` again: what is in memory from here on counts for phases."""
        self._reset()
        self.baseline = self._read()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside counts for `name`, until an inner phase begins."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        """Close the books of the innermost phase and start a new high-water mark."""
        if self._open:
            peaks = self.peaks.setdefault(self._open[-1], {})
            for source, value in self._read().items():
                peaks[source] = max(value, peaks.get(source, 0.0))
        self._reset()

    def _reset(self) -> None:
        if resettable():
            release_freed_memory()  # what an earlier phase needed is not this one's
            (_PROC / "clear_refs").write_text("5")
        if self._cuda:
            import torch

            torch.cuda.empty_cache()
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)

    def _read(self) -> dict[str, float]:
        values = {}
        if resettable():
            values["rss"] = _peak_rss() / MIB
        if self._cuda:
            import torch

            used = [one for one in range(torch.cuda.device_count()) if torch.cuda.max_memory_reserved(one)]
            devices = {torch.cuda.current_device(), *used}  # asking the driver of another would begin CUDA there
            free_and_total = [torch.cuda.mem_get_info(device) for device in devices]
            values["allocated"] = sum(torch.cuda.max_memory_allocated(device) for device in devices) / MIB
            values["reserved"] = sum(torch.cuda.max_memory_reserved(device) for device in devices) / MIB
            values["driver"] = sum(total - free for free, total in free_and_total) / MIB
        return values

    def summary(self) -> dict[str, float]:
        """`PHASE/SOURCE_peak_mib` for every peak, the baseline, and the peaks over all phases."""
        found = {f"baseline/{source}_mib": value for source, value in self.baseline.items()}
        for phase, sources in self.peaks.items():
            for source, value in sources.items():
                found[f"{phase}/{source}_peak_mib"] = value
                key = f"{source}_peak_mib"
                found[key] = max(value, found.get(key, 0.0))
        return found


def resettable() -> bool:
    """Whether this kernel can reset the process's high-water mark (Linux, not in every sandbox)."""
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
    """Make glibc keep freed blocks for the next tensor, instead of returning each to the kernel; whether it did.

    A training step on a CPU allocates and frees the same large tensors over and over; by default each is mapped anew
    and its pages are zeroed anew. Larger limits save more time still, and cost memory by fragmentation.
    `nox -s bench` shows both. Source: mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3
    return bool(mallopt(m_mmap_threshold, 64 * MIB) and mallopt(m_trim_threshold, 256 * MIB))


def release_freed_memory() -> None:
    """Return freed blocks to the kernel now, where the allocator can. Source: malloc_trim(3)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: nothing is kept back there
        return


def _peak_rss() -> int:
    """Bytes of the process's resident high-water mark since it was last reset."""
    for line in (_PROC / "status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")
