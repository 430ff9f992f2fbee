"""Whether what is planned fits a device, and how long a step takes there. Plans nothing itself."""

from typing import TYPE_CHECKING

from qlora_exp.config.schema import Config
from qlora_exp.planning.gpus import DRIVER_GIB, Gpu
from qlora_exp.utils.units import GIB, MIB

if TYPE_CHECKING:
    from qlora_exp.planning.planner import Prediction

WORST_ERROR = 0.07
"""Of plans for GPUs against what was measured (`benchmarks/published_*.py`, `benchmarks/measured_h100.py`)."""


def step_seconds(config: Config, prediction: "Prediction", gpu: Gpu) -> float | None:
    """Of an optimizer step: at the rate that runs reached on this kind of device, else at its maker's.

    At the maker's rates each operation takes as long as its arithmetic or its traffic would. Source: the roofline model
    (Williams et al. 2009). None if no rate is known; in float32 the makers' are not.
    """
    passes = config.training.gradient_accumulation_steps
    if gpu.calibration and gpu.calibration.flops_per_second:
        return passes * sum(work.flops for work in prediction.work) / gpu.calibration.flops_per_second
    if not (gpu.tflops and gpu.gb_per_s and prediction.in_16_bits):
        return None
    return passes * sum(
        max(work.flops / (gpu.tflops * 1e12), work.nbytes / (gpu.gb_per_s * 1e9)) for work in prediction.work
    )


def expected(prediction: "Prediction", gpu: Gpu) -> float:
    """Bytes at the fullest, as runs on this kind of device say; without any, as planned."""
    return gpu.calibration.expected(prediction.peak) if gpu.calibration else prediction.peak


def worst_error(gpu: Gpu) -> float:
    """Share by which what was expected on such a device was off at worst."""
    return gpu.calibration.worst_error if gpu.calibration else WORST_ERROR


def room(gpu: Gpu, sign: int = 1) -> float:
    """Bytes that may be planned if what is expected is as far too low (-1: too high) as it ever was."""
    taken = (gpu.memory_gib - DRIVER_GIB) * GIB / (1 + sign * min(worst_error(gpu), 0.99))
    if gpu.calibration:
        return (taken - gpu.calibration.offset_mib * MIB) / gpu.calibration.slope
    return taken


def verdict(prediction: "Prediction", gpu: Gpu) -> str:
    """Whether the fullest phase and the driver fit."""
    return "fits" if prediction.peak <= room(gpu) else "may fit" if prediction.peak <= room(gpu, -1) else "does not fit"
