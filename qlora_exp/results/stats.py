"""Judge differences between configurations statistically: confidence intervals, tests, groups of ties.

A result varies for two reasons: the seed it was trained with, and the held-out items it was scored on. The variance of
a difference is the sum of what these sources add, each estimated with its own degrees of freedom. Such differences are
tested by the Behrens-Fisher distribution (Fisher 1935, doi:10.1111/j.1469-1809.1935.tb02120.x). This test errs on the
safe side whatever the share of each source (Robinson 1976, Annals of Statistics 4, 963-971), also far in the tail,
where the p-values of many comparisons lie: few seeds do not borrow the many degrees of freedom of the items, as they do
in Satterthwaite's approximation. docs/explanation/statistics.md shows simulated errors. This module is arithmetic on
arrays: no runs, no metrics.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaincinv, ndtr, ndtri, roots_legendre, stdtr, stdtrit

Items = np.ndarray[Any, np.dtype[np.float64]]
"""Shape (seeds, items, 2): for each held-out item a numerator (nats, or a score) and a weight (tokens, or 1).

A value is numerator / weight; over several items, the sum of numerators / the sum of weights.
"""
Array = np.ndarray[Any, np.dtype[np.float64]]

LEVEL = 0.95
POWER = 0.8
MANY_SEEDS = 100
_LARGE = 5
"""With too few seeds, only differences of more standard deviations than this can be significant."""
_NODES = {1: 20, 2: 20, 3: 20, 4: 12}
"""Nodes of the numerical integration over each variance, by the number of sources: p-values are accurate to 0.1 %."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    seeds: int
    """Number of seeds. With one seed, an interval (if there is one) covers the variation over items only."""


@dataclass(frozen=True)
class Source:
    """What one source of chance adds to the variance of a difference, as estimated."""

    variance: float
    freedom: float
    """Degrees of freedom of the estimate."""
    over_seeds: bool
    """Whether it is the variance over seeds, which shrinks with more seeds, or over items."""
    limit: float = math.inf
    """Largest plausible ratio of the true variance to the estimate (see `moderated`)."""

    def after(self, more_seeds: int) -> "Source":
        """Return the source as it would be with more seeds of the same variance."""
        if not self.over_seeds:
            return self
        freedom = self.freedom + more_seeds
        return replace(self, variance=self.variance * (self.freedom + 1) / (freedom + 1), freedom=freedom)


@dataclass(frozen=True)
class Difference:
    """Difference between the means of two configurations."""

    value: float
    sources: tuple[Source, ...]
    """Sources of chance that could be estimated."""
    seeds: tuple[int, int]
    """Number of seeds of each configuration."""
    items: int
    """Number of held-out items that are paired; 0 if items were not recorded."""
    of_other_items: bool = False
    """Whether the two were measured on different held-out items, so that the difference is not tested."""

    @property
    def error(self) -> float:
        """Standard error; NaN if no source of chance could be estimated."""
        return math.sqrt(sum(source.variance for source in self.sources)) if self.sources else math.nan

    @property
    def constant(self) -> bool:
        """Whether every seed and every item has the same difference, but for rounding."""
        return self.error <= 1e-9 * abs(self.value)

    @cached_property
    def p(self) -> float:
        """Two-sided p-value; 1 if there is one seed and at most one item, so that no variance can be estimated."""
        if self.value == 0 or not self.sources:
            return 1.0
        if self.constant:  # the sign test
            return 2.0 ** -max(source.freedom for source in self.sources)
        return _tail(abs(self.value), self.sources)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval; NaN if no variance could be estimated."""
        half = 0.0 if self.constant else margin(self.sources, 1 - LEVEL) if self.sources else math.nan
        return self.value - half, self.value + half


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean over seeds with Student's t interval; the interval is NaN if there is only one seed."""
    array = np.asarray(values, float)
    half = math.nan
    if len(array) > 1:
        half = quantile(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
    value = float(array.mean())
    return Estimate(value, value - half, value + half, len(array))


def ratio(items: Items) -> Array:
    """Return the value of each seed over all items, shape (seeds,): sum of numerators / sum of weights."""
    values: Array = items[..., 0].sum(axis=1) / items[..., 1].sum(axis=1)
    return values


def difference_of_items(ours: Items, theirs: Items, common: int | None = None) -> Difference:
    """Return `ours` minus `theirs`, paired by item and, as far as the seeds are the same, by seed.

    Args:
        ours: shape (seeds, items, 2).
        theirs: the same items with the same weights; the number of seeds may differ.
        common: number of seeds, the first ones of both, that are the same. Default: all.
    """
    return difference_of_seeds(ratio(ours), ratio(theirs), common, (ours, theirs))


def difference_of_seeds(
    ours: Sequence[float] | Array,
    theirs: Sequence[float] | Array,
    common: int | None = None,
    items: tuple[Items, Items] | None = None,
) -> Difference:
    """Return the difference of the means over seeds, `ours` minus `theirs`.

    Args:
        ours: value of each seed.
        theirs: the same for the other configuration; the number of seeds may differ.
        common: number of seeds, the first ones of both, that are the same. Default: all.
        items: the same held-out items of both, of all seeds or of those whose items were recorded.
    """
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    common = len(ours) if common is None else common
    complete = items and (len(items[0]), len(items[1])) == (len(ours), len(theirs))
    sources = _over_seeds(ours, theirs, common, items if complete else None) + (_over_items(*items) if items else [])
    value = float(ours.mean() - theirs.mean())
    return Difference(value, tuple(sources), (len(ours), len(theirs)), items[0].shape[1] if items else 0)


def moderated(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences with limits to how much each may vary over seeds, from how much the others vary.

    With few seeds an estimate may by chance be much too small, so a test of one difference alone must allow for any
    true variance. Here the standard deviation over seeds is taken to be at most 3 times (with 2 seeds 20, with 3 seeds
    5 times) the larger one of its estimate and the mean of the other differences. So wide a limit keeps errors below
    5 % even if one configuration varies 100 times as much as the others, and lets few seeds find more where items
    matter most.
    """
    own = [
        sum(source.variance * (source.freedom + 1) for source in each.sources if source.over_seeds)
        for each in differences
    ]
    measured = [each for each in own if each > 0]
    if len(measured) < 2:
        return list(differences)
    limited = []
    for each, variance in zip(differences, own, strict=True):
        others = (sum(measured) - variance) / (len(measured) - 1)
        sources = [
            replace(source, limit=max(3.0, 20 / source.freedom**2) ** 2 * max(1.0, others / variance))
            if source.over_seeds and variance > 0
            else source
            for source in each.sources
        ]
        limited.append(replace(each, sources=tuple(sources)))
    return limited


def _over_seeds(ours: Array, theirs: Array, common: int, items: tuple[Items, Items] | None) -> list[Source]:
    """Estimate what seeds add: pairs by their differences, other seeds as independent samples (as Welch's test)."""
    mine, other = (each[..., 0] / each[..., 1].sum(axis=1, keepdims=True) for each in items) if items else (None, None)
    sources = []
    if 2 * common <= min(len(ours), len(theirs)) + 1:
        common = 0  # too few pairs to estimate a variance of their own
    else:
        pairs = ours[:common] / len(ours) - theirs[:common] / len(theirs)
        shares = None
        if mine is not None and other is not None:
            shares = mine[:common] / len(ours) - other[:common] / len(theirs)
        sources.append(Source(common * _variance(pairs, shares), common - 1, True))
    for values, shares, others in ((ours, mine, len(theirs)), (theirs, other, len(ours))):
        if len(values) > max(common, 1):
            variance = (len(values) - common) / len(values) ** 2 * _variance(values, shares)
            if others == 1:  # it is taken to vary as much (Crawford and Howell 1998)
                variance *= 1 + len(values)
            sources.append(Source(variance, len(values) - 1, True))
    return sources


def _variance(values: Array, shares: Array | None) -> float:
    """Return the variance over seeds, of values that are the sums of `shares`, of shape (seeds, items)."""
    variance = float(values.var(ddof=1))
    if shares is not None and variance <= 1e-18 * float((values**2).max()):
        # Few scores have the same sum by chance: what single items vary with the seed adds at least this much.
        variance = float(shares.var(axis=0, ddof=1).sum())
    return variance


def _over_items(ours: Items, theirs: Items) -> list[Source]:
    """Estimate what items add, by the jackknife of the ratio; empty if there are not two items with a weight.

    The degrees of freedom are the effective number of items (Kish 1965) minus 1, without items that nothing changed:
    of 0/1 scores only those that differ say something (as in McNemar's test).
    """
    weighted = ours[0, :, 1] > 0
    weight = ours[0, weighted, 1]
    if len(weight) < 2:
        return []
    # Average over seeds first, so that the rest varies with the items only.
    change = ours[:, weighted, 0].mean(axis=0) - theirs[:, weighted, 0].mean(axis=0)
    share = weight / weight.sum()
    residual = (change - change.sum() * share) / weight.sum() / (1 - share)
    variance = (len(weight) - 1) / len(weight) * float((residual**2).sum())
    counted = weight[change != 0]
    effective = counted.sum() ** 2 / (counted**2).sum() if counted.any() else 1.0
    return [Source(variance, max(1.0, float(effective) - 1), False)]


@lru_cache(maxsize=1000)
def _ratios(freedom: float, nodes: int) -> tuple[Array, Array]:
    """Return values of true variance / estimated variance, and their weights."""
    points, weights = roots_legendre(nodes)
    points = (points + 1) / 2  # to the fourth power: many near 0, because estimates that are far too small matter most
    return freedom / 2 / gammaincinv(freedom / 2, points**4), 2 * weights * points**3


def _tail(distance: float, sources: Sequence[Source]) -> float:
    """Return the probability of a difference at least as large if there is none (Behrens-Fisher, two-sided)."""
    sources = [source for source in sources if source.variance > 0]
    if len(sources) == 1 and math.isinf(sources[0].limit):
        return float(2 * stdtr(sources[0].freedom, -distance / math.sqrt(sources[0].variance)))
    variance, weight = np.zeros(1), np.ones(1)
    for source in sources:
        ratios, weights = _ratios(source.freedom, _NODES[len(sources)])
        variance = np.add.outer(variance, source.variance * np.minimum(ratios, source.limit)).ravel()
        weight = np.multiply.outer(weight, weights).ravel()
    return min(1.0, float(2 * weight @ ndtr(-distance / np.sqrt(variance))))


def margin(sources: Sequence[Source], alpha: float) -> float:
    """Return the smallest difference that is significant at level `alpha`."""
    error = math.sqrt(sum(source.variance for source in sources))
    least = -float(ndtri(alpha / 2)) * error
    most = max(float(stdtrit(source.freedom, 1 - alpha / 2)) for source in sources) * error
    return float(brentq(lambda distance: _tail(distance, sources) - alpha, least / 2, most * 2, rtol=1e-9))


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


def seeds_to_settle(difference: Difference, alpha: float) -> int | None:
    """Return how many more seeds would make a difference significant at level `alpha` with 80 % probability.

    The probability is that of the data at hand (predictive power: Spiegelhalter, Freedman and Blackburn 1986): it knows
    that both the difference and the variance over seeds were estimated, and that the held-out items remain the same.
    None if up to 100 seeds would not suffice, or if the variance over seeds is not known of both configurations.
    """
    over_seeds = [source for source in difference.sources if source.over_seeds]
    if min(difference.seeds) < 2 or difference.constant:
        return None
    # One source in the place of several, with the freedom of the least.
    variance, freedom = sum(source.variance for source in over_seeds), min(source.freedom for source in over_seeds)
    if variance == 0:
        return None
    seeds = Source(variance, freedom, True, max(source.limit for source in over_seeds))
    others = [source for source in difference.sources if not source.over_seeds]
    quantiles = (np.arange(10) + 0.5) / 10
    ratios = np.minimum(seeds.freedom / 2 / gammaincinv(seeds.freedom / 2, quantiles), seeds.limit)

    def settled(more: int) -> bool:
        probability = 0.0
        for true in ratios:
            estimated = (seeds.freedom + more * true) / (seeds.freedom + more)
            later = replace(seeds.after(more), variance=seeds.after(more).variance * estimated)
            needed = margin([later, *others], alpha)
            change = math.sqrt(true * (seeds.variance - seeds.after(more).variance))
            beyond = (np.array([1, -1]) * difference.value - needed) / change
            probability += float(ndtr(beyond).sum()) / len(ratios)
        return probability >= POWER

    counts = range(1, MANY_SEEDS + 1)
    return bisect_left(counts, True, key=settled) + 1 if settled(MANY_SEEDS) else None


def detectable(difference: Difference, alpha: float) -> float:
    """Return the smallest true difference that these runs would show at level `alpha` with 80 % power."""
    return margin(difference.sources, alpha) + float(ndtri(POWER)) * difference.error


def seeds_needed(comparisons: int) -> int:
    """Return how many seeds can carry a verdict if seeds are what varies: see `spread_needed`."""
    return next(seeds for seeds in range(2, MANY_SEEDS) if spread_needed(seeds, comparisons) <= _LARGE)


def spread_needed(seeds: int, comparisons: int) -> float:
    """Return the smallest significant difference, in standard deviations of the difference of a single seed."""
    return float(stdtrit(seeds - 1, 1 - (1 - LEVEL) / 2 / comparisons)) / math.sqrt(seeds)


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
