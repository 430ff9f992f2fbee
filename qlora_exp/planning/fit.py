"""Judge whether a prediction fits a device, and estimate the time of a step there. Does not plan runs itself."""

from typing import TYPE_CHECKING

from qlora_exp.planning.gpus import DRIVER_GIB, EFFICIENCY, NCCL_GIB, PYTHON_SECONDS, Gpu
from qlora_exp.utils.units import GIB, MIB

if TYPE_CHECKING:
    from qlora_exp.planning.planner import Prediction

WORST_ERROR = 0.07
"""Worst relative error of plans for GPUs against measurements.

Source: `benchmarks/published_*.py` and `benchmarks/measured_h100.py`.
"""

WORST_ERROR_OF_SEVERAL = 0.21
"""Worst relative error of plans for several GPUs. Source: `benchmarks/published_fms.py`."""

TOO_GOOD = "real steps on an H100 took 0.7 to 2.8 times as long, the longest those of small models and short rows"
"""How far off planned times were where no run of the device is known. Source: docs/explanation/planning.md."""


def step_seconds(prediction: "Prediction", gpu: Gpu) -> float | None:
    """Estimate the seconds of an optimizer step.

    Uses the rate that runs reached on this kind of device, else a share (`EFFICIENCY`) of the manufacturer's rates.
    With the latter, each operation takes the longest of the time for its arithmetic, the time for its memory traffic
    and the time in which Python starts it. Source: the roofline model (Williams et al. 2009).

    Returns:
        Seconds; None if there is no rate. Manufacturers' rates do not apply to float32.
    """
    passes = prediction.batches
    if gpu.calibration and gpu.calibration.flops_per_second:
        return passes * sum(work.flops for work in prediction.work) / gpu.calibration.flops_per_second
    if not (gpu.tflops and gpu.gb_per_s and prediction.in_16_bits):
        return None
    flops, nbytes = EFFICIENCY * gpu.tflops * 1e12, EFFICIENCY * gpu.gb_per_s * 1e9
    return passes * sum(max(PYTHON_SECONDS, work.flops / flops, work.nbytes / nbytes) for work in prediction.work)


def expected(prediction: "Prediction", gpu: Gpu) -> float:
    """Return the expected peak in bytes: corrected by the device's calibration if there is one, else as planned."""
    return gpu.calibration.expected(prediction.peak) if gpu.calibration else prediction.peak


def worst_error(gpu: Gpu, ranks: int = 1) -> float:
    """Return the worst relative error of the expected peak on this kind of device, with so many of them."""
    if gpu.calibration:
        return gpu.calibration.worst_error
    return WORST_ERROR if ranks == 1 else WORST_ERROR_OF_SEVERAL


def communication_seconds(prediction: "Prediction", gpu: Gpu) -> float | None:
    """Return the seconds that the traffic of a step takes if it overlaps with nothing; None without a rate."""
    return prediction.traffic.total / (gpu.link_gb_per_s * 1e9) if gpu.link_gb_per_s else None


def outside(ranks: int) -> float:
    """Return the GiB of a GPU that the driver takes, and NCCL with several ranks; on a CPU, the libraries' share."""
    return DRIVER_GIB + (NCCL_GIB if ranks > 1 else 0.0)


def room(gpu: Gpu, sign: int = 1, ranks: int = 1) -> float:
    """Return the largest planned peak in bytes that still fits if the prediction is off by the worst error seen.

    Args:
        gpu: the device.
        sign: 1: the prediction is too low; -1: it is too high.
        ranks: number of GPUs that share the run.
    """
    usable = (gpu.memory_gib - outside(ranks)) * GIB / (1 + sign * min(worst_error(gpu, ranks), 0.99))
    if gpu.calibration:
        return (usable - gpu.calibration.offset_mib * MIB) / gpu.calibration.slope
    return usable


def needed_for(peak: float, gpu: Gpu, ranks: int = 1) -> float:
    """Return the GiB of memory that a device of this kind needs, so that its `room` is `peak`."""
    if gpu.calibration:
        peak = peak * gpu.calibration.slope + gpu.calibration.offset_mib * MIB
    return peak * (1 + min(worst_error(gpu, ranks), 0.99)) / GIB + outside(ranks)


def verdict(prediction: "Prediction", gpu: Gpu) -> str:
    """Return `fits`, `may fit` or `does not fit` for the fullest phase together with the driver's memory."""
    if is_too_much(prediction.peak, gpu, prediction.ranks):
        return "does not fit"
    return "fits" if prediction.peak <= room(gpu, ranks=prediction.ranks) else "may fit"


def is_too_much(peak: float, gpu: Gpu, ranks: int = 1) -> bool:
    """Return whether a planned peak in bytes does not fit, even if the plan is as much too high as plans have been.

    Plans for CPUs cover tensors only. Without a calibration only these are compared with the memory.
    """
    if gpu.type == "cpu" and gpu.calibration is None:
        return peak > (gpu.memory_gib - outside(ranks)) * GIB
    return peak > room(gpu, -1, ranks)
