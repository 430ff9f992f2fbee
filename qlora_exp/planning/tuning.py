"""Choose how a run computes its steps: rows at once, recomputation, precision; never what it learns from.

The rows of a step and their order stay, and the loss is that of all tokens of a step, so batches and checkpointing
change sums in their rounding only, and the masks of dropout. Bfloat16 on a CPU rounds more.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.training import TrainingConfig
from qlora_exp.environment.device import Resolved
from qlora_exp.environment.efficiency import copied_bytes, product_flops
from qlora_exp.planning.fit import room
from qlora_exp.planning.gpus import GPUS, Gpu
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.units import GIB

if TYPE_CHECKING:
    from qlora_exp.planning.planner import Prediction

PYTHON_SECONDS = 40e-6
"""Time in which Python starts an operation of a GPU, which a step of few tokens waits for.

Source: docs/planning.md, "Against an H100": a step of 10,781 operations took 0.43 s with one row.
"""
PYTHON_SECONDS_OF_CPU = 10e-6
"""The same for an operation of a CPU: an assumption. Torch alone takes 3 microseconds for an addition."""

_MOST_TOKENS = 1024
"""Products of more tokens are no faster."""
_FASTER = 1.2
"""How many times as fast bfloat16 must be on a CPU to be chosen."""
_EQUAL = 1.15
"""Ratio of estimated times that are not told apart: on a CPU, estimates were off by as much."""


@dataclass(frozen=True)
class Rates:
    """Rates of a device, from data sheets or measured."""

    flops: Callable[[int], float]
    """FLOP/s of a product of so many tokens with a weight matrix."""
    nbytes: float
    """Bytes read or written per second."""
    operation: float
    """Seconds that each operation takes at least."""
    bf16: bool
    """Whether products are computed under autocast to bfloat16."""

    def seconds(self, prediction: "Prediction", tokens: int) -> float:
        """Estimate the time of a forward and backward pass over a batch of so many tokens."""
        flops = self.flops(tokens)
        return sum(max(self.operation, work.flops / flops, work.nbytes / self.nbytes) for work in prediction.work)


@dataclass(frozen=True)
class Choice:
    """How each process computes a step."""

    rows: int
    """Rows of a batch."""
    batches: int
    """Batches of a step."""
    gradient_checkpointing: bool
    bf16: bool
    seconds: float
    """Estimated time of a step."""
    peak: int
    """Planned bytes at the fullest moment."""
    fits: bool
    """Whether that fits the device, even if the plan is as wrong as plans have been."""
    kept: str | None = None
    """Why the configured batch is kept whatever its speed."""

    def applied(self, resolved: Resolved) -> Resolved:
        """Return `resolved` with this choice."""
        return replace(
            resolved,
            per_device_train_batch_size=self.rows,
            gradient_accumulation_steps=self.batches,
            gradient_checkpointing=self.gradient_checkpointing,
            bf16=self.bf16,
            tuned=str(self),
        )

    def __str__(self) -> str:
        settings = (
            f"per_device_train_batch_size={self.rows} gradient_accumulation_steps={self.batches} "
            f"gradient_checkpointing={self.gradient_checkpointing} bf16={self.bf16}"
        )
        unless = "" if self.fits else ", which may not fit"
        cost = f"planned {self.peak / GIB:.1f} GiB{unless}, about {self.seconds:.2g} s a step with Python's share"
        return f"{settings.lower()}: {cost}" + (f"; batches are not changed, because {self.kept}" if self.kept else "")


def fixed_rows(config: Config, has_router: bool) -> str | None:
    """Return why the rows of a batch are part of what is learned, and not only those of a step; None if they are not.

    Args:
        config: the run.
        has_router: whether its model is a mixture of experts.
    """
    if config.training.neftune_noise_alpha:
        return "NEFTune's noise depends on the longest row of a batch"
    if has_router:
        return "the loss of the experts' router is that of a batch"
    if config.depends_on_batch:
        return f"method={config.method.name} depends on the rows of a batch"
    return None


def choose(
    config: Config, resolved: Resolved, lengths: Sequence[int], evaluated: int | None, device: Gpu, rates: Rates
) -> Choice:
    """Choose the fastest way to compute a step that fits the device.

    Args:
        config: the run.
        resolved: its values on the device.
        lengths: tokens of each training row.
        evaluated: tokens of the longest row of evaluation; None: as `training.max_length`.
        device: the device, with the memory that a run may take.
        rates: its rates.

    Returns:
        The fastest that fits, or the fastest with the configured batch if that is as fast within `_EQUAL`; if none
        fits, the one that takes the least memory.

    Raises:
        ConfigError: the run cannot be planned.
        ModelError: the architecture is not available locally.
    """
    found = [*_candidates(config, resolved, lengths, evaluated, device, rates)]
    if fitting := [choice for choice in found if choice.fits]:
        enough = _EQUAL * min(choice.seconds for choice in fitting)
        configured = [choice for choice in fitting if choice.rows == resolved.per_device_train_batch_size]
        kept = [choice for choice in configured if choice.seconds <= enough]
        return min(kept or fitting, key=lambda choice: choice.seconds)
    return min(found, key=lambda choice: choice.peak)


def _candidates(
    config: Config, resolved: Resolved, lengths: Sequence[int], evaluated: int | None, device: Gpu, rates: Rates
) -> Iterator[Choice]:
    """Plan every division of a step's rows into batches, first without recomputation, with it if not all of these fit.

    Of those that do not fit only the smallest is given.
    """
    from qlora_exp.planning.planner import Planner

    training = config.training
    most = training.max_length
    longest = most if training.packing else min(most, max(lengths))
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    asked = config.training.gradient_checkpointing
    can = asked is True or not config.refusal("gradient_checkpointing")
    for recomputes in (False, True) if asked == "auto" and can else (resolved.gradient_checkpointing,):
        plans = Planner(config, replace(resolved, gradient_checkpointing=recomputes, bf16=rates.bf16))
        fixed = fixed_rows(config, plans.has_router)
        sizes = [n for n in range(1, batch + 1) if batch % n == 0]
        for rows in [training.per_device_train_batch_size] if fixed else sizes:
            plan = plans.in_batches(rows, batch // rows)
            whole = plan.predict(length=longest, evaluated=evaluated)
            fits = whole.peak <= room(device, ranks=whole.ranks)
            usual = longest if training.packing else round(_mean_of_longest(lengths, rows, training))
            typical = whole if usual == longest else plan.predict(length=usual, evaluated=0)
            seconds = batch // rows * rates.seconds(typical, rows * usual)
            yield Choice(rows, batch // rows, recomputes, rates.bf16, seconds, whole.peak, fits, fixed)
            if not fits:
                break  # more rows take more memory
        else:
            return  # nothing need be recomputed


def _mean_of_longest(lengths: Sequence[int], rows: int, training: TrainingConfig) -> float:
    """Return the mean length of the longest of `rows` rows that come together."""
    ordered = sorted(min(length, training.max_length) for length in lengths)
    count = len(ordered)
    if training.train_sampling_strategy == "group_by_length":
        return sum(ordered) / count
    # The longest of so many draws is the i-th smallest with probability (i/n)^rows - ((i-1)/n)^rows.
    return sum(
        length * ((place / count) ** rows - ((place - 1) / count) ** rows)
        for place, length in enumerate(ordered, start=1)
    )


def planned(config: Config, resolved: Resolved, device: Gpu) -> Resolved:
    """Return `resolved` as `training.tune` would change it, if all rows had `training.max_length` tokens.

    Raises:
        ConfigError: the memory of the device is not given, or the run cannot be planned.
        ModelError: the architecture is not available locally.
    """
    if config.training.tune is None:
        return resolved
    if not device.memory_gib:
        raise ConfigError("training.tune=auto: what fits depends on the GPU; add --gpu NAME or --vram GIB")
    lengths = [config.training.max_length]
    rates = measured(config, resolved, lengths) if device.type == "cpu" else published(device, resolved)
    tuned = choose(config, resolved, lengths, None, device, rates).applied(resolved)
    unknown = device.type != "cpu" and not device.tflops
    return replace(tuned, tuned=f"{tuned.tuned} at the rates of an A100 (--gpu names others)") if unknown else tuned


def measured(config: Config, resolved: Resolved, lengths: Sequence[int]) -> Rates:
    """Measure the rates of this device in about a second; of a CPU in float32 and bfloat16, and return the faster."""
    training, device = config.training, resolved.device
    dtype = getattr(torch, resolved.dtype)

    nbytes = copied_bytes(device)

    def rates(bf16: bool) -> Rates:
        operation = PYTHON_SECONDS if device == "cuda" else PYTHON_SECONDS_OF_CPU
        flops = cache(lambda tokens: product_flops(device, dtype, min(tokens, _MOST_TOKENS), bf16))
        return Rates(flops, nbytes, operation, bf16)

    usual = rates(resolved.bf16)
    if device != "cpu" or training.bf16 != "auto" or training.fp16 is True or resolved.dtype != "float32":
        return usual
    tokens = training.per_device_train_batch_size * sum(lengths) // len(lengths)
    other = rates(True)
    return other if other.flops(tokens) > _FASTER * usual.flops(tokens) else usual


def published(gpu: Gpu, resolved: Resolved) -> Rates:
    """Return the manufacturer's rates; of a GPU that is not listed, those of an A100."""
    known = gpu if gpu.tflops else GPUS["a100-80gb"]
    return Rates(lambda _: known.tflops * 1e12, known.gb_per_s * 1e9, PYTHON_SECONDS, resolved.bf16)
