"""What differences between configurations are worth: intervals, paired tests, ties. Pure arithmetic on arrays.

A result varies for two reasons: which seed trained it, and which held-out items it was scored on. Both are counted
wherever they were measured, as independent sources of variance with Welch-Satterthwaite degrees of freedom
(Satterthwaite 1946, doi:10.2307/3002019). Knows nothing of runs or metrics.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

Items = np.ndarray[Any, np.dtype[np.float64]]
"""(seeds, items, 2): each held-out item's numerator (nats, a score) and weight (tokens, 1). A value is their ratio."""

LEVEL = 0.95
MANY_SEEDS = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval at 95 percent."""

    value: float
    low: float
    high: float
    seeds: int
    """One: the interval, if there is one, is of the items alone."""


@dataclass(frozen=True)
class Difference:
    """How a configuration differs from another on the same items and, as far as there are any, the same seeds."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided; 1 if nothing at all was measured twice."""
    seeds: int
    items: int
    variance_of_seeds: float
    """Of one seed's difference; NaN if there is one only."""
    variance_of_items: float
    """Of the mean over the items; NaN if items were not recorded."""


def mean(values: Sequence[float]) -> Estimate:
    """The mean over seeds with Student's interval; without an interval (NaN) if there is one seed."""
    array = np.asarray(values, float)
    half = math.nan
    if len(array) > 1:
        half = quantile(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
    value = float(array.mean())
    return Estimate(value, value - half, value + half, len(array))


def ratio(items: Items) -> Items:
    """(seeds,): each seed's value over all items."""
    found: Items = items[..., 0].sum(axis=1) / items[..., 1].sum(axis=1)
    return found


def difference_of_items(ours: Items, theirs: Items) -> Difference:
    """Ours minus theirs, paired by seed and by item.

    Args:
        ours: (seeds, items, 2).
        theirs: the same shape, with the same weights.
    """
    each = ratio(ours) - ratio(theirs)
    # Seeds are averaged first, so that what is left varies with the items; a ratio's variance is that of its residuals.
    weight = ours[..., 1].mean(axis=0)
    change = (ours[..., 0] - theirs[..., 0]).mean(axis=0)
    count = len(weight)
    residual = change - change.sum() / weight.sum() * weight
    of_items = float(count / (count - 1) * (residual**2).sum() / weight.sum() ** 2) if count > 1 else math.nan
    return _judged(each, of_items, count)


def difference_of_seeds(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Ours minus theirs, paired by seed, where items were not recorded."""
    return _judged(np.asarray(ours, float) - np.asarray(theirs, float), math.nan, 0)


def _judged(each: Items, of_items: float, count: int) -> Difference:
    value, seeds = float(each.mean()), len(each)
    of_seeds = float(each.var(ddof=1)) if seeds > 1 else math.nan
    variance, freedom = _combined(of_seeds, seeds, of_items, count)
    if math.isnan(variance):
        return Difference(value, math.nan, math.nan, 1.0, seeds, count, of_seeds, of_items)
    if variance == 0:  # not one seed or item differs from another
        return Difference(value, value, value, float(value == 0), seeds, count, of_seeds, of_items)
    error = math.sqrt(variance)
    half = quantile(freedom) * error
    p = float(2 * student.sf(abs(value) / error, freedom))
    return Difference(value, value - half, value + half, p, seeds, count, of_seeds, of_items)


def _combined(of_seeds: float, seeds: int, of_items: float, items: int) -> tuple[float, float]:
    """The variance of a mean difference, and its degrees of freedom; NaN if neither source was measured."""
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
    """Of Student's t: half the width of an interval of `LEVEL`, in standard errors."""
    return float(student.ppf((1 + LEVEL) / 2, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for how many there are (Holm 1979): below 0.05 together only with 5 percent if none is real."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def seeds_to_settle(found: Difference) -> int | None:
    """How many more seeds would tell this difference from none, if it and its variances stay as they are.

    None if no number would, up to 1,000: the held-out items are too few, or there is one seed only.
    """
    if math.isnan(found.variance_of_seeds) or found.value == 0:
        return None
    for seeds in range(found.seeds, MANY_SEEDS):
        variance, freedom = _combined(found.variance_of_seeds, seeds, found.variance_of_items, found.items)
        if variance == 0 or abs(found.value) > quantile(freedom) * math.sqrt(variance):
            return seeds - found.seeds
    return None


def groups_of_ties(order: Sequence[int], differ: Sequence[Sequence[bool]]) -> list[str]:
    """Letters for each of the configurations: two share one exactly if they were not told apart.

    A compact letter display by insertion and absorption (Piepho 2004, doi:10.1198/1061860043515).

    Args:
        order: configurations, best first: the best gets an `a`.
        differ: whether two of them were told apart; symmetric.
    """
    groups: list[set[int]] = [set(order)]
    for place, one in enumerate(order):
        for other in order[place + 1 :]:
            if differ[one][other]:
                split = [group for group in groups if {one, other} <= group]
                groups = [group for group in groups if group not in split]
                groups += [part for group in split for part in (group - {one}, group - {other})]
                groups = _without_subsets(groups)
    places = {one: place for place, one in enumerate(order)}
    groups.sort(key=lambda group: sorted(places[one] for one in group))
    return ["".join(letter(number) for number, group in enumerate(groups) if one in group) for one in range(len(order))]


def _without_subsets(groups: list[set[int]]) -> list[set[int]]:
    kept: list[set[int]] = []
    for group in sorted(groups, key=len, reverse=True):
        if not any(group <= other for other in kept):
            kept.append(group)
    return kept


def letter(number: int) -> str:
    """a, b, ..., z, a1, b1, ..."""
    return chr(ord("a") + number % 26) + (str(number // 26) if number >= 26 else "")
