"""Judge whether a prediction fits a device, and estimate the time of a step there. Does not plan runs itself."""

from typing import TYPE_CHECKING

from qlora_exp.config.schema import Config
from qlora_exp.planning.gpus import DRIVER_GIB, Gpu
from qlora_exp.utils.units import GIB, MIB

if TYPE_CHECKING:
    from qlora_exp.planning.planner import Prediction

WORST_ERROR = 0.07
"""Worst relative error of plans for GPUs against measurements.

Source: `benchmarks/published_*.py` and `benchmarks/measured_h100.py`.
"""


def step_seconds(config: Config, prediction: "Prediction", gpu: Gpu) -> float | None:
    """Estimate the seconds of an optimizer step.

    Uses the rate that runs reached on this kind of device, else the manufacturer's rates. With the latter, each
    operation takes the longer of the time for its arithmetic and the time for its memory traffic. Source: the roofline
    model (Williams et al. 2009).

    Returns:
        Seconds; None if there is no rate. Manufacturers' rates do not apply to float32.
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
    """Return the expected peak in bytes: corrected by the device's calibration if there is one, else as planned."""
    return gpu.calibration.expected(prediction.peak) if gpu.calibration else prediction.peak


def worst_error(gpu: Gpu) -> float:
    """Return the worst relative error of the expected peak on this kind of device."""
    return gpu.calibration.worst_error if gpu.calibration else WORST_ERROR


def room(gpu: Gpu, sign: int = 1) -> float:
    """Return the largest planned peak in bytes that still fits if the prediction is off by the worst error seen.

    Args:
        gpu: the device.
        sign: 1: the prediction is too low; -1: it is too high.
    """
    usable = (gpu.memory_gib - DRIVER_GIB) * GIB / (1 + sign * min(worst_error(gpu), 0.99))
    if gpu.calibration:
        return (usable - gpu.calibration.offset_mib * MIB) / gpu.calibration.slope
    return usable


def verdict(prediction: "Prediction", gpu: Gpu) -> str:
    """Return `fits`, `may fit` or `does not fit` for the fullest phase together with the driver's memory."""
    return "fits" if prediction.peak <= room(gpu) else "may fit" if prediction.peak <= room(gpu, -1) else "does not fit"
