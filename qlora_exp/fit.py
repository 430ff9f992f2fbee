"""Whether what is predicted fits a GPU, and how long a step takes there. Predicts nothing itself."""

from qlora_exp.allocator import MIB
from qlora_exp.gpus import DRIVER_GIB, Gpu
from qlora_exp.plan import Prediction
from qlora_exp.schema import Config

GIB = 1024 * MIB
WORST_ERROR = 0.051
"""Of predictions for GPUs against what was measured and published (`benchmarks/published_memory.py`)."""


def step_seconds(config: Config, prediction: Prediction, gpu: Gpu) -> float | None:
    """Of an optimizer step at the makers' rates: each operation takes as long as its arithmetic or its traffic would.

    Source: the roofline model (Williams et al. 2009). None if the GPU's rates are not known; in float32 they are not.
    """
    if not (gpu.tflops and gpu.gb_per_s and prediction.in_16_bits):
        return None
    one = sum(max(work.flops / (gpu.tflops * 1e12), work.nbytes / (gpu.gb_per_s * 1e9)) for work in prediction.work)
    return one * config.training.gradient_accumulation_steps


def verdict(prediction: Prediction, gpu: Gpu) -> str:
    """Whether the fullest phase and the driver fit, if the prediction is as far off as any was."""
    return (
        "fits"
        if prediction.peak <= room(gpu)
        else "may fit"
        if prediction.peak <= room(gpu, -WORST_ERROR)
        else "does not fit"
    )


def room(gpu: Gpu, error: float = WORST_ERROR) -> float:
    """Bytes that a run may be predicted to take, if the prediction is too low by the share `error`."""
    return (gpu.memory_gib - DRIVER_GIB) * GIB / (1 + error)
