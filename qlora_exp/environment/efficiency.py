"""What a training makes of its device: arithmetic done, what the device could do, energy.

Knows nothing of runs. What a machine does not tell is absent, never zero.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.flop_counter import flop_registry

from qlora_exp.environment.device import nvml_handles
from qlora_exp.libraries.torch import FUSED_ATTENTION, TorchDispatchMode
from qlora_exp.utils.units import MIB

log = logging.getLogger(__name__)
_POWERCAP = Path("/sys/class/powercap")


def _product(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _sum_and_product(_added: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return _product(a, b)


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(_gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    # The scores anew; then the gradients of what they weigh, of themselves, of queries and of keys.
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])


def _product_4bit(a: Any, _packed: Any, shape: Any, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * shape[0]


def _product_8bit(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[0]


_FORMULAS: dict[str, Callable[..., int]] = {
    # What torch's own registry leaves out, and what it does not know all forms of: a product in another dtype than
    # its factors (TRL's loss on a GPU; torch 2.13), grouped heads (before torch 2.13).
    "aten.mm": _product,
    "aten.bmm": _product,
    "aten.addmm": _sum_and_product,
    "aten.baddbmm": _sum_and_product,
    **{
        f"{kernel}{end}": formula
        for kernel in FUSED_ATTENTION
        for end, formula in (("", _attention), ("_backward", _attention_backward))
    },
    "bitsandbytes.gemm_4bit": _product_4bit,
    "bitsandbytes.int8_linear_matmul": _product_8bit,
    "bitsandbytes.int8_scaled_mm": _product_8bit,
    "bitsandbytes.int8_mixed_scaled_mm": lambda a, _ca, cb, *_, **__: _product_8bit(a, cb),
}


class FlopCounter(TorchDispatchMode):
    """Counts floating-point operations of matrix products and attention done inside, a multiply-add as two.

    Recomputation under gradient checkpointing counts: it is done. Element-wise work does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: float = 0
        """NaN once something was done of which torch cannot say how much it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        try:
            self.flops += flops_of(func, args, kwargs, out)
        except (AssertionError, TypeError, ValueError) as error:  # no reason to end a training
            if not math.isnan(self.flops):
                log.warning("arithmetic is not counted: torch's formula for %s says: %s", func, error)
            self.flops = math.nan
        return out


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of one of torch's operations, if it is a matrix product or attention; else 0."""
    packet = func.overloadpacket
    if formula := _FORMULAS.get(str(packet)):
        return formula(*args, **kwargs)
    if formula := flop_registry.get(packet):
        return int(formula(*args, **kwargs, out_val=out))
    return 0


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s that a large matrix product reaches now, on this device, in this dtype, with these threads.

    Takes some 0.1 s; on a GPU 100 MB while it runs. Vendors' peaks are higher, and no program reaches them.
    """
    n = 4096 if device == "cuda" else 1024
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        float((a @ b)[0, 0])  # waits for a GPU
        best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best


class EnergyMeter:
    """Joules used by processor packages (RAPL, where it may be read) and NVIDIA GPUs (NVML) between start and end.

    The whole machine's, so of a run only where nothing else runs. Sources: the kernel's power capping framework,
    `energy_uj` and `max_energy_range_uj`; NVML's `nvmlDeviceGetTotalEnergyConsumption` (mJ; Volta and later).
    """

    def __init__(self, powercap: Path = _POWERCAP) -> None:
        self._packages = [zone for zone in sorted(powercap.glob("*-rapl:*")) if zone.name.count(":") == 1]
        self.joules: float | None = None
        """None where the machine does not tell."""

    def __enter__(self) -> Self:
        self._start = self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = self._read()
        if self._start and end.keys() == self._start.keys():
            used = [now - then for (then, _), (now, _) in zip(self._start.values(), end.values(), strict=True)]
            ranges = [whole for _, whole in end.values()]
            self.joules = sum(value % whole if whole else value for value, whole in zip(used, ranges, strict=True))

    def _read(self) -> dict[str, tuple[float, float]]:
        """Joules so far of each counter, and after how many it starts again (0: never)."""
        found = {}
        for zone in self._packages:
            try:
                counts = [float((zone / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj")]
            except OSError:  # root's alone on most machines
                continue
            found[zone.name] = (counts[0], counts[1])
        return found | _gpu_joules()


def _gpu_joules() -> dict[str, tuple[float, float]]:
    import pynvml

    try:
        return {
            f"gpu{index}": (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)
            for index, handle in enumerate(nvml_handles())
        }
    except pynvml.NVMLError:  # a GPU that does not count
        return {}


def of_training(
    metrics: Mapping[str, float], peaks: Mapping[str, Mapping[str, float]], peak: float, joules: float | None
) -> dict[str, float]:
    """Rates set against what they took.

    Args:
        metrics: `tokens_per_second` and `flops_per_second`, as far as they are known.
        peaks: MiB by memory phase and source.
        peak: what `peak_flops` found.
        joules: used by the whole training; None: not known.

    Returns:
        `mfu`: the share of `peak` that the counted arithmetic took, recomputation included. `tokens_per_gb_second`:
        over the peak of steady steps, on a GPU of what torch allocated there, else of the process (imports included).
        `energy_joules`.
    """
    found = {"peak_flops_per_second": peak}
    if "flops_per_second" in metrics:
        found["mfu"] = metrics["flops_per_second"] / peak
    steady = peaks.get("steady", {})
    if "tokens_per_second" in metrics and (held := steady.get("allocated", steady.get("rss"))):
        found["tokens_per_gb_second"] = metrics["tokens_per_second"] / (held * MIB / 1e9)
    if joules is not None:
        found["energy_joules"] = joules
    return found
