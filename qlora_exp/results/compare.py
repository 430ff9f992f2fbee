"""Compare runs: what differs between them, the cost and quality of each, and which differences are significant.

Runs of one configuration with several seeds form one row. The input is past runs (`records`); `report` prints the
result.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_exp.config.conf_folder import GROUPS
from qlora_exp.recipe.summary import names_of_scores
from qlora_exp.results.metric_direction import facts_of, lower_is_better, recorded_facts
from qlora_exp.results.record import Record
from qlora_exp.results.row import Row
from qlora_exp.results.tuned import tuned_of
from qlora_exp.results.verdicts import Verdict, ties, too_few_seeds, verdicts
from qlora_exp.utils.errors import ConfigError

METRICS = ("loss", "rougeL", "exact_match", "task_score", "unrelated_loss")
"""Measures of quality, taken after training on held-out rows. Perplexity is not listed: the loss is its logarithm.

`source_loss/NAME` of each source of a mixture, `lm_eval/TASK/METRIC` of each task that was scored, and `metric/NAME` of
installed packages can be used as well.
"""

# Preferred keys for the labels, in this order, when the runs were not made by one sweep.
_LABEL_KEYS = (
    "model.model_name_or_path", "dataset.name", "method.name", "quantization.name", "lora_variant.name",
    "optimizer.name", "method.r", "method.lora_alpha", "training.learning_rate", "training.max_steps",
)  # fmt: skip
# Metric and allowed relative difference: other seeds draw other rows, so small differences are normal.
_MEASURED_CONDITIONS = {
    "tokens seen": ("train/num_tokens", 0.02),
    "steps": ("steps", 0.02),
    "MiB before loading": ("memory/baseline/rss_mib", 0.05),
}
_CONDITIONS = {
    "effective batch": lambda record: _product(
        record, "resolved.num_processes", "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
    ),
    "rows at once": lambda record: record.params.get("resolved.per_device_train_batch_size"),
    "gradient checkpointing": lambda record: _recomputation(record),
    "tiled MLPs": lambda record: record.params.get("resolved.tiled_mlp"),
    "trained together": lambda record: record.params.get("resolved.fused", "alone"),
    "padding": lambda record: record.params.get("resolved.padding"),
    "autocast": lambda record: _autocast(record),
    "attention": lambda record: record.params.get("resolved.attention"),
    "base dtype": lambda record: record.params.get("resolved.dtype"),
    "adapter dtype": lambda record: record.params.get("resolved.adapter_dtype"),
    "loss": lambda record: record.params.get("training.loss_type"),
    "training rows": lambda record: record.params.get("data.training_fingerprint"),
    "held-out rows": lambda record: record.params.get("data.evaluation_fingerprint"),
    "unrelated rows": lambda record: record.params.get("data.unrelated_fingerprint"),
    "device": lambda record: record.params.get("resolved.device_name"),
    "cores": lambda record: record.tags.get("hardware.threads"),
    "tuning": lambda record: (tuned := tuned_of(record)) and ", ".join(tuned.budget),
    "code": lambda record: record.tags.get("identity.code"),
}


@dataclass(frozen=True)
class Comparison:
    """A complete comparison, ready to be printed or plotted."""

    rows: list[Row]
    baseline: Row
    metric: str
    lower_is_better: bool
    """Whether a lower value of the metric is better."""
    verdicts: dict[str, Verdict]
    """Verdicts by row name, for every row but the baseline."""
    ties: dict[str, str]
    """Letters by row name: no significant difference was found between rows that share a letter."""
    about: dict[str, str] = field(default_factory=dict)
    """Sweeps, models, datasets and devices of these runs."""
    warnings: list[str] = field(default_factory=list)
    """What differs and makes the comparison unfair, by name: tokens, batch, dtypes, data, versions, hardware."""
    settings: list[str] = field(default_factory=list)
    """Other config keys that differ, with their values; the keys in the row labels are not repeated."""
    without_artifacts: str = ""
    """How many runs have no artifacts that can be read, and why; their differences are not tested item by item."""
    too_few_seeds: str = ""
    """That so many comparisons need more seeds, and how many; empty if there are enough."""
    unit: str = ""
    """Unit of the metric, if it is a package's that declares one."""


def compare(records: Sequence[Record], metric: str = "loss", baseline: str | None = None) -> Comparison:
    """Compare runs by a metric.

    Args:
        records: runs of any outcome; failed runs are listed but not compared.
        metric: name from METRICS, `source_loss/NAME`, `lm_eval/TASK/METRIC`, or an installed package's `metric/NAME`.
        baseline: row that the others are compared with, given by a part of its name such as `method=lora`.
            Default: the first row.

    Raises:
        ConfigError: no row or several rows match `baseline`, no run succeeded, or no run measured the metric.
    """
    rows = _rows(records)
    if not (ended := [row for row in rows if row.records]):
        outcomes = ", ".join(sorted({difference.outcome for difference in records}))
        raise ConfigError(
            f"none of these {len(records)} runs succeeded (outcomes: {outcomes}), so there is nothing to compare"
        )
    if not any(row.mean(f"after/{metric}") for row in ended):
        names = names_of_scores(name for row in ended for record in row.records for name in record.metrics)
        scored = [name.removeprefix("after/") for name in names]
        available = ", ".join(name for name in (*METRICS, *scored) if any(row.mean(f"after/{name}") for row in ended))
        raise ConfigError(f"--metric {metric}: these runs did not measure it; available: {available}")
    measured = [row for row in ended if row.mean(f"after/{metric}")]
    baseline_row = _baseline(measured, baseline, rows)
    lower_wins, unit = _direction_and_unit(metric, ended)
    judged = verdicts(measured, baseline_row, metric, lower_wins)
    letters = ties(measured, metric, lower_wins)
    conditions = _about(records), _unfair(ended), _settings(ended), _lost(ended), too_few_seeds(judged)
    return Comparison(rows, baseline_row, metric, lower_wins, judged, letters, *conditions, unit)


def _rows(records: Sequence[Record]) -> list[Row]:
    """Group runs into configurations, in the order of their first runs; of equal seeds, the newest run counts."""
    groups: dict[tuple[tuple[str, str], ...], dict[tuple[str, bool], Record]] = {}
    for record in records:
        seed_and_end = record.params.get("seed", ""), record.outcome == "ok"
        groups.setdefault(tuple(sorted(record.config.items())), {})[seed_and_end] = record
    labels = _labels([next(iter(group.values())) for group in groups.values()])
    return [
        Row(
            label,
            [record for (_, ok), record in group.items() if ok],
            [record for (seed, ok), record in group.items() if not ok and (seed, True) not in group],
        )
        for label, group in zip(labels, groups.values(), strict=True)
    ]


def _labels(firsts: Sequence[Record]) -> list[dict[str, str]]:
    """Return for each configuration the keys that distinguish it: the swept keys, or else as few keys as suffice."""
    swept = [{key[6:]: value for key, value in first.tags.items() if key.startswith("sweep.")} for first in firsts]
    for values in swept:
        values.pop("seed", None)
    if all(values.keys() == swept[0].keys() for values in swept) and _tell_apart(swept):
        return [{key: values[key] for key in values if len({other[key] for other in swept}) > 1} for values in swept]
    configs = [first.config for first in firsts]
    all_keys = dict.fromkeys([*_LABEL_KEYS, *(key for config in configs for key in config)])
    differing = [key for key in all_keys if len({config.get(key) for config in configs}) > 1]
    chosen: list[str] = []
    for key in differing:
        with_it = [{name: config.get(name, "") for name in [*chosen, key]} for config in configs]
        if _count(with_it) > _count([{name: config.get(name, "") for name in chosen} for config in configs]):
            chosen.append(key)
    return [{_as_swept(key): _value(first, key) for key in chosen} for first in firsts]


def _as_swept(key: str) -> str:
    """Return the name of a key in labels: an option of a config group as a sweep over the group names it."""
    group, _, name = key.rpartition(".")
    return group if name == "name" and group in GROUPS else key


def _value(first: Record, key: str) -> str:
    """Return a value of a configuration; only LoRA has a variant, although every config has the section."""
    no_variant = key == "lora_variant.name" and first.params.get("method.peft_type") != "LORA"
    return "none" if no_variant else first.config.get(key, "")


def _tell_apart(labels: Sequence[Mapping[str, str]]) -> bool:
    return _count(labels) == len(labels)


def _count(labels: Sequence[Mapping[str, str]]) -> int:
    return len({tuple(label.items()) for label in labels})


def _baseline(rows: Sequence[Row], name: str | None, all_rows: Sequence[Row]) -> Row:
    if name is None:
        return rows[0]
    words = name.split()
    named = [row for row in all_rows if all(word in f"{row.name} {row.short}" for word in words)]
    exact = [row for row in named if all(word in (*row.name.split(), *row.short.split()) for word in words)]
    matches = exact or named  # r=1 names one row, although r=16 starts with the same text
    if len(matches) == 1 and matches[0] in rows:
        return matches[0]
    if len(matches) == 1:
        raise ConfigError(f"--baseline '{name}': {matches[0].name} has no successful run that measured this metric")
    names = "\n  ".join(row.name for row in matches or rows)
    problem = "several rows match; name one of" if matches else "no row matches; there are"
    raise ConfigError(f"--baseline '{name}': {problem}:\n  {names}")


def _direction_and_unit(metric: str, rows: Sequence[Row]) -> tuple[bool, str]:
    """Return whether a lower value is better, and the unit of a package's metric; for lm-eval, the task defines it."""
    records = [record for row in rows for record in row.records]
    if metric.startswith("metric/"):
        facts = recorded_facts(metric, facts_of(records))
        return not facts.higher_is_better, facts.unit
    if not metric.startswith("lm_eval/"):
        return lower_is_better(metric), ""
    return any(metric in record.lm_eval.get("lower_is_better", ()) for record in records), ""


def _about(records: Sequence[Record]) -> dict[str, str]:
    sweeps = [record.tags.get("sweep") for record in records]
    facts: dict[str, list[str | None]] = {
        "sweep": [name or "none" for name in sweeps] if any(sweeps) else [],
        "model": [record.params.get("model.model_name_or_path") for record in records],
        "dataset": [record.params.get("dataset.name") for record in records],
        "device": [record.params.get("resolved.device_name") for record in records],
    }
    return {
        name: _listed(distinct) for name, values in facts.items() if (distinct := dict.fromkeys(filter(None, values)))
    }


def _unfair(rows: Sequence[Row]) -> list[str]:
    """List by name the conditions that differ between the runs although they should not."""
    records = [record for row in rows for record in row.records]
    lines = []
    for name, (metric, tolerance) in _MEASURED_CONDITIONS.items():
        means = {row.short: mean.value for row in rows if (mean := row.mean(metric))}
        if means and max(means.values()) > (1 + tolerance) * min(means.values()):
            lines.append(f"{name}: {_by_value({row_name: f'{value:,.0f}' for row_name, value in means.items()})}")
    seeds = {row.short: " ".join(sorted(record.params.get("seed", "none") for record in row.records)) for row in rows}
    if len(set(seeds.values())) > 1:
        lines.append(f"seeds: {_by_value(seeds)}")
    for name, read in _CONDITIONS.items():
        values = dict.fromkeys(str(value) for record in records if (value := read(record)) is not None)
        if len(values) > 1:
            lines.append(f"{name}: {_listed(values)}")
    tuned = {row.short: "tuned" if row.tuned else "not tuned" for row in rows}
    if len(set(tuned.values())) > 1:
        lines.append(f"settings: {_by_value(tuned)}")
    if line := _processes(records):
        lines.append(line)
    for tag, facts in facts_of(records).items():
        if len(origins := dict.fromkeys(each.origin for each in facts)) > 1:
            lines.append(f"{tag.replace('.', ' ', 1)}: {_listed(origins)}")
    for key in dict.fromkeys(key for record in records for key in record.tags if key.startswith("version.")):
        if len(values := dict.fromkeys(record.tags.get(key, "none") for record in records)) > 1:
            lines.append(f"{key.removeprefix('version.')} version: {_listed(values)}")
    return lines


def _recomputation(record: Record) -> str | None:
    """Return which layers of a run recomputed, if the record has it."""
    layers = record.params.get("resolved.recomputed_layers")
    return f"first {layers} layers" if layers else record.params.get("resolved.gradient_checkpointing")


def _autocast(record: Record) -> str | None:
    """Return the precision of a run's products, if the record has it."""
    kinds = {kind: record.params.get(f"resolved.{kind}") for kind in ("bf16", "fp16")}
    if None in kinds.values():
        return None
    return next((kind for kind, is_on in kinds.items() if is_on == "True"), "none")


def _processes(records: Sequence[Record]) -> str:
    """Say how runs with different numbers of processes share their batch; empty if all have as many."""
    sizes = {_product(record, "resolved.num_processes") for record in records}
    if len(sizes) == 1:
        return ""
    parts = {(_product(record, "resolved.num_processes"), _CONDITIONS["effective batch"](record)) for record in records}
    shares = dict.fromkeys(f"{size:.0f} x {batch / size:.0f} rows" for size, batch in sorted(parts))
    same = "the same batch" if len({batch for _, batch in parts}) == 1 else "not the same batch"
    return f"processes: {_listed(shares)} ({same})"


def _lost(rows: Sequence[Row]) -> str:
    reasons = [record.lost for row in rows for record in row.records if record.lost]
    return f"{len(reasons)} runs have no artifacts: {reasons[0]}" if reasons else ""


def _settings(rows: Sequence[Row]) -> list[str]:
    """List the config keys that differ between the rows and are not in their labels."""
    records = [record for row in rows for record in row.records]
    lines = []
    labels = {key for row in rows for key in row.label}
    for key in dict.fromkeys(key for record in records for key in record.config):
        if key in labels or key.rpartition(".")[0] in labels:
            continue
        if len(values := dict.fromkeys(record.config.get(key, "none") for record in records)) > 1:
            lines.append(f"{key}: {_listed(values)}")
    return lines


def _by_value(values: Mapping[str, str]) -> str:
    """List each value with the row that has it, or with the number of rows."""
    rows_of: dict[str, list[str]] = {}
    for row_name, value in values.items():
        rows_of.setdefault(value, []).append(row_name)
    parts = (
        f"{value} ({row_names[0] if len(row_names) == 1 else f'{len(row_names)} rows'})"
        for value, row_names in rows_of.items()
    )
    return _listed(dict.fromkeys(parts))


def _listed(values: Mapping[str, Any]) -> str:
    shown = [value if len(value) <= 80 else f"{value[:77]}..." for value in values]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _product(record: Record, *keys: str) -> float:
    return math.prod(float(record.params.get(key, "1")) for key in keys)


def as_data(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain data, which JSON can represent: all metrics of all runs, and each verdict."""
    rows = []
    for row in comparison.rows:
        verdict = comparison.verdicts.get(row.name)
        against_baseline = verdict and {
            "difference": _number(verdict.difference.value),
            "low": _number(verdict.difference.interval[0]),
            "high": _number(verdict.difference.interval[1]),
            "p": _number(verdict.p),
            "verdict": verdict.text,
        }
        rows.append(
            {
                "label": row.label,
                "baseline": row is comparison.baseline,
                "against_baseline": against_baseline,
                "ties": comparison.ties.get(row.name),
                "runs": [
                    {
                        "run_id": record.run_id,
                        "name": record.name,
                        "outcome": record.outcome,
                        "seed": record.params.get("seed"),
                        "metrics": {key: _number(value) for key, value in record.metrics.items()},
                    }
                    for record in (*row.records, *row.failed)
                ],
            }
        )
    return {
        "metric": comparison.metric,
        "about": comparison.about,
        "not_equal": comparison.warnings,
        "settings": comparison.settings,
        "too_few_seeds": comparison.too_few_seeds,
        "rows": rows,
    }


def _number(value: float) -> float | None:
    """Return the value, or None if it is NaN or infinite, which JSON cannot represent."""
    return value if math.isfinite(value) else None
