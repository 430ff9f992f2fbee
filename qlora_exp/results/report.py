"""A comparison as a table: on the terminal, as CSV, JSON, Markdown and HTML files, in MLflow. Decides nothing."""

import csv
import html
import io
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_exp.results.compare import Comparison, Row
from qlora_exp.tracking.mlflow_store import client
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.files import write_atomically
from qlora_exp.utils.tables import markdown_table

_MEMORY = ("allocated", "rss")
# Heading, metric, format; of a metric that every run lacks there is no column.
_COLUMNS = (
    ("trainable", "trainable_parameters", ",.0f"),
    ("share", "trainable_share", ".2%"),
    ("tokens/s", "tokens_per_second", ",.0f"),
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
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }}
th, td {{ border-bottom: 1px solid #ccc; padding: .3em .6em; text-align: left; }}
svg {{ max-width: 100%; height: auto; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
_PHASES = ("load", "first_step", "steady", "evaluation")
_NARROWER = ("seed1", "short", "shortest")
PRESETS = {
    "all": None,
    # The table that the project's benchmark has: cost and quality of each method.
    "seed1": ("trainable", "share", "peak MiB", "time", "perplexity", "ROUGE-L"),
    "short": ("peak MiB", "time", "loss", "ROUGE-L", "task score"),
    "shortest": ("loss", "ROUGE-L", "task score"),
}
"""Which columns, by name; None is all of them."""


def table(found: Comparison, preset: str = "all") -> tuple[list[str], list[list[str]]]:
    """Headings and rows, as text; rows that failed come last."""
    chosen = PRESETS[preset]
    columns = [(name, read) for name, read in _columns(found) if chosen is None or name in chosen]
    labels = list(found.rows[0].label)
    headings = [*labels, "seeds", *(name for name, _ in columns), f"{found.metric} against the baseline", "ties"]
    rows = []
    for row in sorted(found.rows, key=lambda row: not row.records):
        verdict = found.verdicts.get(row.name)
        said = "baseline" if row is found.baseline else verdict.text if verdict else _failures(row)
        seeds = str(len(row.records)) + "".join(f" (+{count} {name})" for name, count in _not_ended(row).items())
        ties = found.ties.get(row.name, "")
        rows.append([*row.label.values(), seeds, *(read(row) for _, read in columns), said, ties])
    return headings, rows


def _columns(found: Comparison) -> list[tuple[str, Callable[[Row], str]]]:
    measured = [row for row in found.rows if row.records]
    kind = next((one for one in _MEMORY if any(row.mean(f"memory/{one}_peak_mib") for row in measured)), "rss")
    memory = [("peak MiB", f"memory/{kind}_peak_mib", ",.0f")]
    memory += [(f"{phase.replace('_', ' ')} MiB", f"memory/{phase}/{kind}_peak_mib", ",.0f") for phase in _PHASES]
    every = [*_COLUMNS[:2], *memory, *_COLUMNS[2:]]
    shown = [one for one in every if any(row.mean(one[1]) for row in measured)]
    columns = [(name, _reader(metric, form)) for name, metric, form in shown]
    base = _seconds(found.baseline)
    if base:
        place = next((index for index, (name, _) in enumerate(columns) if name == "tokens/s"), len(columns))
        columns.insert(place, ("time", lambda row: f"{seconds / base:.2f}x" if (seconds := _seconds(row)) else ""))
    return columns


def _reader(metric: str, form: str) -> Callable[[Row], str]:
    scale = 1e-6 if metric == "model_bytes" else 1.0

    def read(row: Row) -> str:
        if not (found := row.mean(metric)):
            return ""
        text = format(found.value * scale, form)
        if math.isnan(found.low) or found.low == found.high or not metric.startswith("after/"):
            return text
        return f"{text} ±{format((found.high - found.value) * scale, form)}"

    return read


def _seconds(row: Row) -> float | None:
    """Of all training steps."""
    step, steps = row.mean("step_seconds_mean"), row.mean("steps")
    return step.value * steps.value if step and steps else None


def _failures(row: Row) -> str:
    return ", ".join(sorted({f"{one.outcome}: {one.tags.get('failure', '')}".strip(": ") for one in row.failed}))


def _not_ended(row: Row) -> dict[str, int]:
    """How many runs of a row failed, and how many a search has stopped."""
    pruned = sum(one.outcome == "pruned" for one in row.failed)
    counts = {"failed": len(row.failed) - pruned, "pruned": pruned}
    return {name: count for name, count in counts.items() if count}


def show(found: Comparison, preset: str = "all") -> None:
    """Print the table, and what is not equal beside it."""
    console = Console(markup=False)
    if not console.is_terminal:  # a file has no width
        console.width = 250
    for columns in (preset, *_NARROWER):
        headings, rows = table(found, columns)
        shown = Table(*headings[:-2], headings[-1])
        for row in rows:
            shown.add_row(*row[:-2], row[-1])
        if _width(headings, rows) <= console.width:
            break
    console.print(shown)
    if columns != preset:
        console.print("(a wider terminal, or --out, shows more columns)")
    console.print(f"{found.metric} against the baseline, {found.baseline.name}:")
    for one in found.rows:
        if one is not found.baseline:
            verdict = found.verdicts.get(one.name)
            said = verdict.text if verdict else _failures(one)
            console.print(f"  {one.name}: {said}", soft_wrap=True, highlight=False)
    for line in _notes(found):
        console.print(line, soft_wrap=True, highlight=False)


def _width(headings: list[str], rows: list[list[str]]) -> int:
    """Of the table without the verdicts, if no cell is broken."""
    columns = list(zip(headings, *rows, strict=True))
    return sum(max(map(len, column)) + 3 for column in (*columns[:-2], columns[-1])) + 1


def _notes(found: Comparison) -> list[str]:
    intervals = any(len(row.records) > 1 for row in found.rows)
    lines = [f"{len([one for row in found.rows for one in (*row.records, *row.failed)])} runs"]
    lines[0] += "".join(f"; {name} {value}" for name, value in found.about.items())
    lines += [
        f"Differences of {found.metric} from {found.baseline.name}, of the same held-out items and seeds where both "
        "have them; intervals of 95 %, p-values adjusted for their number (Holm). Rows that share a letter were not "
        "told apart."
    ]
    if intervals:
        lines.append("± is the interval of the mean over seeds (Student).")
    if found.warnings:
        lines.append("Not equal, so that the comparison may be unfair:")
        lines += [f"  {one}" for one in found.warnings]
    if found.settings:
        lines.append("Settings that differ too:")
        lines += [f"  {one}" for one in found.settings]
    return lines


def log(found: Comparison, uri: str | None, preset: str = "all") -> str | None:
    """Keep the report with the MLflow run of the sweep that all these runs are of; its id, None if they are not.

    Args:
        found: the comparison.
        uri: MLflow's tracking URI, where the runs are.
        preset: which columns.
    """
    records = [one for row in found.rows for one in (*row.records, *row.failed)]
    parents = {one.tags.get("mlflow.parentRunId") for one in records}
    if len(parents) != 1 or (parent := parents.pop()) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        write(found, Path(folder), preset, "comparison")
        client(uri).log_artifacts(parent, folder, "report")
    return parent


def write(found: Comparison, folder: Path, preset: str = "all", name: str | None = None) -> list[Path]:
    """A table as `.csv`, `.md` and `.html` with pictures, and every metric of every run as `.json`; the files.

    Args:
        found: the comparison.
        folder: made if it is not there.
        preset: which columns.
        name: of the files; None is `comparison_TIMESTAMP`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    headings, rows = table(found, preset)
    text = io.StringIO()
    numbers = [_numbers(row, found) for row in found.rows]
    writer = csv.DictWriter(text, dict.fromkeys(key for line in numbers for key in line))
    writer.writeheader()
    writer.writerows(numbers)
    name = name or f"comparison_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    contents = {
        "csv": text.getvalue(),
        "json": json.dumps(_everything(found), indent=1),
        "md": markdown(found, preset),
        "html": _page(found, headings, rows),
    }
    files = []
    for kind, content in contents.items():
        files.append(folder / f"{name}.{kind}")
        write_atomically(files[-1], content)
    return files


def markdown(found: Comparison, preset: str = "all") -> str:
    """The table and what is not equal beside it, as Markdown."""
    headings, rows = table(found, preset)
    return "\n\n".join([markdown_table(headings, rows), *_notes(found)]) + "\n"


def _page(found: Comparison, headings: list[str], rows: list[list[str]]) -> str:
    """One HTML file that needs no other, and no network."""
    from qlora_exp.results.plots import PLOTS  # matplotlib takes a second

    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    cells = f"{line(headings, 'th')}{''.join(line(row, 'td') for row in rows)}"
    body = [f"<div style='overflow-x: auto'><table>{cells}</table></div>"]
    body += [f"<p>{html.escape(note)}</p>" for note in _notes(found)]
    for title, draw in PLOTS.items():
        if figure := draw(found):
            picture = io.StringIO()
            figure.savefig(picture, format="svg")
            svg = picture.getvalue()
            body.append(f"<h2>{title}</h2>{svg[svg.index('<svg') :]}")
    return _PAGE.format(
        title=html.escape(f"{found.about.get('sweep', 'Comparison')} by {found.metric}"), body="\n".join(body)
    )


def _numbers(row: Row, found: Comparison) -> dict[str, Any]:
    """A row to compute with: means and intervals over seeds, the difference from the baseline."""
    line: dict[str, Any] = {**row.label, "seeds": len(row.records), "failed": 0, **_not_ended(row)}
    metrics = dict.fromkeys(key for one in row.records for key in one.metrics)
    for metric in (key for key in metrics if not key.startswith(("train/", "eval/"))):
        if mean := row.mean(metric):
            line[metric] = mean.value
            if metric.startswith("after/") and not math.isnan(mean.low):
                line |= {f"{metric} low": mean.low, f"{metric} high": mean.high}
    if verdict := found.verdicts.get(row.name):
        one = verdict.difference
        line |= {"difference": one.value, "difference low": one.low, "difference high": one.high, "p": verdict.p}
        line["verdict"] = verdict.text
    return line | {"ties": found.ties.get(row.name, "")}


def _everything(found: Comparison) -> dict[str, Any]:
    rows = []
    for row in found.rows:
        verdict = found.verdicts.get(row.name)
        told = verdict and {
            "difference": _number(verdict.difference.value),
            "low": _number(verdict.difference.low),
            "high": _number(verdict.difference.high),
            "p": _number(verdict.p),
            "verdict": verdict.text,
        }
        rows.append(
            {
                "label": row.label,
                "baseline": row is found.baseline,
                "against_baseline": told,
                "ties": found.ties.get(row.name),
                "runs": [
                    {
                        "run_id": one.run_id,
                        "name": one.name,
                        "outcome": one.outcome,
                        "seed": one.params.get("seed"),
                        "metrics": {key: _number(value) for key, value in one.metrics.items()},
                    }
                    for one in (*row.records, *row.failed)
                ],
            }
        )
    return {
        "metric": found.metric,
        "about": found.about,
        "not_equal": found.warnings,
        "settings": found.settings,
        "rows": rows,
    }


def _number(value: float) -> float | None:
    """As JSON knows numbers."""
    return value if math.isfinite(value) else None
