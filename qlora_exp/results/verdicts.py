"""Judge the rows of a comparison: each against the baseline, and all pairs.

Rows are compared by all runs that their means count: paired by seed where both have the seed, and by held-out item
where both were scored on the same rows. `stats` does the arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from qlora_exp.results import stats
from qlora_exp.results.row import Row

ALPHA = 1 - stats.LEVEL
NOT_TESTED = "not tested"
TIED = 100
"""With more rows than this, pairs are not tested: it would take long, and nobody could read that many letters."""


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a configuration with the baseline."""

    difference: stats.Difference
    p: float
    """P-value, adjusted for the number of comparisons (Holm)."""
    level: float
    """Level at which the next of the ties would be tested."""
    lower_is_better: bool

    @cached_property
    def text(self) -> str:
        """The verdict in words; computed when it is read, because of thousands of rows only some are shown."""
        return _text(self.difference, self.p, self.level, self.lower_is_better)


def verdicts(rows: Sequence[Row], baseline: Row, metric: str, lower_is_better: bool) -> dict[str, Verdict]:
    """Return the verdict on each row against the baseline, by row name."""
    others = [row for row in rows if row is not baseline]
    differences = stats.moderated([difference(row, baseline, metric) for row in others])
    adjusted = _adjusted(differences)
    # The level at which Holm's procedure tests the next of the ties.
    level = ALPHA / max(1, sum(p >= ALPHA and bool(d.sources) for p, d in zip(adjusted, differences, strict=True)))
    return {
        row.name: Verdict(each, p, level, lower_is_better)
        for row, each, p in zip(others, differences, adjusted, strict=True)
    }


def ties(rows: Sequence[Row], metric: str, lower_is_better: bool) -> dict[str, str]:
    """Test every pair (Holm) and return each row's letters of ties; empty if there are more than `TIED` rows.

    Rows that were scored on different held-out rows have no letter in common.
    """
    if len(rows) > TIED:
        return {}
    pairs = [(first, second) for first in range(len(rows)) for second in range(first)]
    differences = stats.moderated([difference(rows[first], rows[second], metric) for first, second in pairs])
    adjusted = _adjusted(differences)
    differ = [[False] * len(rows) for _ in rows]
    for (first, second), each, p in zip(pairs, differences, adjusted, strict=True):
        differ[first][second] = differ[second][first] = p < ALPHA or each.of_other_items
    means = [row.mean(f"after/{metric}") for row in rows]
    sign = 1 if lower_is_better else -1
    order = sorted(range(len(rows)), key=lambda index: sign * means[index].value)  # type: ignore[union-attr]
    letters = stats.groups_of_ties(order, differ)
    return {row.name: letter for row, letter in zip(rows, letters, strict=True)}


def _adjusted(differences: Sequence[stats.Difference]) -> list[float]:
    """Return p-values adjusted for the number of comparisons; what cannot be tested is none of them."""
    tested = iter(stats.holm([each.p for each in differences if each.sources]))
    return [next(tested) if each.sources else 1.0 for each in differences]


def too_few_seeds(judged: Mapping[str, Verdict]) -> str:
    """Say that ties had to be expected, because so many comparisons need more seeds; empty if there are enough."""
    tested = [verdict for verdict in judged.values() if not verdict.difference.of_other_items]
    tied = [verdict.difference.seeds for verdict in tested if verdict.p >= ALPHA]
    seeds = min((min(each) for each in tied if min(each) > 1), default=None)
    if seeds is None or seeds >= (enough := stats.seeds_needed(len(tested))):
        return ""
    some = ", as some rows have," if any(min(each) > seeds for each in tied) else ""
    now, then = (stats.spread_needed(count, len(tested)) for count in (seeds, enough))
    return (
        f"{seeds} seeds{some} are too few for {len(tested)} verdict{'s' * (len(tested) > 1)} where results vary with "
        f"the seed: a difference is significant only beyond {now:.0f} times the standard deviation over seeds; "
        f"with {enough} seeds, beyond {then:.1f} times."
    )


def difference(ours: Row, theirs: Row, metric: str) -> stats.Difference:
    """Compute the difference of two rows, from all their runs."""
    values = [
        {record.params["seed"]: record.metrics[f"after/{metric}"] for record in row.records} for row in (ours, theirs)
    ]
    (mine, rows), (other, other_rows) = _items(ours, metric), _items(theirs, metric)
    if rows and other_rows and rows != other_rows:
        means = [sum(each.values()) / len(each) for each in values]
        return stats.Difference(means[0] - means[1], (), (len(values[0]), len(values[1])), 0, of_other_items=True)
    common = values[0].keys() & values[1].keys()
    seeds = [sorted(each, key=lambda seed: (seed not in common, seed)) for each in values]
    items = [[each[seed] for seed in own if seed in each] for each, own in zip((mine, other), seeds, strict=True)]
    paired = None
    if all(items) and rows and rows == other_rows and _alike([*items[0], *items[1]]):
        paired = np.concatenate(items[0]), np.concatenate(items[1])
        if [len(each) for each in items] == [len(each) for each in seeds]:
            return stats.difference_of_items(*paired, len(common))
    our_values, their_values = ([each[seed] for seed in own] for each, own in zip(values, seeds, strict=True))
    return stats.difference_of_seeds(our_values, their_values, len(common), paired)


def _alike(measured: Sequence[stats.Items]) -> bool:
    """Return whether these are measurements of the same items, with the same weights."""
    first = measured[0]
    return all(
        each.shape == first.shape and np.array_equal(each[..., 1], first[..., 1]) and np.isfinite(each).all()
        for each in measured
    )


@lru_cache(maxsize=2 * TIED)
def _items(row: Row, metric: str) -> tuple[dict[str, stats.Items], str]:
    """Return the measurements on each item by seed, each of shape (1, items, 2), and a fingerprint of the items.

    Both are empty if they were not recorded; the fingerprint is also empty if runs of the row used different items.
    """
    items_of_seed: dict[str, stats.Items] = {}
    for record in row.records:
        if metric == "loss":
            pairs = [(line["nll"], line["tokens"]) for line in record.losses]
        elif (source := metric.removeprefix("source_loss/")) != metric:
            pairs = [(line["nll"], line["tokens"]) for line in record.losses if line.get("source") == source]
        elif metric == "unrelated_loss":
            pairs = [(line["nll"], line["tokens"]) for line in record.unrelated_losses]
        elif metric.startswith("lm_eval/"):
            _, task, name = metric.split("/", 2)
            tasks = {task, *record.lm_eval.get("groups", {}).get(task, ())}
            pairs = [(item[name], 1.0) for item in record.lm_eval["items"] if item["task"] in tasks and name in item]
        else:
            pairs = [(answer[metric], 1.0) for answer in record.answers if metric in answer]
        if pairs:
            items_of_seed[record.params["seed"]] = np.array([pairs], float)
    kind = "lm_eval" if metric.startswith("lm_eval/") else "unrelated" if metric == "unrelated_loss" else "evaluation"
    rows = {record.params.get(f"data.{kind}_fingerprint", record.run_id) for record in row.records}
    return items_of_seed, rows.pop() if len(rows) == 1 else ""


def _text(difference: stats.Difference, p: float, level: float, lower_is_better: bool) -> str:
    if difference.of_other_items:
        return f"{NOT_TESTED} {difference.value:+.4f}; scored on other held-out rows than the baseline"
    if not difference.sources and difference.value:
        return (
            f"{NOT_TESTED} {difference.value:+.4f}; one seed each, and not several held-out rows on which both were "
            "scored, row by row: nothing says how much they vary by chance"
        )
    low, high = difference.interval
    interval = f" [{low:+.4f}, {high:+.4f}]" if low < high else ""
    verdict = "tie" if p >= ALPHA else "better" if (difference.value < 0) == lower_is_better else "worse"
    remarks = []
    if difference.seeds == (1, 1):
        remarks.append("one seed only: another seed may give another result")
    elif 1 in difference.seeds:
        remarks.append("one of the two has one seed only; it is taken to vary over seeds as the other does")
    if verdict == "tie":
        remarks.append(_outlook(difference, level))
    return "; ".join([f"{verdict} {difference.value:+.4f}{interval}", *filter(None, remarks)])


def _outlook(difference: stats.Difference, level: float) -> str:
    """Say what would settle a tie, or which difference these runs would have shown."""
    if difference.seeds == (1, 1) or not difference.sources:
        return ""
    if difference.constant:
        return "too few runs to exclude chance" if difference.value else ""
    alone = "significant on its own, but not after the correction for the number of comparisons; "
    shown = alone if difference.p < ALPHA else ""
    if more_seeds := stats.seeds_to_settle(difference, level):
        seeds = f"{more_seeds} more seed{'s' if more_seeds > 1 else ''}"
        return f"{shown}{seeds} would settle it with 80 % probability"
    return f"{shown}a true difference of {stats.detectable(difference, level):.4f} would be found with 80 % power"
