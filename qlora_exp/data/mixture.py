"""Mix the training rows of several sources: how many of each an epoch has, and in which order.

The numbers follow from the shares and the numbers of rows, so that no random draw decides how much of a source is
trained on. `datasets.interleave_datasets` draws, and names the same two ways to stop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_exp.config.sections.mixture import REPLAY, MixtureConfig
from qlora_exp.utils.errors import DataError

MOST_ROWS = 100_000_000
"""Largest number of rows in an epoch of a mixture."""


@dataclass(frozen=True)
class Portion:
    """How much of a source is trained on, and held out."""

    rows: int
    """Number of its training rows, each counted once."""
    trained: int
    """Number of rows from it in an epoch, with repetitions."""
    heldout: int
    """Number of rows to evaluate on."""

    @property
    def passes(self) -> float:
        """How often each row is trained on in an epoch, on average."""
        return self.trained / self.rows


def counts(rows: Mapping[str, int], config: MixtureConfig) -> dict[str, int]:
    """Return how many training rows of each source an epoch has.

    Args:
        rows: number of training rows of each source, at least 1; also of `REPLAY` if `config.replay` is set.
        config: says how they are mixed.

    Raises:
        DataError: a source would have no row in an epoch, or an epoch too many rows.
    """
    sources = {name: count for name, count in rows.items() if name != REPLAY}
    mixed = _mixed(sources, config)
    if config.replay is not None:
        mixed[REPLAY] = round(config.replay / (1 - config.replay) * sum(mixed.values()))
    if absent := [name for name, count in mixed.items() if not count]:
        raise DataError(
            f"dataset: an epoch of {sum(mixed.values())} rows would have no row of {absent[0]}, so small is its share; "
            "raise it, or add rows to the others (dataset.stopping=all_exhausted repeats them)"
        )
    if (total := sum(mixed.values())) > MOST_ROWS:
        most = max(mixed, key=lambda name: mixed[name] / rows[name])
        raise DataError(
            f"dataset: an epoch would have {total:,} rows, those of {most} {mixed[most] / rows[most]:,.0f} times; use "
            "dataset.stopping=first_exhausted or other weights"
        )
    return mixed


def _mixed(rows: Mapping[str, int], config: MixtureConfig) -> dict[str, int]:
    shares = config.weights
    if shares is None and config.mixing_temperature is not None:
        largest = max(rows.values())  # divided by it, no power overflows
        powers = {name: (count / largest) ** (1 / config.mixing_temperature) for name, count in rows.items()}
        shares = {name: power / sum(powers.values()) for name, power in powers.items()}
    if shares is None:
        return dict(rows)
    lengths = {name: count / shares[name] for name, count in rows.items()}  # of an epoch that has each row once
    if config.stopping == "all_exhausted":
        length = max(lengths.values())
        return {name: max(count, round(shares[name] * length)) for name, count in rows.items()}
    length = min(lengths.values())
    return {name: min(count, round(shares[name] * length)) for name, count in rows.items()}


def evenly(trained: Sequence[int]) -> np.ndarray:
    """Return the order of rows in which each source is spread evenly over an epoch, and keeps its own order.

    Args:
        trained: number of rows of each source; the rows of all are counted one source after another.

    Returns:
        Shape (sum of `trained`,): the number of the row at each place.
    """
    places = [(np.arange(count) + 0.5) / count for count in trained if count]
    return np.argsort(np.concatenate(places), kind="stable") if places else np.arange(0)


def epoch(rows: Sequence[int], trained: Sequence[int]) -> np.ndarray:
    """Return the rows of an epoch by number, in order; a source is repeated once all of its rows were seen.

    Args:
        rows: number of rows of each source; the rows of all are counted one source after another.
        trained: number of rows from each source in an epoch.
    """
    begins = np.cumsum([0, *rows[:-1]])
    numbers = [begin + np.arange(most) % count for begin, count, most in zip(begins, rows, trained, strict=True)]
    return np.concatenate(numbers)[evenly(trained)]


def line(portions: Mapping[str, Portion], tokens: Mapping[str, int]) -> str:
    """Say how many rows of each source an epoch has, how often each row occurs, and how much is learned from them.

    Args:
        portions: how much of each source is trained on.
        tokens: number of tokens of each source that carry loss. Long rows weigh more than their number says.
    """
    total, learned = sum(portion.trained for portion in portions.values()), sum(tokens.values())
    parts = [
        f"{name} {portion.trained:,} ({portion.trained / total:.1%} of rows, {tokens[name] / learned:.1%} of learned "
        f"tokens; {portion.passes:.3g} passes over {portion.rows:,} rows)"
        for name, portion in portions.items()
    ]
    return f"an epoch has {total:,} rows: {', '.join(parts)}"
