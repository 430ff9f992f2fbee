"""Measure how well training uses its device: floating-point operations, peak speed of the device, energy.

Does not depend on runs. Values that a machine does not report are absent, never zero.
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
from qlora_exp.environment.products import fast_products
from qlora_exp.libraries.torch import FUSED_ATTENTION, TorchDispatchMode
from qlora_exp.utils.units import MIB

log = logging.getLogger(__name__)
_POWERCAP = Path("/sys/class/powercap")
PEAK_SECONDS = 0.1
"""How long `peak_flops` measures, roughly."""


def _product(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _sum_and_product(_added: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return _product(a, b)


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(_gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    # Products: the scores again; then the gradients of values, of scores, of queries and of keys.
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])


def _product_4bit(a: Any, _packed: Any, shape: Any, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * shape[0]


def _product_8bit(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[0]


_FORMULAS: dict[str, Callable[..., int]] = {
    # Operations that torch's own registry does not have, or does not have in all variants: products in another dtype
    # than their factors (TRL's loss on a GPU; torch 2.13), grouped attention heads (before torch 2.13).
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
    """Counter of the floating-point operations of matrix products and attention within the context.

    A multiply-add counts as two. Recomputation under gradient checkpointing counts, because it is executed.
    Element-wise operations do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: float = 0
        """Operations so far; NaN once an operation ran that torch has no working formula for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        try:
            self.flops += flops_of(func, args, kwargs, out)
        except (AssertionError, TypeError, ValueError) as error:  # not a reason to stop training
            if not math.isnan(self.flops):
                log.warning("arithmetic is not counted: torch's formula for %s failed: %s", func, error)
            self.flops = math.nan
        return out


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the floating-point operations of a torch operation, if it is a matrix product or attention; else 0."""
    packet = func.overloadpacket
    if formula := _FORMULAS.get(str(packet)):
        return formula(*args, **kwargs)
    if formula := flop_registry.get(packet):
        return int(formula(*args, **kwargs, out_val=out))
    return 0


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product on this device, in this dtype, with the current threads.

    Products grow until `PEAK_SECONDS` have passed: a processor without instructions for this dtype may take seconds for
    a large one. On a GPU they take 100 MB for a moment. The peaks that vendors publish are higher, but no program
    reaches them.
    """
    best, end = 0.0, math.inf
    for n in (256, 512, 1024, 2048, 4096):
        a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
        for _ in range(4):
            begin = time.perf_counter()
            float((a @ b)[0, 0])  # reading a value waits until a GPU is done
            best = max(best, 2 * n**3 / (time.perf_counter() - begin))
            end = min(end, time.perf_counter() + PEAK_SECONDS)  # the first product also loads libraries
        if time.perf_counter() > end:
            break
    return best


def product_flops(device: str, dtype: torch.dtype, tokens: int, bf16: bool) -> float:
    """Measure the FLOP/s of a frozen layer, forward and backward, as training computes it.

    Args:
        device: device to measure.
        dtype: dtype of the layer's weights.
        tokens: rows of its input.
        bf16: compute under autocast to bfloat16.
    """
    width, inner = 1024, 4096
    x = torch.ones(tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.ones(inner, width, device=device, dtype=dtype)
    best, end, rounds = 0.0, time.perf_counter() + PEAK_SECONDS, 0
    with fast_products(device):
        while rounds < 3 or time.perf_counter() < end:
            begin = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                out = torch.nn.functional.linear(x, weight)
            (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
            float(gradient[0, 0])  # waits until a GPU is done
            best = max(best, 4 * tokens * width * inner / (time.perf_counter() - begin))
            rounds += 1
    return best


def copied_bytes(device: str) -> float:
    """Measure the bytes that the device's memory reads and writes in a second."""
    source = torch.ones(16 * MIB, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        float(target[0])
        best = max(best, 2 * source.nbytes / (time.perf_counter() - begin))
    return best


class EnergyMeter:
    """Meter of the joules used within the context by processor packages (RAPL, if readable) and NVIDIA GPUs (NVML).

    It measures the complete machine: the result is the run's energy only if nothing else runs. Sources: the kernel's
    power capping framework,
    `energy_uj` and `max_energy_range_uj`; NVML's `nvmlDeviceGetTotalEnergyConsumption` (mJ; Volta and later).
    """

    def __init__(self, powercap: Path = _POWERCAP) -> None:
        self._packages = [zone for zone in sorted(powercap.glob("*-rapl:*")) if zone.name.count(":") == 1]
        self.joules: float | None = None
        """None if the machine does not report it."""

    def __enter__(self) -> Self:
        self._start = self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = self._read()
        if self._start and end.keys() == self._start.keys():
            used = [now - then for (then, _), (now, _) in zip(self._start.values(), end.values(), strict=True)]
            ranges = [limit for _, limit in end.values()]
            self.joules = sum(value % limit if limit else value for value, limit in zip(used, ranges, strict=True))

    def _read(self) -> dict[str, tuple[float, float]]:
        """Return each counter's joules so far, and its largest value, after which it restarts at zero (0: never)."""
        counters = {}
        for zone in self._packages:
            try:
                counts = [float((zone / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj")]
            except OSError:  # on most machines only root may read it
                continue
            counters[zone.name] = (counts[0], counts[1])
        return counters | _gpu_joules()


def _gpu_joules() -> dict[str, tuple[float, float]]:
    import pynvml

    try:
        return {
            f"gpu{index}": (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)
            for index, handle in enumerate(nvml_handles())
        }
    except pynvml.NVMLError:  # a GPU without an energy counter
        return {}


def of_training(
    metrics: Mapping[str, float], peaks: Mapping[str, Mapping[str, float]], peak: float, joules: float | None
) -> dict[str, float]:
    """Relate the speed of training to the peak speed and memory, and add the energy.

    Args:
        metrics: `tokens_per_second` and `flops_per_second`, if they were measured.
        peaks: MiB by memory phase and source.
        peak: result of `peak_flops`, in FLOP/s.
        joules: energy of the complete training; None if it was not measured.

    Returns:
        `peak_flops_per_second`. `mfu`: the share of `peak` that the counted operations reached, recomputation included.
        `tokens_per_gb_second`: tokens per second and per GB of peak memory in steady steps, which is what torch
        allocated on a GPU, else what the process used (imports included). `energy_joules`.
    """
    values = {"peak_flops_per_second": peak}
    if "flops_per_second" in metrics:
        values["mfu"] = metrics["flops_per_second"] / peak
    steady = peaks.get("steady", {})
    if "tokens_per_second" in metrics and (memory := steady.get("allocated", steady.get("rss"))):
        values["tokens_per_gb_second"] = metrics["tokens_per_second"] / (memory * MIB / 1e9)
    if joules is not None:
        values["energy_joules"] = joules
    return values
