"""Advise what fits a GPU: which methods, the largest batch, the longest rows, the largest model.

Every answer comes from planning many runs, not from a formula or a table of experience. This module does not read past
runs, and it imports heavy libraries only when it starts to plan.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING

import yaml

from qlora_exp.config import hydra_compose as configs
from qlora_exp.config.conf_folder import conf_dir
from qlora_exp.config.hydra_compose import compose, grid
from qlora_exp.config.schema import Config
from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.config.validate import from_dict
from qlora_exp.models import files
from qlora_exp.planning.fit import room
from qlora_exp.planning.gpus import Gpu
from qlora_exp.utils.errors import ConfigError, UserError
from qlora_exp.utils.processes import workers

if TYPE_CHECKING:
    from qlora_exp.planning.planner import Planner, Prediction

CARDS = (4, 6, 8, 12, 16, 24, 40, 48, 80)
"""Memory sizes of GPUs on the market, in GiB."""
GPUS = (2, 4, 8)
"""Numbers of GPUs to try for what does not fit on one."""
LENGTH_STEP = 64
MOST_ROWS = 1024
MOST_TOKENS = 131_072
"""Longest row to consider, in tokens, for models that declare no `max_position_embeddings`."""
METHODS = {
    "full, float32": ["method=full", "model.dtype=float32", "training.bf16=false", "training.fp16=false"],
    "full, bfloat16": ["method=full", "model.dtype=bfloat16"],
    "LoRA": ["method=lora"],
    "DoRA": ["method=lora", "lora_variant=dora"],
    "QLoRA": ["method=qlora"],
}
"""Methods that are compared if the user names none, with the overrides that select each."""
_APART = {word.split("=")[0] for words in METHODS.values() for word in words} | {"quantization"}
"""Config keys that differ between METHODS."""
_START = "fork" if sys.platform == "linux" else "spawn"  # on other systems the libraries do not survive a fork


@dataclass(frozen=True)
class Fit:
    """The largest batch and the longest row that an option can train with on one GPU."""

    rows: int
    """The largest batch of rows of `max_length` tokens; 0: not even one row fits."""
    length: int
    """Tokens of the longest row in a batch of one, a multiple of LENGTH_STEP; 0: no row fits."""
    gpus: int = 1
    """Number of such GPUs that train a row of `max_length` each with distributed=fsdp; 0: more than GPUS."""


@dataclass(frozen=True)
class Option:
    """One way to train, planned for one kind of GPU."""

    name: str
    config: Config
    planned: "Prediction"
    """For the configured batch size and row length."""
    fits: dict[Gpu, Fit]


def cards(gpu: Gpu) -> list[Gpu]:
    """Return `[gpu]`, or, if its memory is not given, one GPU of each size in CARDS."""
    return [gpu] if gpu.memory_gib else [replace(gpu, memory_gib=size) for size in CARDS]


def check(overrides: Sequence[str], models: bool) -> None:
    """Check that the overrides can be advised on, before anything slow is imported.

    Raises:
        ConfigError: they cannot; the message gives the reason.
        ModelError: there is no such folder.
    """
    keys = {word.split("=")[0].lstrip("+~") for word in overrides}
    if models and keys & {"model", "model.model_name_or_path", "method"}:
        raise ConfigError("advise --models tries every model with every method: leave out model= and method=")
    jobs = grid(overrides)
    if "method" not in keys:
        if compared := ", ".join(sorted(keys & _APART)):
            raise ConfigError(
                f"advise sets {compared} itself to compare methods; to set it, name the methods too: method=lora,qlora"
            )
        if len(jobs) > 1:
            raise ConfigError("advise accepts lists of values only if the methods are named: method=lora,qlora")
    for words in jobs:
        config = compose(words)
        files.check_place(config.model.model_name_or_path)
        if config.device not in ("auto", "cuda"):
            raise ConfigError("advise is about GPUs: leave out device=. To plan a CPU run: `qlora-exp plan device=cpu`")


def options(
    overrides: Sequence[str], gpu: Gpu, cards: Sequence[Gpu], report: Callable[[str], None]
) -> tuple[list[Option], dict[str, str]]:
    """Plan the requested ways to train, or METHODS if no method is named.

    Args:
        overrides: config overrides of the runs.
        gpu: the GPU that the runs are planned for; its memory size is not used.
        cards: the GPUs on which to find the largest batch and the longest row of each option.
        report: called with a progress message after each option.

    Returns:
        The options, and for each option that cannot be planned its name and the reason.

    Raises:
        UserError: no option can be planned.
    """
    if any(word.startswith("method=") for word in overrides):
        jobs = grid(overrides)
        common = set.intersection(*map(set, jobs)) - {word for word in overrides if word.startswith("method=")}
        named = {" ".join(word for word in job if word not in common): job for job in jobs}
    else:
        named = {name: [*words, *overrides] for name, words in METHODS.items()}
    planned, why = _plan_in_parallel([(name, words, gpu, cards) for name, words in named.items()], report)
    if not planned:
        raise UserError("\n".join(dict.fromkeys(why.values())))
    return planned, why


def _plan_in_parallel(
    jobs: Sequence[tuple[str, Sequence[str], Gpu, Sequence[Gpu]]], report: Callable[[str], None]
) -> tuple[list[Option], dict[str, str]]:
    """Plan options in parallel on all cores; return them, and by name the reason why others cannot be planned."""
    planned, why = [], {}
    with workers.workers(len(jobs), _START) as pool:
        waiting = [pool.submit(_option, *job) for job in jobs]
        for number, (job, future) in enumerate(zip(jobs, waiting, strict=True), start=1):
            try:
                planned.append(workers.result(future))
            except UserError as error:
                why[job[0]] = str(error)
            report(f"{number} of {len(jobs)}")
    return planned, why


def _option(name: str, words: Sequence[str], gpu: Gpu, cards: Sequence[Gpu]) -> Option:
    """Plan one option, and find its largest batch and longest row on each GPU."""
    from qlora_exp.planning.planner import planner

    config = compose(words)
    plans = planner(config, gpu.device)
    planned = plans.predict()
    return Option(name, config, planned, _fits(config, planned, plans, cards))


def _fits(config: Config, planned: "Prediction", plans: "Planner", cards: Sequence[Gpu]) -> dict[Gpu, Fit]:
    configured, length = config.training.per_device_train_batch_size, config.training.max_length
    most = (plans.positions or MOST_TOKENS) // LENGTH_STEP

    @cache
    def of_rows(rows: int) -> int:
        return planned.peak if rows == configured else plans.predict(rows, length, evaluated=0).peak

    @cache
    def of_length(steps: int) -> int:
        tokens = LENGTH_STEP * steps
        return of_rows(1) if tokens == length else plans.predict(1, tokens, evaluated=0).peak

    @cache
    def shared_by(count: int) -> float:
        if config.training.activation_offloading or config.training.tiled_mlp:
            return math.inf  # such runs are refused
        try:
            return (
                plans.over(DistributedConfig(engine="fsdp", num_processes=count)).predict(1, length, evaluated=0).peak
            )
        except UserError:  # what cannot be shared out needs a larger GPU
            return math.inf

    fits = {}
    for card in cards:
        within = room(card, ranks=planned.ranks)
        rows = largest(of_rows, within, MOST_ROWS, configured)
        longest = LENGTH_STEP * largest(of_length, within, most, length // LENGTH_STEP)
        tried = (count for count in GPUS if count > planned.ranks)
        several = (count for count in tried if shared_by(count) <= room(card, ranks=count))
        fits[card] = Fit(rows, longest, planned.ranks if rows else next(several, 0))
    return fits


def largest(need: Callable[[int], float], room: float, most: int, start: int) -> int:
    """Return the largest count up to `most` whose need is within `room`; 0 if there is none.

    Needs grow nearly in proportion to the count, so each next guess is the point where the line through two needs
    reaches `room`.

    Args:
        need: computes the need of a count; called as rarely as possible, because each call plans a run.
        room: the largest allowed need.
        most: the largest count to try.
        start: a count whose need is already computed. The search begins with it and with 1.
    """
    start = max(1, min(start, most))
    starts = [count for count in {1, start} if most > 0 and need(count) <= room]
    if not starts:
        return 0
    low = max(starts)
    high = most + 1 if low == start else start
    slope = (need(start) - need(1)) / (start - 1) if start > 1 else 0.0
    while high - low > 1:
        ahead = int((room - need(low)) / slope) if slope > 0 else low
        guess = min(max(low + ahead, low + 1), high - 1)
        slope = (need(guess) - need(low)) / (guess - low)
        low, high = (guess, high) if need(guess) <= room else (low, guess)
    return low


def remedies(config: Config, gpu: Gpu) -> list[str]:
    """Return up to two changes with which a run that does not fit would fit, as words of the command line.

    They keep the rows of a step: smaller batches, recomputation, 4-bit weights of the base, or some of these together.
    Shorter rows are named only if none of these is enough. No more are looked for, as each is a few plans.
    """
    found: list[str] = []
    shorter: list[str] = []
    for words, changed in _with_less_memory(config, gpu):
        if len(found) == 2:
            break
        with suppress(UserError):  # it cannot be planned, or not be combined
            batches, longest = _reach(changed, gpu)
            if batches is not None:
                found.append(" ".join([*words, *batches]))
            elif longest:
                shorter.append(" ".join([*words, f"training.max_length={longest}"]))
    return found or shorter[:1]


def advice(found: Sequence[str]) -> str:
    """Return what `remedies` found as text."""
    if not found:
        return "no smaller batch, recomputation, 4-bit base or shorter row fits; `qlora-exp advise` compares models"
    return f"it would fit with {', or with '.join(found)}"


def _with_less_memory(config: Config, gpu: Gpu) -> Iterator[tuple[list[str], Config]]:
    """Yield a config with less and less memory, and the words that change it so.

    It is as it is; with attention that keeps no matrix of all pairs of tokens; with recomputation; on a base in 4 bits;
    on a GPU, with what saves the memory of long rows.
    """
    from qlora_exp.planning.planner import resolved_on

    changes: list[tuple[list[str], Config]] = [([], config)]
    if config.model.attn_implementation == "eager":
        fused = config.model.model_copy(update={"attn_implementation": "sdpa"})
        changes.append((["model.attn_implementation=sdpa"], config.model_copy(update={"model": fused})))
    if not (resolved_on(config, gpu.device).gradient_checkpointing or config.refusal("gradient_checkpointing")):
        recomputing = config.training.model_copy(update={"gradient_checkpointing": True})
        words, least = changes[-1]
        words = [*words, "training.gradient_checkpointing=true"]
        changes.append((words, least.model_copy(update={"training": recomputing})))
    yield from changes
    if config.method.peft_type == "LORA" and not config.quantization.quantized:
        stored = compose(["method=qlora"]).quantization
        with suppress(ConfigError):  # another setting does not go with it
            quantized = {"quantization": stored.model_dump()}
            changes = [
                ([f"quantization={stored.name}", *words], from_dict(changed.model_dump() | quantized))
                for words, changed in changes
            ]
            yield from changes
    if gpu.type == "cuda":
        words, least = changes[-1]
        keys = {"activation_offloading": True, "tiled_mlp": True}
        with suppress(ConfigError):
            values = least.model_dump()
            yield (
                [*words, *(f"training.{key}=true" for key in keys)],
                from_dict(values | {"training": values["training"] | keys}),
            )


def _reach(config: Config, gpu: Gpu) -> tuple[list[str] | None, int]:
    """Return words for the largest batches of the run's step that fit; if none do, the length of the rows that would.

    Raises:
        ConfigError: the run cannot be planned.
        ModelError: the architecture is not available locally.
    """
    from qlora_exp.planning.planner import Planner, resolved_on
    from qlora_exp.planning.tuning import fixed_rows

    resolved, most = resolved_on(config, gpu.device), config.training.max_length
    plans = Planner(config, resolved)
    rows, batches = resolved.per_device_train_batch_size, resolved.gradient_accumulation_steps
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    sizes = sizes[-1:] if fixed_rows(config, plans.has_router) else sizes
    shared = config.distributed
    within = room(gpu, ranks=1 if shared.engine == "none" else int(shared.num_processes))

    def need(size: int, length: int, evaluated: int | None = 0) -> int:
        divided = {"per_device_train_batch_size": size, "gradient_accumulation_steps": rows * batches // size}
        return plans.computing(**divided).predict(length=length, evaluated=evaluated).peak

    if fitting := [*takewhile(lambda size: need(size, most) <= within, sizes)]:
        size, evaluated = fitting[-1], config.training.per_device_eval_batch_size
        words = [f"training.per_device_train_batch_size={size}"] if size != rows else []
        words += [f"training.gradient_accumulation_steps={rows * batches // size}"] if words else []
        if need(size, most, None) > within and evaluated > size:
            fewer = config.training.model_copy(update={"per_device_eval_batch_size": size})
            plans = Planner(config.model_copy(update={"training": fewer}), resolved)
            words.append(f"training.per_device_eval_batch_size={size}")
        if need(size, most, None) <= within:
            return words, most
    steps = most // LENGTH_STEP
    return None, LENGTH_STEP * largest(lambda count: need(sizes[0], LENGTH_STEP * count), within, steps, steps)


@dataclass(frozen=True)
class Sized:
    """A model, and the memory that each of METHODS needs to train it."""

    name: str
    parameters: int
    needs: dict[str, int]
    """Reserved bytes by name of the method; a method that cannot be planned is left out."""
    ranks: int = 1
    """Number of GPUs that share the run, each of which needs that."""


def models(overrides: Sequence[str], gpu: Gpu, report: Callable[[str], None]) -> tuple[list[Sized], dict[str, str]]:
    """Plan each of METHODS for each shipped model whose config file describes its architecture.

    Args:
        overrides: config overrides of the runs.
        gpu: the GPU that the runs are planned for; its memory size is not used.
        report: called with a progress message after each plan.

    Returns:
        The models, smallest first (of models with equal parameter counts only the first), and by name of model and
        method the reason why a plan is missing.

    Raises:
        UserError: nothing can be planned.
    """
    files = {name: conf_dir() / "model" / f"{name}.yaml" for name in configs.options("model")}
    names = [name for name, file in files.items() if yaml.safe_load(file.read_text("utf-8")).get("architecture")]
    jobs = [
        (f"{name}, {method}", [f"model={name}", *words, *overrides], gpu, ())
        for name in names
        for method, words in METHODS.items()
    ]
    options, why = _plan_in_parallel(jobs, report)
    if not options:
        raise UserError("\n".join(dict.fromkeys(why.values())))
    planned = {option.name: option.planned for option in options}
    by_size: dict[int, Sized] = {}
    for name in names:
        if plans := {method: plan for method in METHODS if (plan := planned.get(f"{name}, {method}"))}:
            size = max(plan.total - (plan.trainable if plan.trainable < plan.total else 0) for plan in plans.values())
            ranks = max(plan.ranks for plan in plans.values())
            needs = {method: plan.peak for method, plan in plans.items()}
            by_size.setdefault(size, Sized(name, size, needs, ranks))
    return sorted(by_size.values(), key=lambda model: model.parameters), why
