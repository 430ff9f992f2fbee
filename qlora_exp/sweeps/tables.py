"""Print what a sweep will do, and the outcomes of its jobs."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora_exp.sweeps.jobs import NOT_FAILED, UNFINISHED, Action, Job
from qlora_exp.utils.tables import make_table
from qlora_exp.utils.text import shortened

_NOTE = 300
"""Most characters of a failure in a table."""
_OPTIONAL = ("train loss", "tokens/s", "forgotten", "exact match")
"""Columns that are left out if the terminal is too narrow, in this order."""


def row(job: Job, last: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table row of a job.

    Args:
        job: the job.
        last: how it ended, from `Sweep.ended`.
    """
    metrics = last.get("metrics", {})
    columns = (
        ("loss", metrics.get("after/loss"), ".4f"),
        *(
            (name.removeprefix("after/source_"), metrics[name], ".4f")
            for name in sorted(metrics)
            if name.startswith("after/source_loss/")
        ),
        ("ROUGE-L", metrics.get("after/rougeL"), ".3f"),
        ("exact match", metrics.get("after/exact_match"), ".3f"),
        ("task score", metrics.get("after/task_score"), ".3f"),
        *((name.removeprefix("after/"), metrics[name], ".4g") for name in _scores(metrics, "after/metric/")),
        *((name.removeprefix("after/lm_eval/"), metrics[name], ".3f") for name in _scores(metrics, "after/lm_eval/")),
        ("forgotten", metrics.get("forgetting"), "+.4f"),
        ("train loss", metrics.get("final_train_loss", metrics.get("train/loss")), ".4f"),
        ("peak MiB", metrics.get("memory/allocated_peak_mib", metrics.get("memory/rss_peak_mib")), ".0f"),
        ("tokens/s", metrics.get("tokens_per_second"), ".0f"),
        ("seconds", last.get("seconds"), ".0f"),
    )
    values = {name: format(value, number_format) for name, value, number_format in columns if value is not None}
    if note := last.get("failure") or (f"MLflow run {last['run_id']}" if "run_id" in last else ""):
        values["note"] = note
    return {**job.swept, "outcome": last["outcome"], **values, "key": job.key}


def further_scores(metrics: Iterable[str]) -> list[str]:
    """Return the names of the scores after training of installed packages' metrics, then those of lm-eval."""
    return [*_scores(metrics, "after/metric/"), *_scores(metrics, "after/lm_eval/")]


def _scores(metrics: Iterable[str], prefix: str) -> list[str]:
    return sorted(name for name in metrics if name.startswith(prefix))


def show_plan(
    todo: Sequence[Job], plan: Mapping[str, tuple[Action, str]], folder: Path, together: Mapping[str, str]
) -> None:
    """Print what will happen to each job, and why; if jobs are trained together, with which."""
    rows = [[number, job.name, *plan[job.key], together.get(job.key, "")] for number, job in enumerate(todo)]
    columns = ["", "job", "what", "why", "together"]
    if not together:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    _console().print(make_table(columns, rows, f"{folder.name}: {len(todo)} jobs"))


def show_rows(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Print the outcome of each job; columns that a narrow terminal has no room for are in the sweep's `jobs.json`."""
    console = _console()
    names = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    columns = sorted((name for name in names if name != "key"), key="note".__eq__)  # the longest text comes last
    without_limit = console.options.update(max_width=10_000)
    for left_out in (*_OPTIONAL, ""):
        longest = {name: _NOTE if name == "note" else 80 for name in columns}
        cells = [[shortened(str(row.get(name, "")), most) for name, most in longest.items()] for row in rows]
        table = make_table(columns, cells, folder.name)
        if console.measure(table, options=without_limit).maximum <= console.width:
            break
        columns = [name for name in columns if name != left_out]
    console.print(table)


def _console() -> Console:
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:  # a log file has no width
        console.width = 200
    return console


def advice(outcomes: Sequence[str]) -> str:
    """Return advice about jobs that did not end well; empty if all did."""
    unfinished = sum(outcome in UNFINISHED for outcome in outcomes)
    failed = len(outcomes) - unfinished - sum(outcome in NOT_FAILED for outcome in outcomes)
    parts = [f"{failed} failed: sweep.rerun=failed runs them again"] * bool(failed)
    parts += [f"{unfinished} did not finish: the same command resumes them"] * bool(unfinished)
    return f"{failed + unfinished} of {len(outcomes)} jobs did not end well; {'; '.join(parts)}" if parts else ""
