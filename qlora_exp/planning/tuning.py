"""Choose how a run computes its steps: rows at once, padding, recomputation, precision; never what it learns from.

The rows of a step stay, and so does the order of steps. The loss is that of all tokens of a step, so batches, padding
and checkpointing change sums in their rounding only, and the masks of dropout. Bfloat16 on a CPU rounds more.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.training import TrainingConfig
from qlora_exp.config.trainer_settings import untiled
from qlora_exp.environment.device import Resolved
from qlora_exp.environment.efficiency import copied_bytes, product_flops
from qlora_exp.models import builtin
from qlora_exp.planning.fit import room
from qlora_exp.planning.gpus import EFFICIENCY, GPUS, PYTHON_SECONDS, Gpu
from qlora_exp.utils.errors import ConfigError, UserError
from qlora_exp.utils.units import GIB

if TYPE_CHECKING:
    from qlora_exp.planning.planner import Prediction

PYTHON_SECONDS_OF_CPU = 10e-6
"""Time in which Python starts an operation of a CPU: an assumption; torch alone takes 3 µs for an addition."""

_MOST_TOKENS = 1024
"""Products of more tokens are no faster."""
_FASTER = 1.2
"""How many times as fast bfloat16 must be on a CPU to be chosen."""
_EQUAL = 1.15
"""Ratio of estimated times that are not told apart: on a CPU, estimates were off by as much."""
_DRAWN = 200
"""Number of steps that are drawn to estimate the padding of sorted rows."""


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
    recomputed_layers: int | None = None
    """Number of layers that recompute; None: all or none."""
    padding: str = "batch"
    """As in `training.padding`."""
    activation_offloading: bool = False
    tiled_mlp: bool = False
    among: str = ""
    """What it was chosen from."""

    def applied(self, resolved: Resolved) -> Resolved:
        """Return `resolved` with this choice."""
        return replace(
            resolved,
            per_device_train_batch_size=self.rows,
            gradient_accumulation_steps=self.batches,
            gradient_checkpointing=self.gradient_checkpointing,
            recomputed_layers=self.recomputed_layers,
            padding=self.padding,
            activation_offloading=self.activation_offloading,
            tiled_mlp=self.tiled_mlp,
            bf16=self.bf16,
            tuned=str(self),
        )

    def __str__(self) -> str:
        some = f"recomputed_layers={self.recomputed_layers} " if self.recomputed_layers else ""
        some += "".join(f"{key}=true " for key in ("activation_offloading", "tiled_mlp") if getattr(self, key))
        settings = (
            f"per_device_train_batch_size={self.rows} gradient_accumulation_steps={self.batches} "
            f"gradient_checkpointing={self.gradient_checkpointing} {some}padding={self.padding} bf16={self.bf16}"
        )
        unless = "" if self.fits else ", which may not fit"
        cost = f"planned {self.peak / GIB:.1f} GiB{unless}, about {self.seconds:.2g} s a step with Python's share"
        cost += f", {self.among}" if self.among else ""
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
    if config.quantization.load_in_8bit:
        return "LLM.int8 rounds what it multiplies by the largest values of a batch"
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
        fits, the one that takes the least memory. Rows in one sequence are chosen only if they are faster by as much:
        attention with a mask of their ends may be slower than other attention.

    Raises:
        ConfigError: the run cannot be planned.
        ModelError: the architecture is not available locally.
    """
    found = [*_candidates(config, resolved, lengths, evaluated, device, rates)]
    fitting = [choice for choice in found if choice.fits]
    among = f"of {len(found)} ways that were planned, of which {len(fitting)} fit"
    if not fitting:
        return replace(min(found, key=lambda choice: choice.peak), among=f"the smallest {among}")
    if padded := [choice.seconds for choice in fitting if choice.padding != "free"]:
        least = min(padded) / _EQUAL
        fitting = [choice for choice in fitting if choice.padding != "free" or choice.seconds < least]
    enough = _EQUAL * min(choice.seconds for choice in fitting)
    configured = [choice for choice in fitting if choice.rows == resolved.per_device_train_batch_size]
    kept = [choice for choice in configured if choice.seconds <= enough]
    return replace(min(kept or fitting, key=lambda choice: choice.seconds), among=f"the fastest {among}")


def _candidates(
    config: Config, resolved: Resolved, lengths: Sequence[int], evaluated: int | None, device: Gpu, rates: Rates
) -> Iterator[Choice]:
    """Plan every division of a step's rows into batches, and recomputation for those that do not fit without.

    Of those that do not fit only the smallest is given. Where recomputation in all layers fits, recomputation in a
    quarter, a half or three quarters of them is planned too, until one fits. Where nothing fits, the smallest batch is
    planned with what saves the memory of long rows, until it fits.
    """
    ways = _Ways(config, replace(resolved, bf16=rates.bf16), lengths, evaluated, device, rates)
    choosing = config.training.gradient_checkpointing == "auto" and not config.refusal("gradient_checkpointing")
    fit: set[tuple[int, str]] = set()
    for recomputes in (False, True) if choosing else (resolved.gradient_checkpointing,):
        for rows in ways.sizes:
            paddings = [padding for padding in ways.paddings(rows) if (rows, padding) not in fit]
            found = [ways.choice(rows, padding, recomputes) for padding in paddings]
            for choice in found:
                yield choice
                if choosing and recomputes and choice.fits:
                    yield from ways.in_fewer_layers(choice)
            fit |= {(choice.rows, choice.padding) for choice in found if choice.fits}
            if found and not any(choice.fits for choice in found):
                break  # more rows take more memory
    if choosing and not fit:
        yield from ways.of_long_rows()


class _Ways:
    """Ways to compute the steps of a run."""

    def __init__(
        self,
        config: Config,
        resolved: Resolved,
        lengths: Sequence[int],
        evaluated: int | None,
        device: Gpu,
        rates: Rates,
    ) -> None:
        from qlora_exp.planning.planner import Planner

        self._config, self._resolved, self._device, self._rates = config, resolved, device, rates
        self._lengths, self._evaluated = lengths, evaluated
        self._plans = Planner(config, resolved)
        self._fixed = fixed_rows(config, self._plans.has_router)
        training = config.training
        self._rows = training.per_device_train_batch_size * training.gradient_accumulation_steps

    @property
    def sizes(self) -> list[int]:
        """Numbers of rows of a batch."""
        if self._fixed:
            return [self._config.training.per_device_train_batch_size]
        return [rows for rows in range(1, self._rows + 1) if self._rows % rows == 0]

    def paddings(self, rows: int) -> list[str]:
        """Return how batches of so many rows may be padded: as configured, or else with as little as can be."""
        training = self._config.training
        if self._fixed or training.packing or training.padding:
            return [self._resolved.padding]
        if rows == 1:
            return ["batch"]
        return ["by_length" if rows < self._rows else "batch", *["free"] * self._can_be_free]

    @property
    def _can_be_free(self) -> bool:
        """Whether rows in one sequence are computed as they are apart, and by a GPU: a CPU was not faster with them."""
        config = self._config
        alone = not (config.refusal("packing") or config.training.sft_config.get("pad_to_multiple_of"))
        return self._device.type != "cpu" and alone and keeps_rows_apart(self._plans.family)

    def choice(
        self,
        rows: int,
        padding: str,
        recomputes: bool,
        layers: int | None = None,
        offloads: bool | None = None,
        tiles: bool | None = None,
    ) -> Choice:
        """Plan batches of so many rows, with recomputation in all layers, the first `layers` or none.

        With `offloads` and `tiles` None, activations are offloaded and MLPs tiled as configured.
        """
        offloads = self._resolved.activation_offloading if offloads is None else offloads
        tiles = self._resolved.tiled_mlp if tiles is None else tiles
        training, batches = self._config.training, self._rows // rows
        layers = layers or (self._resolved.recomputed_layers if recomputes else None)
        plan = self._plans.computing(
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=batches,
            padding=padding,
            gradient_checkpointing=recomputes,
            recomputed_layers=layers,
            activation_offloading=offloads,
            tiled_mlp=tiles,
        )
        longest = training.max_length if training.packing else min(training.max_length, max(self._lengths))
        whole = plan.predict(length=longest, evaluated=self._evaluated)
        usual = longest if training.packing else round(_usual_length(self._lengths, rows, batches, padding, training))
        typical = whole if usual == longest else plan.predict(length=usual, evaluated=0)
        return Choice(
            rows,
            batches,
            recomputes,
            self._resolved.bf16,
            seconds=batches * self._rates.seconds(typical, rows * usual),
            peak=whole.peak,
            fits=whole.peak <= room(self._device, ranks=whole.ranks),
            kept=self._fixed,
            recomputed_layers=layers,
            padding=padding,
            activation_offloading=offloads,
            tiled_mlp=tiles,
        )

    def of_long_rows(self) -> Iterator[Choice]:
        """Plan the smallest batch with activations in the machine's memory, tiled MLPs, or both; end with what fits."""
        config, rows = self._config, min(self.sizes)
        already = self._resolved.activation_offloading, self._resolved.tiled_mlp
        offloads = already[0] or (self._device.type == "cuda" and not config.distributed.shards)
        tiles = already[1] or not (config.distributed.shards or [*untiled(config)])
        ways = (offloads, already[1]), (already[0], tiles), (offloads, tiles)
        for offload, tile in dict.fromkeys(way for way in ways if way != already):
            try:
                found = self.choice(rows, self.paddings(rows)[0], True, None, offload, tile)
            except UserError:  # layers without an MLP of their own
                continue
            yield found
            if found.fits:
                return

    def in_fewer_layers(self, choice: Choice) -> Iterator[Choice]:
        """Plan the same batches with recomputation in some layers, by quarters of them; yield the first that fits."""
        quarters = {self._plans.depth * count // 4 for count in (1, 2, 3)} - {0}
        for layers in sorted(quarters) if self._plans.can_recompute_some else ():
            if (found := self.choice(choice.rows, choice.padding, True, layers)).fits:
                yield found
                return


@cache
def keeps_rows_apart(family: str) -> bool:
    """Return whether models of a family (`model_type`) keep rows in one sequence apart, tried with a tiny one.

    A family of which there is no tiny model is taken not to. A run tries its own model again once that is loaded.
    """
    from transformers import AutoModelForCausalLM

    from qlora_exp.training.evaluation import isolates_packed_rows

    if family not in builtin.TINY:
        return False
    model = AutoModelForCausalLM.from_pretrained(builtin.folder_of(f"random:{family}"))
    try:
        return isolates_packed_rows(model)
    except ConfigError:  # it needs a package that is not here
        return False


def _usual_length(lengths: Sequence[int], rows: int, batches: int, padding: str, training: TrainingConfig) -> float:
    """Return the mean of what a row of a step takes in its batch, in tokens, padding included."""
    cut = [min(length, training.max_length) for length in lengths]
    if padding == "free" or training.train_sampling_strategy == "group_by_length":
        return sum(cut) / len(cut)
    return _mean_of_sorted(cut, rows, batches) if padding == "by_length" else _mean_of_longest(cut, rows)


def _mean_of_longest(lengths: Sequence[int], rows: int) -> float:
    """Return the mean length of the longest of `rows` rows that come together."""
    ordered, count = sorted(lengths), len(lengths)
    # The longest of so many draws is the i-th smallest with probability (i/n)^rows - ((i-1)/n)^rows.
    return sum(
        length * ((place / count) ** rows - ((place - 1) / count) ** rows)
        for place, length in enumerate(ordered, start=1)
    )


def _mean_of_sorted(lengths: Sequence[int], rows: int, batches: int) -> float:
    """Estimate the mean length of the longest row of each batch, if a step's rows are sorted, from 200 steps drawn."""
    draw = random.Random(0)
    steps = [sorted(draw.choices(lengths, k=rows * batches)) for _ in range(_DRAWN)]
    return sum(sum(step[rows - 1 :: rows]) for step in steps) / (_DRAWN * batches)


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
    """Return the manufacturer's rates times `EFFICIENCY`, as plans are timed; for an unlisted GPU an A100's."""
    known = gpu if gpu.tflops else GPUS["a100-80gb"]
    flops, nbytes = EFFICIENCY * known.tflops * 1e12, EFFICIENCY * known.gb_per_s * 1e9
    return Rates(lambda _: flops, nbytes, PYTHON_SECONDS, resolved.bf16)
