"""A plan as tables: where memory goes, whether it fits, a step's time at makers' rates. Plans nothing itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.allocator import MIB
from qlora_exp.footprint import KINDS
from qlora_exp.gpus import DRIVER_GIB, Gpu
from qlora_exp.plan import Prediction
from qlora_exp.schema import Config
from qlora_exp.summary import print_table

GIB = 1024 * MIB
WORST_ERROR = 0.051
"""Of predictions for GPUs against what was measured and published (`benchmarks/published_memory.py`)."""
_LEFT_OUT = "left out: generation, data loading, several GPUs; rows are taken to be as long as training.max_length"


@dataclass(frozen=True)
class Planned:
    """A run and what is expected of it."""

    words: Sequence[str]
    config: Config | None
    prediction: Prediction | None
    why: str = ""
    """Why there is none."""


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
    most, least = (prediction.peak / GIB * (1 + error) + DRIVER_GIB for error in (WORST_ERROR, -WORST_ERROR))
    return "fits" if most <= gpu.memory_gib else "may fit" if least <= gpu.memory_gib else "does not fit"


def show_one(planned: Planned, gpu: Gpu, price: float | None) -> None:
    """Print phases and kinds, then what they come to."""
    config, prediction = planned.config, planned.prediction
    assert config is not None
    assert prediction is not None
    phases = prediction.phases.values()
    rows = [[kind, *(f"{phase.kinds.get(kind, 0) / MIB:,.0f}" for phase in phases)] for kind in KINDS]
    rows = [row for row in rows if set(row[1:]) != {"0"}]
    if config.device != "cpu":
        rows.append(["allocator", *(f"{(phase.reserved - phase.allocated) / MIB:,.0f}" for phase in phases)])
    rows.append(["all", *(f"{phase.reserved / MIB:,.0f}" for phase in phases)])
    print_table("MiB at the fullest moment of each phase", ["", *prediction.phases], rows)
    print(f"trained  {prediction.trainable:,} of {prediction.total:,} parameters")
    print(f"memory   {prediction.peak / GIB:.2f} GiB{_against(prediction, gpu)}")
    if prediction.paged:
        print(f"paged    {prediction.paged / GIB:.2f} GiB of optimizer states besides, on the GPU while there is room")
    flops, traffic = (sum(getattr(work, name) for work in prediction.work) for name in ("flops", "nbytes"))
    print(f"work     {flops / 1e12:,.2f} TFLOP and {traffic / 1e9:,.0f} GB of traffic for a forward and backward pass")
    if (seconds := step_seconds(config, prediction, gpu)) is not None:
        print(f"time     {_time(config, seconds, price)}, at the maker's rates")
    if config.device != "cpu":
        print(f"error    {WORST_ERROR:.1%} at worst for 12 published GPU runs, none with autocast or 4 bits")
    print(_LEFT_OUT)


def show_many(planned: Sequence[Planned], gpu: Gpu, price: float | None) -> None:
    """Print a line for each run."""
    rows = []
    common = set.intersection(*(set(one.words) for one in planned))
    for one in planned:
        name = " ".join(word for word in one.words if word not in common)
        if one.config is None or one.prediction is None:
            rows.append([name, "-", "-", one.why])
            continue
        seconds = step_seconds(one.config, one.prediction, gpu)
        rows.append(
            [
                name,
                f"{one.prediction.peak / GIB:.2f}",
                verdict(one.prediction, gpu) if gpu.memory_gib else "",
                "" if seconds is None else _time(one.config, seconds, price),
            ]
        )
    shared = f", all with {' '.join(word for word in planned[0].words if word in common)}" if common else ""
    print_table(f"{len(rows)} runs{shared}", ["run", "GiB", gpu.name, "at the maker's rates"], rows)
    print(_LEFT_OUT)


def _against(prediction: Prediction, gpu: Gpu) -> str:
    if not gpu.memory_gib:
        return " (--gpu NAME or --vram GIB says whether it fits)"
    return f"; {verdict(prediction, gpu)} in {gpu.memory_gib:g} GiB ({gpu.name}) with {DRIVER_GIB} GiB for the driver"


def _time(config: Config, seconds: float, price: float | None) -> str:
    steps = config.training.max_steps
    told = f"{seconds:.3g} s a step"
    if steps <= 0:
        return told
    told += f", {steps * seconds / 3600:.3g} h for {steps} steps"
    return told if price is None else f"{told}, {price * steps * seconds / 3600:.3g} at {price:g} an hour"
