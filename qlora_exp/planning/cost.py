"""Compute hours and money of a run from the planned time of a step: how many steps it takes, at which price per hour.

Rows are counted as a run reads them, but never tokenized.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.dataset import REASONING_GYM, is_url, looks_local
from qlora_exp.planning.gpus import Gpu
from qlora_exp.utils.errors import ConfigError, UserError

HOW = "give --rows N (training rows of an epoch) or training.max_steps=N"
MOST_PRICE = 1e6


@dataclass(frozen=True)
class Amount:
    """How much a run trains."""

    steps: int
    """Optimizer steps."""
    examples: float
    """Training rows that all steps together see."""
    source: str
    """Where the number of rows or steps is from."""


@dataclass(frozen=True)
class Bill:
    """What a run takes on a card."""

    hours: float
    cost: float | None
    """In the currency of the price, for all cards of the run; None without a price."""
    per_thousand: float | None
    """Cost of 1,000 examples; None without a price."""


def prices(text: str | None, cards: Sequence[Gpu]) -> dict[str, float]:
    """Read `--price`: one price per hour for every card, or `NAME=PRICE,...`.

    Returns:
        Prices by name of the card; cards without a price are left out.

    Raises:
        ConfigError: a price is no number or negative, or belongs to a card that is not planned for.
    """
    if text is None:
        return {}
    names = [card.name for card in cards if card.type != "cpu" and card.tflops]
    if not names:
        raise ConfigError("--price needs the GPU's name, by which its speed is known: --gpu NAME --price PER_HOUR")
    if "=" not in text:
        return dict.fromkeys(names, _price(text, ""))
    found: dict[str, float] = {}
    for word in text.split(","):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            raise ConfigError(
                f"--price: '{word.strip()}' names no card; write NAME=PRICE for each, or one price for all"
            )
        if name not in names:
            raise ConfigError(f"--price {name}=...: not a card of --gpu {','.join(names)}")
        if name in found:
            raise ConfigError(f"--price: {name} is priced twice")
        found[name] = _price(value, f"{name}=")
    return found


def _price(text: str, of: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < MOST_PRICE:  # false for what is no number
        raise ConfigError(f"--price {of}{text}: not a price per hour, which is a number from 0")
    return value


def check_rows(rows: int | None, overrides: Iterable[str]) -> None:
    """Check the value of `--rows`.

    Raises:
        ConfigError: it is not positive, or the command names a number of steps too.
    """
    if rows is None:
        return
    if not 0 < rows < 10**12:
        raise ConfigError(f"--rows {rows}: not a number of training rows")
    for word in overrides:
        if word.startswith("training.max_steps=") and word != "training.max_steps=-1":
            raise ConfigError(f"--rows {rows}: {word} already says how long; leave one of them out")


def rows_of_step(config: Config) -> int:
    """Return the rows of an optimizer step, of all processes."""
    training = config.training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * processes(config)


def processes(config: Config) -> int:
    """Return the number of processes that share the run; 1 where it is `auto`, which cannot be planned."""
    shared = config.distributed
    return 1 if shared.engine == "none" or shared.num_processes == "auto" else int(shared.num_processes)


def steps_of(config: Config, rows: int) -> int:
    """Return the optimizer steps of the run's epochs over `rows` rows, as transformers' Trainer counts them."""
    training = config.training
    batches = _divided(_divided(rows, training.per_device_train_batch_size), processes(config))
    return math.ceil(training.num_train_epochs * _divided(batches, training.gradient_accumulation_steps))


def _divided(count: int, size: int) -> int:
    """Return into how many parts of `size` a count is divided, the last of which may be smaller."""
    return -(-count // size)


class Lengths:
    """Find how much runs train; rows of equal datasets are counted once."""

    def __init__(self, rows: int | None = None) -> None:
        """Take the value of `--rows`."""
        self._rows = rows
        self._counted: dict[str, tuple[int, str] | str] = {}

    def of(self, config: Config) -> Amount | str:
        """Return how much a run trains, or why that is not known and what to give."""
        steps, epochs = config.training.max_steps, config.training.num_train_epochs
        if steps > 0 and not self._rows:
            return Amount(steps, float(steps * rows_of_step(config)), "training.max_steps")
        aside = f", not training.max_steps={steps}" if steps > 0 else ""
        found = (self._rows, f"--rows{aside}") if self._rows else self._count(config)
        if isinstance(found, str):
            return found
        rows, source = found
        times = "" if epochs == 1 else f", {epochs:g} times"
        packed = (
            "; packing puts several into a sequence, so that there are fewer steps" if config.training.packing else ""
        )
        return Amount(steps_of(config, rows), rows * epochs, f"{rows:,} rows{times} ({source}){packed}")

    def _count(self, config: Config) -> tuple[int, str] | str:
        key = config.dataset.model_dump_json() + config.unrelated.model_dump_json()
        if key not in self._counted:
            self._counted[key] = count(config)
        return self._counted[key]


def count(config: Config) -> tuple[int, str] | str:
    """Count the training rows of an epoch if they are on this machine.

    Returns:
        The number and how it was counted, or why it is not known and what to give.
    """
    dataset = config.dataset
    if not all(map(_is_here, [*dataset.paths, *config.unrelated.paths])):
        if (most := dataset.max_train_rows) is not None and dataset.parts.keys() == {"dataset"}:
            return most, "dataset.max_train_rows, the most that it can be"
        return f"the rows are not on this machine, so they are not counted: {HOW}"
    from qlora_exp.data.reading.recognize import recognized
    from qlora_exp.data.rows import load_rows

    try:
        settled = recognized(config)
        rows = load_rows(settled.dataset, settled.unrelated)
    except UserError as error:
        return f"the rows cannot be counted ({error}): {HOW}"
    return len(rows.train if rows.order is None else rows.order), "counted: read, cleaned and split as a run does"


def _is_here(path: str) -> bool:
    return path.startswith(("embedded:", REASONING_GYM)) or (looks_local(path) and not is_url(path))


def bill(seconds: float, amount: Amount, price: float | None, cards: int = 1) -> Bill:
    """Return hours and cost of a run.

    Args:
        seconds: planned time of an optimizer step.
        amount: how much the run trains.
        price: price of one card per hour; None: unknown.
        cards: number of cards that share the run.
    """
    hours = seconds * amount.steps / 3600
    cost = None if price is None else price * cards * hours
    return Bill(hours, cost, None if cost is None else 1000 * cost / amount.examples)


def seconds_per_thousand(seconds: float, config: Config) -> float:
    """Return the time of 1,000 examples from that of a step, in seconds."""
    return 1000 * seconds / rows_of_step(config)


def total(bills: Sequence[Bill]) -> tuple[float, float | None]:
    """Return the hours and the cost of several runs; the cost is None unless all have one."""
    costs = [each.cost for each in bills if each.cost is not None]
    return sum(each.hours for each in bills), sum(costs) if len(costs) == len(bills) else None
