"""Judge differences between configurations statistically: confidence intervals, paired tests, groups of ties.

A result varies for two reasons: the seed it was trained with, and the held-out items it was scored on. Each source is
counted where it was measured. They are independent sources of variance, combined with Welch-Satterthwaite degrees of
freedom (Satterthwaite 1946, doi:10.2307/3002019). This module is arithmetic on arrays: no runs, no metrics.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

Items = np.ndarray[Any, np.dtype[np.float64]]
"""Shape (seeds, items, 2): for each held-out item a numerator (nats, or a score) and a weight (tokens, or 1).

A value is numerator / weight; over several items, the sum of numerators / the sum of weights.
"""

LEVEL = 0.95
MANY_SEEDS = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    seeds: int
    """Number of seeds. With one seed, an interval (if there is one) covers the variation over items only."""


@dataclass(frozen=True)
class Difference:
    """Difference between two configurations, on the same items and, where they have common seeds, the same seeds."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided p-value; 1 if there is one seed and at most one item, so that no variance can be estimated."""
    seeds: int
    items: int
    variance_of_seeds: float
    """Variance of the difference of a single seed; NaN if there is only one seed."""
    variance_of_items: float
    """Variance of the mean over the items; NaN if items were not recorded."""


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean over seeds with Student's t interval; the interval is NaN if there is only one seed."""
    array = np.asarray(values, float)
    half = math.nan
    if len(array) > 1:
        half = quantile(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
    value = float(array.mean())
    return Estimate(value, value - half, value + half, len(array))


def ratio(items: Items) -> Items:
    """Return the value of each seed over all items, shape (seeds,): sum of numerators / sum of weights."""
    values: Items = items[..., 0].sum(axis=1) / items[..., 1].sum(axis=1)
    return values


def difference_of_items(ours: Items, theirs: Items) -> Difference:
    """Return `ours` minus `theirs`, paired by seed and by item.

    Args:
        ours: shape (seeds, items, 2).
        theirs: same shape, with the same weights.
    """
    each = ratio(ours) - ratio(theirs)
    # Average over seeds first, so that the rest varies with the items only. The variance of a ratio is the variance of
    # its residuals.
    weight = ours[..., 1].mean(axis=0)
    change = (ours[..., 0] - theirs[..., 0]).mean(axis=0)
    count = len(weight)
    residual = change - change.sum() / weight.sum() * weight
    of_items = float(count / (count - 1) * (residual**2).sum() / weight.sum() ** 2) if count > 1 else math.nan
    return _difference(each, of_items, count)


def difference_of_seeds(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Return `ours` minus `theirs`, paired by seed, for runs whose items were not recorded."""
    return _difference(np.asarray(ours, float) - np.asarray(theirs, float), math.nan, 0)


def _difference(differences: Items, of_items: float, item_count: int) -> Difference:
    value, seeds = float(differences.mean()), len(differences)
    of_seeds = float(differences.var(ddof=1)) if seeds > 1 else math.nan
    variance, freedom = _combined(of_seeds, seeds, of_items, item_count)
    if math.isnan(variance):
        return Difference(value, math.nan, math.nan, 1.0, seeds, item_count, of_seeds, of_items)
    if variance == 0:  # all seeds and all items have the same difference
        return Difference(value, value, value, float(value == 0), seeds, item_count, of_seeds, of_items)
    error = math.sqrt(variance)
    half = quantile(freedom) * error
    p = float(2 * stdtr(freedom, -abs(value) / error))
    return Difference(value, value - half, value + half, p, seeds, item_count, of_seeds, of_items)


def _combined(of_seeds: float, seeds: int, of_items: float, items: int) -> tuple[float, float]:
    """Return the variance of a mean difference and its degrees of freedom; NaN if neither source was measured."""
    parts = []
    if not math.isnan(of_seeds):
        parts.append((of_seeds / seeds, seeds - 1))
    if not math.isnan(of_items):
        parts.append((of_items, items - 1))
    if not parts:
        return math.nan, math.nan
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0, math.nan
    return variance, variance**2 / sum(part**2 / freedom for part, freedom in parts)


def quantile(freedom: float) -> float:
    """Return the quantile of Student's t: half the width of the interval at `LEVEL`, in standard errors."""
    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979).

    If no difference is real, the probability that any adjusted p-value is below 0.05 is at most 5 %.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def seeds_to_settle(difference: Difference) -> int | None:
    """Return how many more seeds would make this difference significant, if it and its variances stay the same.

    None if up to 1,000 seeds would not suffice (too few held-out items), or if there is only one seed.
    """
    if math.isnan(difference.variance_of_seeds) or difference.value == 0:
        return None
    for seeds in range(difference.seeds, MANY_SEEDS):
        variance, freedom = _combined(
            difference.variance_of_seeds, seeds, difference.variance_of_items, difference.items
        )
        if variance == 0 or abs(difference.value) > quantile(freedom) * math.sqrt(variance):
            return seeds - difference.seeds
    return None


def groups_of_ties(order: Sequence[int], differ: Sequence[Sequence[bool]]) -> list[str]:
    """Return letters for each configuration: two share a letter exactly if no significant difference was found.

    This is a compact letter display by insertion and absorption (Piepho 2004, doi:10.1198/1061860043515).

    Args:
        order: indices of the configurations, best first: the best gets `a`.
        differ: whether two configurations differ significantly; symmetric.
    """
    groups: list[set[int]] = [set(order)]
    for place, configuration in enumerate(order):
        for other in order[place + 1 :]:
            if differ[configuration][other]:
                split = [group for group in groups if {configuration, other} <= group]
                groups = [group for group in groups if group not in split]
                groups += [part for group in split for part in (group - {configuration}, group - {other})]
                groups = _without_subsets(groups)
    places = {configuration: place for place, configuration in enumerate(order)}
    groups.sort(key=lambda group: sorted(places[configuration] for configuration in group))
    return [
        "".join(letter(number) for number, group in enumerate(groups) if configuration in group)
        for configuration in range(len(order))
    ]


def _without_subsets(groups: list[set[int]]) -> list[set[int]]:
    kept: list[set[int]] = []
    for group in sorted(groups, key=len, reverse=True):
        if not any(group <= other for other in kept):
            kept.append(group)
    return kept


def letter(number: int) -> str:
    """Return the letter of a group: a, b, ..., z, a1, b1, ..."""
    return chr(ord("a") + number % 26) + (str(number // 26) if number >= 26 else "")
