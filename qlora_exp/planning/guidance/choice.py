"""Choose one of several planned ways to train for a goal, and say why."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from qlora_exp.planning.advisor import Option
from qlora_exp.planning.cost import seconds_per_thousand
from qlora_exp.planning.fit import expected, step_seconds, verdict
from qlora_exp.planning.gpus import GPUS, Gpu
from qlora_exp.planning.guidance import knowledge

GOALS = ("quality", "speed", "memory", "cost")
REFERENCE = "rtx4090"
"""Card at whose rates options are compared where the rates of the card are not known."""
EQUAL = 1.1
"""Ratio of planned times that are not told apart."""


@dataclass(frozen=True)
class Measured:
    """The best past runs of an option, on the same model and rows as those of the others."""

    loss: float
    """Mean held-out loss after training."""
    runs: Sequence[str]
    """Their names."""
    verdict: str
    """Difference from the best of the options, in words; empty for the best."""
    worse: bool
    """Whether it is significantly worse than the best."""


NONE: Mapping[str, Measured] = MappingProxyType({})
"""No past runs."""


@dataclass(frozen=True)
class Choice:
    """What to take, and why."""

    name: str
    why: str
    command: str = ""
    """A command that trains so; empty if nothing fits."""


def seconds(option: Option, gpu: Gpu) -> float | None:
    """Return the planned time of 1,000 examples; None if no rate is known."""
    step = step_seconds(option.planned, gpu)
    return None if step is None else seconds_per_thousand(step, option.config)


def rated(gpu: Gpu) -> Gpu:
    """Return the GPU, or REFERENCE where its rates are not known, to compare times with."""
    known = gpu.tflops or (gpu.calibration and gpu.calibration.flops_per_second)
    return gpu if known else replace(GPUS[REFERENCE], memory_gib=gpu.memory_gib)


def choose(
    options: Sequence[Option], gpu: Gpu, goal: str = "quality", measured: Mapping[str, Measured] = NONE
) -> Choice:
    """Choose an option for one GPU.

    Args:
        options: at least one.
        gpu: a GPU for which `Option.fits` was planned.
        goal: one of GOALS. Of what is expected to be equally good, the fastest is taken.
        measured: past runs by names of options.
    """
    if fitting := [option for option in options if option.fits[gpu].rows]:
        best = _best(fitting, gpu, goal, measured)
        rows, wanted = best.fits[gpu].rows, best.config.training.per_device_train_batch_size
        fewer = f"; {rows} row{'s fit' if rows > 1 else ' fits'} in a batch, not {wanted}" if rows < wanted else ""
        return Choice(best.name, _why(best, options, gpu, goal, measured) + fewer, _command(best, gpu, rows))
    if short := [option for option in options if option.fits[gpu].length]:
        best = _best(short, gpu, goal, measured)
        longest = best.fits[gpu].length
        why = f"with rows of at most {longest} tokens"
        return Choice(best.name, why, _command(best, gpu, 1, f"training.max_length={longest}"))
    least = min(options, key=lambda option: option.planned.peak)
    need = knowledge.gib(expected(least.planned, gpu))
    why = f"not even {least.name} with one short row fits (it takes {need}): choose a smaller model (--models)"
    why += ", a larger GPU"
    several = [f"{count} for {option.name}" for option in options if (count := option.fits[gpu].gpus) > 1]
    return Choice(
        "none", why + (f", or several of these with distributed=fsdp ({', '.join(several)})" if several else "")
    )


def _best(options: Sequence[Option], gpu: Gpu, goal: str, measured: Mapping[str, Measured]) -> Option:
    if goal == "memory":
        return min(options, key=lambda option: option.planned.peak)
    timed = {option.name: seconds(option, rated(gpu)) for option in options}

    def time(option: Option) -> float:
        return timed[option.name] or math.inf

    if goal == "quality":
        seen = [option for option in options if option.name in measured]
        if len(seen) > 1:
            least = min(measured[option.name].loss for option in seen)
            tied = [o for o in seen if not measured[o.name].worse or measured[o.name].loss == least]
            return min(tied, key=time)
        return min(options, key=lambda option: (knowledge.quality(option.config).rank, time(option)))
    fastest = min(map(time, options))
    near = [option for option in options if time(option) <= EQUAL * fastest] or options
    return min(near, key=lambda option: (knowledge.quality(option.config).rank, time(option)))


def _why(best: Option, options: Sequence[Option], gpu: Gpu, goal: str, measured: Mapping[str, Measured]) -> str:
    others = [option for option in options if option is not best]
    need = knowledge.gib(expected(best.planned, gpu))
    if not others:
        return f"it fits with {need}"
    if goal == "memory":
        return f"it takes the least memory, {need}; {_quality(best, measured)}"
    mine = seconds(best, rated(gpu))
    if goal in ("speed", "cost"):
        what = "least time" if goal == "speed" else "least time on this card, and so the least money"
        return f"it takes the {what} of those that fit; {_quality(best, measured)}"
    if sum(option.name in measured for option in options if option.fits[gpu].rows) > 1 and best.name in measured:
        tied = [o.name for o in others if o.name in measured and not measured[o.name].worse and o.fits[gpu].rows]
        if tied:
            return f"runs measured here do not tell it from {', '.join(tied)}, and it is the fastest of these"
        return "it has the lowest held-out loss of the runs measured here"
    if knowledge.kind(best.config) == "lora":
        why = "it fits, so no accuracy is lost to 4-bit weights"
        qlora = next((option for option in others if knowledge.kind(option.config) == "qlora"), None)
        if qlora is not None:
            why += f"; QLoRA would take {knowledge.gib(expected(qlora.planned, gpu))}, not {need}"
            theirs = seconds(qlora, rated(gpu))
            if mine and theirs and gpu == rated(gpu):
                alike = 1 / EQUAL < theirs / mine < EQUAL
                why += ", and about the same time" if alike else f", and {theirs / mine - 1:+.0%} time"
        return why
    better = [o for o in others if _rank(o) < _rank(best) and not o.fits[gpu].rows]
    if better:
        first = min(better, key=lambda option: option.planned.peak)
        config = first.config.training
        return (
            f"{first.name} does not fit with one row of {config.max_length} tokens "
            f"(it takes {knowledge.gib(expected(first.planned, gpu))} with {config.per_device_train_batch_size})"
        )
    return f"of those that fit, it is expected to learn best; {_quality(best, measured)}"


def _rank(option: Option) -> int:
    return knowledge.quality(option.config).rank


def _quality(option: Option, measured: Mapping[str, Measured]) -> str:
    if option.name in measured:
        seen = measured[option.name]
        return f"held-out loss {seen.loss:.4f} (measured here{'; ' + seen.verdict if seen.verdict else ''})"
    return f"quality: {knowledge.quality(option.config)}"


def _command(option: Option, gpu: Gpu, rows: int, *more: str) -> str:
    """Return a command that trains with batches of at most so many rows, and as many rows in a step as configured."""
    training = option.config.training
    wanted = training.per_device_train_batch_size
    step = wanted * training.gradient_accumulation_steps
    size = max(size for size in range(1, min(rows, wanted) + 1) if step % size == 0)
    changes = [*more]
    if size < wanted:
        changes.append(f"training.per_device_train_batch_size={size}")
        changes.append(f"training.gradient_accumulation_steps={step // size}")
    as_planned = size == wanted and verdict(option.planned, gpu) == "fits"
    if training.per_device_eval_batch_size > size and not as_planned:
        changes.append(f"training.per_device_eval_batch_size={size}")
    keys = {change.partition("=")[0] for change in changes}
    return shlex.join(["qlora-exp", "train", *(w for w in option.words if w.partition("=")[0] not in keys), *changes])
