"""Show a comparison as a table: on the terminal, as CSV, JSON, Markdown and HTML files, and in MLflow.

This module only formats; `compare` computes the results.
"""

import csv
import io
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora_exp.recipe.summary import names_of_scores
from qlora_exp.results import tuned
from qlora_exp.results.compare import Comparison, as_data
from qlora_exp.results.page import data, looks, page
from qlora_exp.results.row import Row
from qlora_exp.results.verdicts import ALPHA, NOT_TESTED
from qlora_exp.tracking.mlflow_store import client
from qlora_exp.utils.display import csv_cell, say, shown
from qlora_exp.utils.display import markdown as as_markdown
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.files import write_atomically
from qlora_exp.utils.secrets import redacted
from qlora_exp.utils.tables import latex_table, make_table, markdown_table
from qlora_exp.utils.text import shortened

_MEMORY = ("allocated", "rss")
# Heading, metric, number format. A metric that no run has gets no column.
_COLUMNS = (
    ("trainable", "trainable_parameters", ",.0f"),
    ("share", "trainable_share", ".2%"),
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("train loss", "train/loss", ".4f"),  # of the last logged step
    ("loss", "after/loss", ".4f"),
    ("perplexity", "after/perplexity", ".2f"),
    ("ROUGE-L", "after/rougeL", ".3f"),
    ("exact match", "after/exact_match", ".3f"),
    ("task score", "after/task_score", ".3f"),
    ("forgotten", "forgetting", "+.4f"),
    ("gen. tokens/s", "after/generated_tokens_per_second", ",.1f"),
    ("MFU", "mfu", ".1%"),
    ("tokens/GB/s", "tokens_per_gb_second", ",.1f"),
    ("J", "energy_joules", ",.0f"),
    ("saved MB", "model_bytes", ",.1f"),
    ("taken/planned", "plan/memory_ratio", ".2f"),
)
_PHASES = ("load", "first_step", "steady", "evaluation")
_SHORTEST = 16
"""Fewest characters of a row's name on the terminal."""
_NARROWER = ("cost", "short", "shortest")
PRESETS = {
    "all": None,
    # The columns of the project's benchmark table: cost and quality of each method.
    "cost": ("trainable", "share", "peak MiB", "time", "perplexity", "ROUGE-L"),
    "short": ("peak MiB", "time", "loss", "ROUGE-L", "task score", "tuned"),
    "shortest": ("loss", "ROUGE-L", "task score", "tuned"),
}
"""Sets of columns by name; None means all columns."""


def table(
    comparison: Comparison, preset: str = "all", only: Sequence[Row] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows as text, all or only some; rows without a successful run come last."""
    chosen = PRESETS[preset]
    if chosen:
        chosen = (*chosen, _heading(f"after/{comparison.metric}"))
    columns = [(name, read) for name, read in _columns(comparison) if chosen is None or name in chosen]
    label_keys = list(comparison.rows[0].label)
    headings = [*label_keys, "seeds", *(name for name, _ in columns)]
    headings += [f"{comparison.metric} against the baseline", "ties"]
    rows = []
    for row in _in_order(comparison.rows if only is None else only):
        verdict_or_failure = "baseline" if row is comparison.baseline else _verdict(row, comparison)
        seeds = str(len(row.records)) + "".join(f" (+{count} {name})" for name, count in _not_ended(row).items())
        ties = comparison.ties.get(row.name, "")
        rows.append(
            [*map(shortened, row.label.values()), seeds, *(read(row) for _, read in columns), verdict_or_failure, ties]
        )
    return headings, rows


def _in_order(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: not row.records)


def _columns(comparison: Comparison) -> list[tuple[str, Callable[[Row], str]]]:
    measured = [row for row in comparison.rows if row.records]
    memory_kind = next(
        (kind for kind in _MEMORY if any(row.mean(f"memory/{kind}_peak_mib") for row in measured)), "rss"
    )
    memory = [("peak MiB", f"memory/{memory_kind}_peak_mib", ",.0f")]
    memory += [
        (f"{phase.replace('_', ' ')} MiB", f"memory/{phase}/{memory_kind}_peak_mib", ",.0f") for phase in _PHASES
    ]
    names = (name for row in measured for record in row.records for name in record.metrics)
    scores = [(_heading(name), name, form) for name, form in names_of_scores(names).items()]
    used_columns = [column for column in (*_COLUMNS[:2], *memory, *_COLUMNS[2:], *scores)
                    if any(row.mean(column[1]) for row in measured)]  # fmt: skip
    columns = [(name, _reader(metric, form)) for name, metric, form in used_columns]
    if len({_scaling(row) for row in measured}) > 1:
        columns.append(("LoRA scaling", _scaling))
    if any(row.tuned for row in measured):
        columns += tuned.COLUMNS.items()
    base = _seconds(comparison.baseline)
    if base:
        place = next((index for index, (name, _) in enumerate(columns) if name == "tokens/s"), len(columns))
        columns[place:place] = [
            ("train min", lambda row: f"{seconds / 60:,.1f}" if (seconds := _seconds(row)) else ""),
            ("time", lambda row: f"{seconds / base:.2f}x" if (seconds := _seconds(row)) else ""),
        ]
    return columns


def _heading(metric: str) -> str:
    usual = {name: heading for heading, name, _ in _COLUMNS}
    return usual.get(metric) or metric.removeprefix("after/").removeprefix("lm_eval/").removeprefix("source_")


def _reader(metric: str, number_format: str) -> Callable[[Row], str]:
    scale = 1e-6 if metric == "model_bytes" else 1.0

    def read(row: Row) -> str:
        if not (estimate := row.mean(metric)):
            return ""
        text = format(estimate.value * scale, number_format)
        if math.isnan(estimate.low) or estimate.low == estimate.high or not metric.startswith("after/"):
            return text
        return f"{text} ±{format((estimate.high - estimate.value) * scale, number_format)}"

    return read


def _seconds(row: Row) -> float | None:
    """Return the duration of all training steps, in seconds."""
    step, steps = row.mean("step_seconds_mean"), row.mean("steps")
    return step.value * steps.value if step and steps else None


def _scaling(row: Row) -> str:
    """Return the factor of what LoRA adds, alpha / r or alpha / sqrt(r); empty for other methods and older runs."""
    return next((each.params["resolved.lora_scaling"] for each in (*row.records, *row.failed)
                 if "resolved.lora_scaling" in each.params), "")  # fmt: skip


def _verdict(row: Row, comparison: Comparison) -> str:
    """Return the verdict on a row, or why there is none."""
    if verdict := comparison.verdicts.get(row.name):
        return "; ".join(filter(None, [verdict.text, tuned.remark(row.tuned, comparison.baseline.tuned)]))
    failures = {f"{record.outcome}: {record.tags.get('failure', '')}".strip(": ") for record in row.failed}
    if comparison.metric.startswith("metric/"):
        tag = f"metric_failed.after.{comparison.metric.removeprefix('metric/')}"
        failures |= {record.tags[tag] for record in row.records if tag in record.tags}
    return "; ".join(
        [*filter(None, [row.unmeasured(f"after/{comparison.metric}")]), ", ".join(sorted(failures))]
    ).strip("; ")


def _not_ended(row: Row) -> dict[str, int]:
    """Count the runs of a row that failed, that a search pruned, and that have not ended."""
    ends = Counter(record.outcome if record.outcome in ("pruned", "running") else "failed" for record in row.failed)
    return {name: ends[name] for name in ("failed", "pruned", "running") if ends[name]}


def show(comparison: Comparison, preset: str = "all", most: int = 0) -> None:
    """Print the table, followed by the conditions that differ between the runs.

    Args:
        comparison: the comparison.
        preset: set of columns, a key of `PRESETS`.
        most: most rows to print: of more, the best two thirds and the worst, in this order. 0: all rows.
    """
    only = _best_and_worst(comparison, most) if 0 < most < len(comparison.rows) else comparison.rows
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:  # output to a file has no width
        console.width = 250
    for column_set in (preset, *_NARROWER):
        headings, rows = table(comparison, column_set, only)
        narrow = make_table([*headings[:-2], headings[-1]], [[*row[:-2], row[-1]] for row in rows])
        if _width(headings, rows) <= console.width:
            break
    else:  # one column for the name
        labels = len(comparison.baseline.label)
        rest = [[*row[labels:-2], row[-1]] for row in rows]
        room = console.width - _width(headings[labels:], [row[labels:] for row in rows]) - 3
        names = looks.names(_in_order(only), max(_SHORTEST, room))
        body = [[name, *row] for name, row in zip(names, rest, strict=True)]
        narrow = make_table(["row", *headings[labels:-2], headings[-1]], body)
    console.print(narrow)
    if column_set != preset:
        console.print("(use a wider terminal, or --out FOLDER, to see more columns)")
    console.print(shown(f"{comparison.metric} against the baseline, {comparison.baseline.name}:"))
    for configuration in only:
        if configuration is not comparison.baseline:
            say(f"  {configuration.name}: {_verdict(configuration, comparison)}")
    if left := [row for row in comparison.rows if row not in only]:
        say(f"{len(left)} of {len(comparison.rows)} rows are not shown ({_counts(left, comparison)}): "
            "--rows 0 prints all, --out FOLDER writes all")  # fmt: skip
    say(*_notes(comparison))


def _best_and_worst(comparison: Comparison, most: int) -> list[Row]:
    """Return the rows with the best values and some with the worst, best first; the baseline is among them."""
    values = {row: mean.value for row in comparison.rows if (mean := row.mean(f"after/{comparison.metric}"))}
    order = sorted(values, key=values.__getitem__, reverse=not comparison.lower_is_better)
    worst = most // 3
    kept = {*order[: most - worst], *order[len(order) - worst :], comparison.baseline}
    return [row for row in order if row in kept]


def _counts(rows: Sequence[Row], comparison: Comparison) -> str:
    """Say how many rows were judged how."""
    kinds = Counter(
        "without a result" if (verdict := comparison.verdicts.get(row.name)) is None
        else NOT_TESTED if verdict.text.startswith(NOT_TESTED)
        else "no significant difference" if verdict.p >= ALPHA
        else "significantly different"
        for row in rows
    )  # fmt: skip
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def _width(headings: list[str], rows: list[list[str]]) -> int:
    """Return the width in characters of the table without the verdicts, if no cell is wrapped."""
    columns = list(zip(headings, *rows, strict=True))
    return sum(max(map(len, column)) + 3 for column in (*columns[:-2], columns[-1])) + 1


def _notes(comparison: Comparison) -> list[str]:
    intervals = any(len(row.records) > 1 for row in comparison.rows)
    apart = any(verdict.difference.of_other_items for verdict in comparison.verdicts.values())
    lines = [f"{len([record for row in comparison.rows for record in (*row.records, *row.failed)])} runs"]
    lines[0] += "".join(f"; {name} {value}" for name, value in comparison.about.items())
    lines += [
        f"Differences of {comparison.metric} from {comparison.baseline.name}, on the same held-out items and seeds "
        "where both have them, with 95 % intervals; verdicts and letters are adjusted for the number of comparisons "
        "(Holm). Rows that share a letter do not differ significantly."
        + (" Rows scored on different held-out rows share none, and are not tested." if apart else "")
    ]
    if comparison.too_few_seeds:
        lines.append(comparison.too_few_seeds)
    if intervals:
        lines.append("± is the 95 % interval of the mean over seeds (Student's t).")
    if comparison.without_artifacts:
        lines.append(f"Not compared on single held-out items, because {comparison.without_artifacts}.")
    if how_tuned := [f"  {row.name}: {row.tuned.text}" for row in comparison.rows if row.tuned]:
        lines += ["How the rows were tuned:", *how_tuned]
    if comparison.warnings:
        lines.append("The comparison may be unfair, because these conditions differ:")
        lines += [f"  {line}" for line in comparison.warnings]
    if comparison.settings:
        lines.append("Other settings that differ:")
        lines += [f"  {line}" for line in comparison.settings]
    return lines


def log(comparison: Comparison, uri: str | None, preset: str = "all") -> str | None:
    """Log the report to the MLflow run of the sweep that all these runs belong to.

    Args:
        comparison: the comparison.
        uri: MLflow tracking URI where the runs are.
        preset: set of columns, a key of `PRESETS`.

    Returns:
        Id of the sweep's MLflow run; None if the runs do not all belong to one sweep.
    """
    records = [record for row in comparison.rows for record in (*row.records, *row.failed)]
    parents = {record.tags.get("mlflow.parentRunId") for record in records}
    if len(parents) != 1 or (parent := parents.pop()) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        write(comparison, Path(folder), preset, "comparison")
        client(uri).log_artifacts(parent, folder, "report")
    return parent


def write(comparison: Comparison, folder: Path, preset: str = "all", name: str | None = None) -> list[Path]:
    """Write table (`.csv`, `.md`, `.tex`), interactive page (`.html`), figures, and all metrics of all runs (`.json`).

    Args:
        comparison: the comparison.
        folder: target folder; created if it does not exist.
        preset: set of columns of the `.md`, `.tex` and `.html`, a key of `PRESETS`.
        name: name of the files without suffix. Default: `comparison_TIMESTAMP`.

    Returns:
        The files written.

    Raises:
        ConfigError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    headings, rows = table(comparison, preset)
    text = io.StringIO()
    numbers = [
        {str(csv_cell(key)): csv_cell(redacted(value)) for key, value in as_numbers(row, comparison).items()}
        for row in comparison.rows
    ]
    writer = csv.DictWriter(text, dict.fromkeys(key for line in numbers for key in line))
    writer.writeheader()
    writer.writerows(numbers)
    name = name or f"comparison_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    contents = {
        "csv": text.getvalue(),
        "json": json.dumps(redacted(as_data(comparison)), indent=1),
        "md": markdown(comparison, preset),
        "tex": latex(comparison, preset),
        "html": _page(comparison, rows, headings),
    }
    files = []
    for kind, content in contents.items():
        files.append(folder / f"{name}.{kind}")
        write_atomically(files[-1], content)
    from qlora_exp.results import plots  # imported late: matplotlib takes a second to load

    return [*files, *plots.write(comparison, folder / f"{name}_figures")]


def markdown(comparison: Comparison, preset: str = "all") -> str:
    """Return the table and the notes below it as Markdown."""
    headings, rows = table(comparison, preset)
    return "\n\n".join([markdown_table(headings, rows), *map(as_markdown, _notes(comparison))]) + "\n"


def latex(comparison: Comparison, preset: str = "all") -> str:
    """Return the table for a paper, which has no room for all columns, and the notes as comments."""
    headings, rows = table(comparison, "short" if preset == "all" else preset)
    without_reasons = [
        [*row[:-2], row[-2] if row[-2].startswith(NOT_TESTED) else row[-2].partition(";")[0], row[-1]] for row in rows
    ]
    return latex_table(headings, without_reasons, _notes(comparison))


def _page(comparison: Comparison, rows: list[list[str]], headings: list[str]) -> str:
    """Return a self-contained HTML page: it needs no other file and no network."""
    cells = dict(zip(_in_order(comparison.rows), rows, strict=True))
    return page.build(data.collect(comparison, headings, cells, _notes(comparison)))


def as_numbers(row: Row, comparison: Comparison) -> dict[str, Any]:
    """Return a row as numbers: means and intervals over seeds, and the difference from the baseline."""
    line: dict[str, Any] = {**row.label, "seeds": len(row.records), "failed": 0, **_not_ended(row)}
    metrics = dict.fromkeys(key for record in row.records for key in record.metrics)
    for metric in (key for key in metrics if not key.startswith(("train/", "eval/"))):
        if mean := row.mean(metric):
            line[metric] = mean.value
            if metric.startswith("after/") and not math.isnan(mean.low):
                line |= {f"{metric} low": mean.low, f"{metric} high": mean.high}
    if verdict := comparison.verdicts.get(row.name):
        difference = verdict.difference
        line |= {
            "difference": difference.value,
            "difference low": difference.interval[0],
            "difference high": difference.interval[1],
            "p": verdict.p,
        }
        line["verdict"] = verdict.text
    return line | {"ties": comparison.ties.get(row.name, "")}
