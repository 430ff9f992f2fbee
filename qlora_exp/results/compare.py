"""Runs side by side: what differs, what each cost and gained, and which differences are more than chance.

Seeds of one configuration are one row. Knows records only: how they are shown is `report`'s.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from qlora_exp.config.metric_direction import lower_is_better
from qlora_exp.results import stats
from qlora_exp.results.records import Record
from qlora_exp.utils.errors import ConfigError

METRICS = ("loss", "rougeL", "exact_match", "task_score", "unrelated_loss")
"""What quality is judged by, after training on held-out rows; perplexity goes with the loss, its logarithm.

And `lm_eval/TASK/METRIC` of every task that was scored.
"""
ALPHA = 1 - stats.LEVEL
TIED = 100
"""Of more rows, pairs are not tested one by one: it would take long, and nobody could read the letters."""

# Looked for in this order when runs were not made by one sweep.
_TELLING = (
    "model.model_name_or_path", "dataset.name", "method.name", "quantization.name", "lora_variant.name",
    "optimizer.name", "method.r", "method.lora_alpha", "training.learning_rate", "training.max_steps",
)  # fmt: skip
# With how much they may differ: other seeds draw other rows.
_MEASURED_CONDITIONS = {
    "tokens seen": ("train/num_tokens", 0.02),
    "steps": ("steps", 0.02),
    "MiB before loading": ("memory/baseline/rss_mib", 0.05),
}
_CONDITIONS = {
    "effective batch": lambda one: _product(
        one, "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
    ),
    "base dtype": lambda one: one.params.get("resolved.dtype"),
    "adapter dtype": lambda one: one.params.get("resolved.adapter_dtype"),
    "loss": lambda one: one.params.get("training.loss_type"),
    "training rows": lambda one: one.params.get("data.training_fingerprint"),
    "held-out rows": lambda one: one.params.get("data.evaluation_fingerprint"),
    "unrelated rows": lambda one: one.params.get("data.unrelated_fingerprint"),
    "device": lambda one: one.params.get("resolved.device_name"),
    "cores": lambda one: one.tags.get("hardware.threads"),
    "code": lambda one: one.tags.get("identity.code"),
}


@dataclass(frozen=True, eq=False)
class Row:
    """One configuration: its runs differ by the seed only."""

    label: dict[str, str]
    """The keys that differ between configurations, with this one's values."""
    records: list[Record]
    """Those that ended well."""
    failed: list[Record]

    @property
    def name(self) -> str:
        """As people read it."""
        return " ".join(f"{key}={value}" for key, value in self.label.items()) or "all"

    @property
    def short(self) -> str:
        """The same for pictures."""
        return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.label.items()) or "all"

    def mean(self, metric: str) -> stats.Estimate | None:
        """Over the seeds; None if not every run has it."""
        values = [one.metrics[metric] for one in self.records if metric in one.metrics]
        return stats.mean(values) if values and len(values) == len(self.records) else None


@dataclass(frozen=True)
class Verdict:
    """How a configuration compares with the baseline."""

    difference: stats.Difference
    p: float
    """Adjusted for the number of comparisons (Holm)."""
    text: str


@dataclass(frozen=True)
class Comparison:
    """Everything that there is to show."""

    rows: list[Row]
    baseline: Row
    metric: str
    lower_is_better: bool
    """Of the metric."""
    verdicts: dict[str, Verdict]
    """By the row's name; not of the baseline."""
    ties: dict[str, str]
    """By the row's name: letters; rows that share one were not told apart."""
    about: dict[str, str] = field(default_factory=dict)
    """What these runs are of: sweeps, models, datasets, devices."""
    warnings: list[str] = field(default_factory=list)
    """By name what is not equal and makes the comparison unfair: tokens, batch, dtypes, data, versions, hardware."""
    settings: list[str] = field(default_factory=list)
    """Keys of the config, with their values, that differ beside those that name the rows."""


def compare(records: Sequence[Record], metric: str = "loss", baseline: str | None = None) -> Comparison:
    """Compare runs by `metric`, one of METRICS or of lm-eval's.

    Args:
        records: of whatever outcome; those that failed are listed and not compared.
        metric: what decides.
        baseline: what the others are compared with: a part of a row's name, such as `method.name=lora`; None is the
            first row.

    Raises:
        ConfigError: no row, or several, are called so, or no run ended well.
    """
    rows = _rows(records)
    if not (ended := [row for row in rows if row.records]):
        outcomes = ", ".join(sorted({one.outcome for one in records}))
        raise ConfigError(f"none of these {len(records)} runs ended well ({outcomes}): there is nothing to compare")
    if not any(row.mean(f"after/{metric}") for row in ended):
        scored = sorted(
            {name[6:] for row in ended for one in row.records for name in one.metrics if "/lm_eval/" in name}
        )
        known = ", ".join(name for name in (*METRICS, *scored) if any(row.mean(f"after/{name}") for row in ended))
        raise ConfigError(f"--metric {metric}: these runs did not measure it; they have: {known}")
    measured = [row for row in ended if row.mean(f"after/{metric}")]
    chosen = _baseline(measured, baseline, rows)
    others = [row for row in measured if row is not chosen]
    found = {row.name: _difference(row, chosen, metric) for row in others}
    adjusted = dict(zip(found, stats.holm([one.p for one in found.values()]), strict=True))
    lower = _lower_is_better(metric, ended)
    verdicts = {name: Verdict(one, adjusted[name], _said(one, adjusted[name], lower)) for name, one in found.items()}
    conditions = _about(records), _unfair(ended), _settings(ended)
    return Comparison(rows, chosen, metric, lower, verdicts, _ties(ended, metric, lower), *conditions)


def _rows(records: Sequence[Record]) -> list[Row]:
    """Configurations, in the order of their first runs; a seed that ran again is not another one."""
    groups: dict[tuple[tuple[str, str], ...], dict[tuple[str, bool], Record]] = {}
    for record in records:
        seed_and_end = record.params.get("seed", ""), record.outcome == "ok"
        groups.setdefault(tuple(sorted(record.config.items())), {})[seed_and_end] = record  # the newest counts
    labels = _labels([next(iter(group.values())) for group in groups.values()])
    return [
        Row(
            label,
            [one for (_, ok), one in group.items() if ok],
            [one for (seed, ok), one in group.items() if not ok and (seed, True) not in group],
        )
        for label, group in zip(labels, groups.values(), strict=True)
    ]


def _labels(firsts: Sequence[Record]) -> list[dict[str, str]]:
    """For each configuration the few keys that tell it from the others: the swept ones, or as many as it takes."""
    swept = [{key[6:]: value for key, value in one.tags.items() if key.startswith("sweep.")} for one in firsts]
    for one in swept:
        one.pop("seed", None)
    if all(one.keys() == swept[0].keys() for one in swept) and _tell_apart(swept):
        return [{key: one[key] for key in one if len({other[key] for other in swept}) > 1} for one in swept]
    configs = [one.config for one in firsts]
    every = dict.fromkeys([*_TELLING, *(key for config in configs for key in config)])
    differing = [key for key in every if len({config.get(key) for config in configs}) > 1]
    chosen: list[str] = []
    for key in differing:
        with_it = [{name: config.get(name, "") for name in [*chosen, key]} for config in configs]
        if _count(with_it) > _count([{name: config.get(name, "") for name in chosen} for config in configs]):
            chosen.append(key)
    return [{key: config.get(key, "") for key in chosen} for config in configs]


def _tell_apart(labels: Sequence[Mapping[str, str]]) -> bool:
    return _count(labels) == len(labels)


def _count(labels: Sequence[Mapping[str, str]]) -> int:
    return len({tuple(label.items()) for label in labels})


def _baseline(rows: Sequence[Row], called: str | None, every: Sequence[Row]) -> Row:
    if called is None:
        return rows[0]
    words = called.split()
    named = [row for row in every if all(word in f"{row.name} {row.short}" for word in words)]
    exact = [row for row in named if all(word in (*row.name.split(), *row.short.split()) for word in words)]
    found = exact or named  # r=1 is one row, though r=16 begins so
    if len(found) == 1 and found[0] in rows:
        return found[0]
    if len(found) == 1:
        raise ConfigError(f"--baseline '{called}': {found[0].name} has no run that ended well and measured it")
    names = "\n  ".join(row.name for row in found or rows)
    raise ConfigError(f"--baseline '{called}': {'several rows are' if found else 'no row is'} called so:\n  {names}")


def _lower_is_better(metric: str, rows: Sequence[Row]) -> bool:
    """Tell whether less is better, of lm-eval's scores as their task says."""
    lower = {name for row in rows for one in row.records for name in one.lm_eval.get("lower_is_better", ())}
    return metric in lower if metric.startswith("lm_eval/") else lower_is_better(metric)


@lru_cache(maxsize=2 * TIED)
def _items(row: Row, metric: str) -> tuple[dict[str, stats.Items], str]:
    """By seed what was measured on each item, (1, items, 2), and a name of the items; empty if that was not kept."""
    found: dict[str, stats.Items] = {}
    for one in row.records:
        if metric == "loss":
            pairs = [(line["nll"], line["tokens"]) for line in one.losses]
        elif metric == "unrelated_loss":
            pairs = [(line["nll"], line["tokens"]) for line in one.unrelated_losses]
        elif metric.startswith("lm_eval/"):
            _, task, name = metric.split("/", 2)
            tasks = {task, *one.lm_eval.get("groups", {}).get(task, ())}
            pairs = [(item[name], 1.0) for item in one.lm_eval["items"] if item["task"] in tasks and name in item]
        else:
            pairs = [(answer[metric], 1.0) for answer in one.answers if metric in answer]
        if pairs:
            found[one.params["seed"]] = np.array([pairs], float)
    kind = "lm_eval" if metric.startswith("lm_eval/") else "unrelated" if metric == "unrelated_loss" else "evaluation"
    rows = {one.params.get(f"data.{kind}_fingerprint", one.run_id) for one in row.records}
    return found, rows.pop() if len(rows) == 1 else ""


def _difference(ours: Row, theirs: Row, metric: str) -> stats.Difference:
    """Paired by seed where both have the same ones, and by item where both were scored on the same rows."""
    mine, rows = _items(ours, metric)
    other, other_rows = _items(theirs, metric)
    common = sorted(mine.keys() & other.keys())
    if common and rows and rows == other_rows:
        pairs = [(mine[seed], other[seed]) for seed in common]
        if all(a.shape == b.shape and np.array_equal(a[..., 1], b[..., 1]) for a, b in pairs):
            return stats.difference_of_items(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    values = [{one.params["seed"]: one.metrics[f"after/{metric}"] for one in row.records} for row in (ours, theirs)]
    common = sorted(values[0].keys() & values[1].keys())
    if common:
        return stats.difference_of_seeds([values[0][seed] for seed in common], [values[1][seed] for seed in common])
    one, two = (float(np.mean(list(each.values()))) for each in values)
    return stats.difference_of_seeds([one], [two])


def _said(found: stats.Difference, p: float, lower_is_better: bool) -> str:
    interval = "" if math.isnan(found.low) else f" [{found.low:+.4f}, {found.high:+.4f}]"
    alone = "; one seed: another may say otherwise" if found.seeds == 1 else ""
    if p < ALPHA:
        better = (found.value < 0) == lower_is_better
        return f"{'better' if better else 'worse'} {found.value:+.4f}{interval}{alone}"
    if found.seeds == 1:
        return f"tie {found.value:+.4f}{interval}{alone}"
    more = stats.seeds_to_settle(found)
    if more is None:
        settle = "more held-out rows would have to settle it"
    elif more == 0:
        settle = "settled but for the number of comparisons"
    else:
        settle = f"{more} more seeds would settle it"
    return f"tie {found.value:+.4f}{interval}; {settle}"


def _ties(rows: Sequence[Row], metric: str, lower: bool) -> dict[str, str]:
    """Groups that were not told apart, every pair tested (Holm); none where the rows are too many."""
    measured = [row for row in rows if row.mean(f"after/{metric}")]
    if len(measured) > TIED:
        return {}
    pairs = [(one, two) for one in range(len(measured)) for two in range(one)]
    adjusted = stats.holm([_difference(measured[one], measured[two], metric).p for one, two in pairs])
    differ = [[False] * len(measured) for _ in measured]
    for (one, two), p in zip(pairs, adjusted, strict=True):
        differ[one][two] = differ[two][one] = p < ALPHA
    means = [row.mean(f"after/{metric}") for row in measured]
    sign = 1 if lower else -1
    order = sorted(range(len(measured)), key=lambda index: sign * means[index].value)  # type: ignore[union-attr]
    letters = stats.groups_of_ties(order, differ)
    return {row.name: letter for row, letter in zip(measured, letters, strict=True)}


def _about(records: Sequence[Record]) -> dict[str, str]:
    told = {
        "sweep": [one.tags.get("sweep") for one in records],
        "model": [one.params.get("model.model_name_or_path") for one in records],
        "dataset": [one.params.get("dataset.name") for one in records],
        "device": [one.params.get("resolved.device_name") for one in records],
    }
    return {name: _listed(known) for name, values in told.items() if (known := dict.fromkeys(filter(None, values)))}


def _unfair(rows: Sequence[Row]) -> list[str]:
    """By name what differs between the runs that should not."""
    records = [one for row in rows for one in row.records]
    found = []
    for name, (metric, alike) in _MEASURED_CONDITIONS.items():
        means = {row.short: mean.value for row in rows if (mean := row.mean(metric))}
        if means and max(means.values()) > (1 + alike) * min(means.values()):
            found.append(f"{name}: {_by_value({who: f'{value:,.0f}' for who, value in means.items()})}")
    seeds = {row.short: " ".join(sorted(one.params.get("seed", "none") for one in row.records)) for row in rows}
    if len(set(seeds.values())) > 1:
        found.append(f"seeds: {_by_value(seeds)}")
    for name, read in _CONDITIONS.items():
        values = dict.fromkeys(str(value) for one in records if (value := read(one)) is not None)
        if len(values) > 1:
            found.append(f"{name}: {_listed(values)}")
    for key in dict.fromkeys(key for one in records for key in one.tags if key.startswith("version.")):
        if len(values := dict.fromkeys(one.tags.get(key, "none") for one in records)) > 1:
            found.append(f"{key.removeprefix('version.')} version: {_listed(values)}")
    return found


def _settings(rows: Sequence[Row]) -> list[str]:
    """By key what differs between the rows beyond the keys that they are labelled with."""
    records = [one for row in rows for one in row.records]
    found = []
    labels = {key for row in rows for key in row.label}
    for key in dict.fromkeys(key for one in records for key in one.config):
        if key in labels or key.rpartition(".")[0] in labels:
            continue
        if len(values := dict.fromkeys(one.config.get(key, "none") for one in records)) > 1:
            found.append(f"{key}: {_listed(values)}")
    return found


def _by_value(values: Mapping[str, str]) -> str:
    """Each value, with the row that has it, or how many have."""
    rows_of: dict[str, list[str]] = {}
    for who, value in values.items():
        rows_of.setdefault(value, []).append(who)
    told = (f"{value} ({who[0] if len(who) == 1 else f'{len(who)} rows'})" for value, who in rows_of.items())
    return _listed(dict.fromkeys(told))


def _listed(values: Mapping[str, Any]) -> str:
    shown = [value if len(value) <= 80 else f"{value[:77]}..." for value in values]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _product(record: Record, *keys: str) -> float:
    return math.prod(float(record.params.get(key, "1")) for key in keys)
