"""Simulate the statistics of `qlora-exp compare` on results whose truth is known: `nox -s statistics` (half an hour).

Prints the tables of docs/explanation/statistics.md: how often rows that do not differ are called different, how often
intervals cover the truth, how often true differences are found (all also with Satterthwaite's approximation, which was
used before), how often ties are settled with as many more seeds as it names, and what power is possible.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.special import gammainc, ndtr, ndtri, stdtr, stdtrit

from qlora_exp.results import stats

ALPHA = 1 - stats.LEVEL
SEEDS = (2, 3, 5, 10)
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class World:
    """What results vary with: standard deviations of the difference of two rows."""

    name: str
    seed: float
    item: float
    both: float
    """Of the interaction of seed and item."""
    heavy_tails: bool = False
    """Student's t with 3 degrees of freedom in the place of normal distributions."""
    spread: tuple[float, ...] = (1.0,)
    """Factors of `seed` and `both`, for the rows in turn."""
    scores: bool = False
    """0/1 scores in the place of losses that are weighted by tokens."""
    common: float = 1.0
    """Share of the seeds that all rows have."""


WORLDS = (
    World("seeds", 0.05, 0.05, 0.05),
    World("balanced", 0.03, 0.2, 0.1),
    World("items", 0.01, 0.3, 0.1),
    World("seed x item", 0.005, 0.02, 0.3),
    World("seeds, heavy tails", 0.05, 0.05, 0.05, heavy_tails=True),
    World("items, heavy tails", 0.01, 0.3, 0.1, heavy_tails=True),
    World("seeds, one row 10 times as much", 0.03, 0.1, 0.05, spread=(1, 10, *[1] * 100)),
    World("seeds, 1 to 8 times by row", 0.02, 0.1, 0.05, spread=(1, 2, 4, 8)),
    World("0/1 scores", 0.3, 1, 1, scores=True),
    World("rare 0/1 scores", 0.3, 1, 1, scores=True),
    World("seeds, none in common", 0.05, 0.05, 0.05, common=0),
    World("items, none in common", 0.01, 0.3, 0.1, common=0),
    World("seeds, half in common", 0.05, 0.05, 0.05, common=0.5),
)


def rows(world: World, shifts: Array, seeds: int, items: int, rng: np.random.Generator) -> list[stats.Items]:
    """Draw the results of rows whose true values differ by `shifts`."""

    def draw(*shape: int) -> Array:
        return rng.standard_t(3, shape) / 3**0.5 if world.heavy_tails else rng.standard_normal(shape)

    count = len(shifts)
    scale = np.resize(world.spread, count)[:, None, None] / 2**0.5
    values = (
        rng.normal(3, 1, items)
        + shifts[:, None, None]
        + scale * world.seed * draw(count, seeds, 1)
        + world.item / 2**0.5 * draw(count, 1, items)
        + scale * world.both * draw(count, seeds, items)
    )
    alike = rng.normal(0, world.seed, (count, seeds, 1))  # what a seed does to every row that has it
    alike[:, : round(world.common * seeds)] = alike[:1, : round(world.common * seeds)]
    values += alike
    weights = np.ones(items)
    if world.scores:
        values = (values > (5 if "rare" in world.name else 3)).astype(float)
    else:
        weights = np.clip(np.round(np.exp(rng.normal(4, 0.8, items))), 5, 400)
    return list(np.stack([values * weights, np.broadcast_to(weights, values.shape)], axis=-1))


def satterthwaite(ours: stats.Items, theirs: stats.Items) -> tuple[float, float]:
    """Return the p-value and half the width of the interval of what `compare` did before, for pairs of seeds."""
    each = stats.ratio(ours) - stats.ratio(theirs)
    weight, change = ours[0, :, 1], (ours[..., 0] - theirs[..., 0]).mean(axis=0)
    residual = change - change.sum() / weight.sum() * weight
    count, seeds = len(weight), len(each)
    of_items = count / (count - 1) * (residual**2).sum() / weight.sum() ** 2
    of_seeds = each.var(ddof=1) / seeds
    error = (of_items + of_seeds) ** 0.5
    if error == 0:
        return float(each.mean() == 0), 0.0
    freedom = error**4 / (of_seeds**2 / (seeds - 1) + of_items**2 / (count - 1))
    return float(2 * stdtr(freedom, -abs(each.mean()) / error)), float(stdtrit(freedom, 1 - ALPHA / 2) * error)


class Shares:
    """Shares of simulations in which something happened."""

    def __init__(self) -> None:
        self.counts: dict[str, list[float]] = {}

    def add(self, name: str, happened: float) -> None:
        """Count one simulation."""
        self.counts.setdefault(name, []).append(float(happened))

    def show(self, name: str) -> str:
        """Return a share; `-` if it was not simulated."""
        return f"{np.mean(self.counts[name]):.3f}" if name in self.counts else "-"


def study(world: World, count: int, seeds: int, items: int, repetitions: int) -> Shares:
    """Simulate comparisons of `count` rows with a baseline, and of all pairs."""
    rng = np.random.default_rng([count, seeds, items])
    common = round(world.common * seeds)
    shares = Shares()
    # About 80 % of tests would find this effect if all variances were known; 1.7: what unequal weights add.
    error = (world.seed**2 / seeds + 1.7 * (world.item**2 + world.both**2 / seeds) / items) ** 0.5
    effect = (float(ndtri(stats.POWER)) - float(ndtri(ALPHA / count / 2))) * error
    pairs = list(combinations(range(count + 1), 2))
    for _ in range(repetitions):
        measured = rows(world, np.zeros(count + 1), seeds, items, rng)
        for name, chosen in (("verdicts", pairs[:count]), ("letters", pairs)):
            level = ALPHA / len(chosen)
            differences = stats.moderated(
                [stats.difference_of_items(measured[a], measured[b], common) for a, b in chosen]
            )
            # No p-value is less than the normal distribution's.
            close = [each for each in differences if 2 * ndtr(-abs(each.value) / (each.error or 1)) < level]
            shares.add(f"{name} now", any(each.p < level for each in close))
            if world.common == 1:
                before = [satterthwaite(measured[a], measured[b]) for a, b in chosen]
                shares.add(f"{name} before", any(p < level for p, _ in before))
                if name == "verdicts":
                    covers = [abs(each.value) <= half for each, (_, half) in zip(differences, before, strict=True)]
                    shares.add("coverage before", float(np.mean(covers)))
            if name == "verdicts":
                covers = [each.p >= ALPHA for each in differences]
                shares.add("coverage now", float(np.mean(covers)))
        if world.scores:
            continue
        shifts = effect * np.array([0, *np.resize([1, -1], count)])
        measured = rows(world, shifts, seeds, items, rng)
        differences = stats.moderated([stats.difference_of_items(each, measured[0], common) for each in measured[1:]])
        now = stats.holm([each.p for each in differences])
        shares.add("power now", float(np.mean(np.array(now) < ALPHA)))
        if world.common == 1:
            before_p = stats.holm([satterthwaite(each, measured[0])[0] for each in measured[1:]])
            shares.add("power before", float(np.mean(np.array(before_p) < ALPHA)))
    return shares


def errors(repetitions: int) -> Iterator[str]:
    """Yield the lines of the first table."""
    columns = ("verdicts", "letters", "coverage", "power")
    yield "| what varies | rows | seeds | items | " + " | ".join(f"{name}: before, now" for name in columns) + " |"
    yield "|---|" + "---:|" * 7
    plans = [(world, 10, seeds, items) for world in WORLDS[:4] for seeds in SEEDS for items in (20, 100, 500)]
    plans += [(world, 10, seeds, 500 if world.scores else 100) for world in WORLDS[4:] for seeds in SEEDS]
    plans += [(world, count, seeds, 100) for count in (1, 49) for world in (WORLDS[0], WORLDS[2]) for seeds in SEEDS]
    for world, count, seeds, items in plans:
        shares = study(world, count, seeds, items, max(repetitions // 4, 1) if count > 10 else repetitions)
        cells = [f"{shares.show(f'{name} before')}, {shares.show(f'{name} now')}" for name in columns]
        yield f"| {world.name} | {count + 1} | {seeds} | {items} | " + " | ".join(cells) + " |"


def settled(repetitions: int) -> Iterator[str]:
    """Yield the lines of the second table: what becomes of ties with as many more seeds as `compare` names."""
    yield "| true difference | seeds | ties | with a number of seeds | median number | settled by it |"
    yield "|" + "---:|" * 6
    world, items, level = World("", 0.06, 0.1, 0.1), 200, ALPHA / 10
    for effect in (0.2, 0.1, 0.06, 0.03, 0.0):
        for seeds in (3, 5):
            rng = np.random.default_rng([seeds, round(1000 * effect)])
            named, done, tied = [], [], 0
            for _ in range(repetitions):
                many = seeds + stats.MANY_SEEDS
                ours, theirs = rows(world, np.array([effect, 0.0]), many, items, rng)
                first = stats.difference_of_items(ours[:seeds], theirs[:seeds])
                if first.p < level:
                    continue
                tied += 1
                if more := stats.seeds_to_settle(first, level):
                    named.append(more)
                    later = stats.difference_of_items(ours[: seeds + more], theirs[: seeds + more])
                    done.append(later.p < level)
            share = f"{np.mean(done):.2f}" if done else "-"
            median = f"{np.median(named):.0f}" if named else "-"
            yield f"| {effect} | {seeds} | {tied} | {len(named)} | {median} | {share} |"


def best_power(seeds: int, share: float) -> float:
    """Return the most power that any test can have for one of ten rows whose variance over seeds is not known.

    A linear program over all tests (the probability to reject, by the difference and the estimated variance over
    seeds): the most power where that variance is `share` times that over many items, with errors of at most the level
    at every variance. The true difference is one that 80 % of tests would find if the variances were known.
    """
    freedom, level = seeds - 1, ALPHA / 10
    edges = np.concatenate([[0], 10.0 ** np.arange(-6, 7.01, 0.15), [np.inf]])
    distances = np.concatenate([[0], np.arange(1, 8, 0.15), 10.0 ** np.arange(0.91, 4.5, 0.1), [np.inf]])

    def chances(variance: float, effect: float = 0.0) -> Array:
        error = (1 + variance) ** 0.5
        estimates = np.diff(gammainc(freedom / 2, np.minimum(edges / variance * freedom / 2, 1e300)))
        found = np.diff(ndtr(distances / error - effect) - ndtr(-distances / error - effect))
        return np.outer(estimates, found).ravel()

    limits = np.array([chances(variance) for variance in 10.0 ** np.arange(-2, 6.1, 0.2)]) / level
    effect = float(ndtri(stats.POWER) - ndtri(level / 2))
    solution = linprog(-chances(share, effect), A_ub=limits, b_ub=np.ones(len(limits)), bounds=(0, 1), method="highs")
    return -float(solution.fun)


def bounds() -> Iterator[str]:
    """Yield the lines of the third table: what power is possible for a row whatever the others are like."""
    yield "| seeds | variance over seeds / over items | most power of any test |"
    yield "|---:|---:|---:|"
    for seeds in (2, 3, 5):
        for share in (0.01, 0.07):
            yield f"| {seeds} | {share} | {best_power(seeds, share):.2f} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repetitions",
        type=int,
        default=500,
        help="simulated comparisons for each line (a quarter of it with 50 rows)",
    )
    repetitions = parser.parse_args().repetitions
    for table in (errors(repetitions), settled(repetitions), bounds()):
        for line in table:
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
