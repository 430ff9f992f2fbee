"""Advise what fits a GPU: which methods, the largest batch, the longest rows, the largest model.

Every answer comes from planning many runs, not from a formula or a table of experience. This module does not read past
runs, and it imports heavy libraries only when it starts to plan.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml

from qlora_exp.config import hydra_compose as configs
from qlora_exp.config.conf_folder import conf_dir
from qlora_exp.config.hydra_compose import compose, grid
from qlora_exp.config.schema import Config
from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.models import files
from qlora_exp.planning.fit import room
from qlora_exp.planning.gpus import Gpu
from qlora_exp.utils.errors import ConfigError, UserError
from qlora_exp.utils.processes import workers
from qlora_exp.utils.units import GIB

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
_BYTES = {"full, float32": 4.0, "full, bfloat16": 2.0, "LoRA": 2.0, "DoRA": 2.0, "QLoRA": 0.5}
"""Bytes of a weight of the base."""
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
    words: Sequence[str] = ()
    """Overrides of a command that trains so."""


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
    return Option(name, config, planned, _fits(config, planned, plans, cards), words)


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


@dataclass(frozen=True)
class Sized:
    """A model, and the memory that each of METHODS needs to train it."""

    name: str
    parameters: int
    needs: dict[str, int]
    """Reserved bytes by name of the method; a method that cannot be planned is left out."""
    ranks: int = 1
    """Number of GPUs that share the run, each of which needs that."""


def least_parameters(architecture: Mapping[str, Any]) -> int:
    """Return a number of parameters that a model has at least: embedding, two matrices of each MLP, and attention's."""
    text = architecture.get("text_config", architecture)
    hidden, layers = text.get("hidden_size", 0), text.get("num_hidden_layers", 0)
    heads = text.get("num_attention_heads", 0)
    queries = heads * (text.get("head_dim") or (hidden // heads if heads else 0))
    mlp = text.get("intermediate_size") or text.get("ffn_dim") or 0
    return int(hidden * (text.get("vocab_size", 0) + 2 * layers * (mlp + queries)))


def models(overrides: Sequence[str], gpu: Gpu, report: Callable[[str], None]) -> tuple[list[Sized], dict[str, str]]:
    """Plan each of METHODS for each shipped model whose config file describes its architecture.

    Models whose weights alone exceed the largest card are not planned.

    Args:
        overrides: config overrides of the runs.
        gpu: the GPU that the runs are planned for, or, if its memory is not given, each size of `cards`.
        report: called with a progress message after each plan.

    Returns:
        The models, smallest first (of models with equal parameter counts only the first), and by name of model and
        method the reason why a plan is missing.

    Raises:
        UserError: nothing can be planned.
    """
    files = {name: conf_dir() / "model" / f"{name}.yaml" for name in configs.options("model")}
    described = {name: yaml.safe_load(file.read_text("utf-8")).get("architecture") for name, file in files.items()}
    names = [name for name, architecture in described.items() if architecture]
    shared = any(word.startswith("distributed") for word in overrides)
    most = math.inf if shared else GIB * max(card.memory_gib for card in cards(gpu))
    jobs = [
        (f"{name}, {method}", [f"model={name}", *words, *overrides], gpu, ())
        for name in names
        for method, words in METHODS.items()
        if _BYTES[method] * least_parameters(described[name]) <= most
    ]
    if not jobs:
        raise UserError(f"the weights of the smallest model alone take more than {most / GIB:g} GiB")
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
