"""What fits a card: which methods, the largest batch, the longest rows, the largest model. Found by planning many runs.

Nothing here is a formula or a table of experience. Knows nothing of recorded runs; imports nothing heavy until it
plans.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import yaml

from qlora_exp.config import hydra_compose as configs
from qlora_exp.config.hydra_compose import compose, conf_dir, grid
from qlora_exp.config.schema import Config
from qlora_exp.planning.fit import expected, room, step_seconds
from qlora_exp.planning.gpus import Gpu
from qlora_exp.utils import workers
from qlora_exp.utils.errors import ConfigError, UserError
from qlora_exp.utils.units import GIB

if TYPE_CHECKING:
    from qlora_exp.planning.planner import Planner, Prediction

CARDS = (4, 6, 8, 12, 16, 24, 40, 48, 80)
"""GiB of those that are sold."""
LENGTH_STEP = 64
MOST_ROWS = 1024
MOST_TOKENS = 131_072
"""Of a row, for models that do not say."""
METHODS = {
    "full, float32": ["method=full", "model.dtype=float32", "training.bf16=false", "training.fp16=false"],
    "full, bfloat16": ["method=full", "model.dtype=bfloat16"],
    "LoRA": ["method=lora"],
    "DoRA": ["method=lora", "lora_variant=dora"],
    "QLoRA": ["method=qlora"],
}
"""What is compared unless methods are named."""
_APART = {word.split("=")[0] for words in METHODS.values() for word in words} | {"quantization"}
"""Keys that tell METHODS apart."""
_START = "fork" if sys.platform == "linux" else "spawn"  # elsewhere libraries do not survive a fork


@dataclass(frozen=True)
class Fit:
    """How far an option goes on a card."""

    rows: int
    """The largest batch of rows of `max_length`; 0: not one row fits."""
    length: int
    """Tokens of the longest row, alone in its batch, in steps of LENGTH_STEP; 0: none fits."""


@dataclass(frozen=True)
class Option:
    """One way to train, on one kind of GPU."""

    name: str
    config: Config
    planned: "Prediction"
    """As configured."""
    fits: dict[Gpu, Fit]


def cards(gpu: Gpu) -> list[Gpu]:
    """That GPU, or if its memory is not given, one of each size that is sold."""
    return [gpu] if gpu.memory_gib else [replace(gpu, memory_gib=size) for size in CARDS]


def check(overrides: Sequence[str], models: bool) -> None:
    """Refuse what cannot be advised on, before anything slow is imported.

    Raises:
        ConfigError: why.
    """
    keys = {word.split("=")[0].lstrip("+~") for word in overrides}
    if models and keys & {"model", "model.model_name_or_path", "method"}:
        raise ConfigError("advise --models: finds the models, for each method; leave out model= and method=")
    jobs = grid(overrides)
    if "method" not in keys:
        if told := ", ".join(sorted(keys & _APART)):
            raise ConfigError(f"advise compares what differs in {told}; name the methods too: method=lora,qlora")
        if len(jobs) > 1:
            raise ConfigError("advise takes lists with the methods named: method=lora,qlora")
    for words in jobs:
        if compose(words).device not in ("auto", "cuda"):
            raise ConfigError("advise is about GPUs: leave out device=; `qlora-exp plan device=cpu` plans a CPU run")


def options(
    overrides: Sequence[str], gpu: Gpu, cards: Sequence[Gpu], report: Callable[[str], None]
) -> tuple[list[Option], dict[str, str]]:
    """The ways to train that are asked for, or METHODS; and of those that cannot be, why.

    Args:
        overrides: of the runs.
        gpu: what they are planned for; its memory does not count.
        cards: how far to look how far each goes.
        report: told what is done.

    Raises:
        UserError: none can be.
    """
    if any(word.startswith("method=") for word in overrides):
        jobs = grid(overrides)
        common = set.intersection(*map(set, jobs)) - {word for word in overrides if word.startswith("method=")}
        named = {" ".join(word for word in job if word not in common): job for job in jobs}
    else:
        named = {name: [*words, *overrides] for name, words in METHODS.items()}
    found, why = _at_once([(name, words, gpu, cards) for name, words in named.items()], report)
    if not found:
        raise UserError("\n".join(dict.fromkeys(why.values())))
    return found, why


def _at_once(
    jobs: Sequence[tuple[str, Sequence[str], Gpu, Sequence[Gpu]]], report: Callable[[str], None]
) -> tuple[list[Option], dict[str, str]]:
    """Options, worked out side by side on all cores, and why others could not be."""
    found, why = [], {}
    with workers.workers(len(jobs), _START) as pool:
        waiting = [pool.submit(_option, *job) for job in jobs]
        for number, (job, future) in enumerate(zip(jobs, waiting, strict=True), start=1):
            try:
                found.append(workers.result(future))
            except UserError as error:
                why[job[0]] = str(error)
            report(f"{number} of {len(jobs)}")
    return found, why


def _option(name: str, words: Sequence[str], gpu: Gpu, cards: Sequence[Gpu]) -> Option:
    """An option and how far it goes on each card."""
    from qlora_exp.planning.planner import planner

    config = compose(words)
    plans = planner(config, gpu.device)
    planned = plans.predict()
    return Option(name, config, planned, _fits(config, planned, plans, cards))


def _fits(config: Config, planned: "Prediction", plans: "Planner", cards: Sequence[Gpu]) -> dict[Gpu, Fit]:
    asked, length = config.training.per_device_train_batch_size, config.training.max_length
    most = (plans.positions or MOST_TOKENS) // LENGTH_STEP

    @cache
    def of_rows(rows: int) -> int:
        return planned.peak if rows == asked else plans.predict(rows, length, evaluated=0).peak

    @cache
    def of_length(steps: int) -> int:
        tokens = LENGTH_STEP * steps
        return of_rows(1) if tokens == length else plans.predict(1, tokens, evaluated=0).peak

    return {
        card: Fit(
            largest(of_rows, room(card), MOST_ROWS, asked),
            LENGTH_STEP * largest(of_length, room(card), most, length // LENGTH_STEP),
        )
        for card in cards
    }


def largest(need: Callable[[int], float], room: float, most: int, known: int) -> int:
    """A count up to `most` whose need is within `room`, while that of one more is not; 0 if none was found.

    Needs grow nearly in proportion: the next guess lies where a line through two needs says.

    Args:
        need: of a count; asked as seldom as can be.
        room: for it.
        most: the largest to look at.
        known: a count whose need is known already: it and 1 are where the search begins.
    """
    known = max(1, min(known, most))
    starts = [count for count in {1, known} if most > 0 and need(count) <= room]
    if not starts:
        return 0
    low = max(starts)
    high = most + 1 if low == known else known
    slope = (need(known) - need(1)) / (known - 1) if known > 1 else 0.0
    while high - low > 1:
        ahead = int((room - need(low)) / slope) if slope > 0 else low
        guess = min(max(low + ahead, low + 1), high - 1)
        slope = (need(guess) - need(low)) / (guess - low)
        low, high = (guess, high) if need(guess) <= room else (low, guess)
    return low


def choose(options: Sequence[Option], gpu: Gpu) -> tuple[str, str]:
    """LoRA, QLoRA or neither, and why; nothing if one of them is not among the options."""
    known = {option.name: option for option in options}
    if not {"LoRA", "QLoRA"} <= known.keys():
        return "", ""
    lora, qlora = known["LoRA"], known["QLoRA"]
    gib = {name: f"{expected(known[name].planned, gpu) / GIB:.1f}" for name in ("LoRA", "QLoRA")}
    wanted, length = lora.config.training.per_device_train_batch_size, lora.config.training.max_length
    if rows := lora.fits[gpu].rows:
        why = f"it fits, so nothing is lost to 4 bits; QLoRA would take {gib['QLoRA']} GiB, not {gib['LoRA']}"
        times = [step_seconds(option.config, option.planned, gpu) for option in (lora, qlora)]
        if times[0] and times[1]:
            why += f", and {times[1] / times[0] - 1:+.0%} time at {gpu.rates}"
        return "LoRA", why + _fewer(rows, wanted)
    if rows := qlora.fits[gpu].rows:
        why = f"LoRA does not fit with one row of {length} tokens (it takes {gib['LoRA']} GiB with {wanted})"
        return "QLoRA", why + _fewer(rows, wanted)
    if longest := qlora.fits[gpu].length:
        return "QLoRA", f"with rows of at most {longest} tokens: training.max_length={longest}"
    return "neither", "not even QLoRA with one short row fits; a smaller model (--models), or a larger card"


def _fewer(rows: int, wanted: int) -> str:
    if rows >= wanted:
        return ""
    told = "row" if rows == 1 else "rows"
    return f"; with {rows} {told} at once, not {wanted}: training.gradient_accumulation_steps makes up for it"


@dataclass(frozen=True)
class Sized:
    """A model, and what each of METHODS takes of it."""

    name: str
    parameters: int
    needs: dict[str, int]
    """Bytes reserved, by METHODS; one that cannot be planned is left out."""


def models(overrides: Sequence[str], gpu: Gpu, report: Callable[[str], None]) -> tuple[list[Sized], dict[str, str]]:
    """Every shipped model whose architecture is known, smallest first, of two alike the first; why some are not there.

    Args:
        overrides: of the runs.
        gpu: what they are planned for; its memory does not count.
        report: told what is done.

    Raises:
        UserError: nothing can be planned so.
    """
    files = {name: conf_dir() / "model" / f"{name}.yaml" for name in configs.options("model")}
    names = [name for name, file in files.items() if yaml.safe_load(file.read_text("utf-8")).get("architecture")]
    jobs = [
        (f"{name}, {method}", [f"model={name}", *words, *overrides], gpu, ())
        for name in names
        for method, words in METHODS.items()
    ]
    options, why = _at_once(jobs, report)
    if not options:
        raise UserError("\n".join(dict.fromkeys(why.values())))
    planned = {option.name: option.planned for option in options}
    found: dict[int, Sized] = {}
    for name in names:
        if of_it := {method: one for method in METHODS if (one := planned.get(f"{name}, {method}"))}:
            size = max(one.total - (one.trainable if one.trainable < one.total else 0) for one in of_it.values())
            found.setdefault(size, Sized(name, size, {method: one.peak for method, one in of_it.items()}))
    return sorted(found.values(), key=lambda one: one.parameters), why
