"""Collect what the page of a comparison shows, as plain data for JSON: rows, runs, curves, answers, losses.

Everything is limited, so that the page stays fluid. What is left out is counted and said on the page.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from qlora_exp.results.compare import Comparison
from qlora_exp.results.page import looks
from qlora_exp.results.record import Record
from qlora_exp.results.row import Row
from qlora_exp.utils.display import NEWLINES, shown, visible
from qlora_exp.utils.errors import ConfigError, TrackingError
from qlora_exp.utils.secrets import redacted

ROWS = 1000
"""Most rows."""
RUNS = 600
"""Most runs whose curves, answers and losses are on the page."""
POINTS = 500
"""Most points of a curve."""
PROMPTS, ANSWERS = 500, 20_000
"""Most held-out prompts, and most answers of all runs together."""
TEXT = 4000
"""Most characters of a prompt, a reference or an answer."""
ITEMS, LOSSES = 2000, 500_000
"""Most held-out items, and most losses of all runs together."""
PHASES = {
    "imports": "memory/baseline/{}_mib",
    "load": "memory/load/{}_peak_mib",
    "initialize": "memory/initialize/{}_peak_mib",
    "evaluation before": "memory/evaluate_before/{}_peak_mib",
    "generation before": "memory/generate_before/{}_peak_mib",
    "first step": "memory/first_step/{}_peak_mib",
    "steady steps": "memory/steady/{}_peak_mib",
    "evaluation in training": "memory/evaluation/{}_peak_mib",
    "evaluation after": "memory/evaluate_after/{}_peak_mib",
    "generation after": "memory/generate_after/{}_peak_mib",
    "save": "memory/save/{}_peak_mib",
}
"""Metric of each phase's peak memory, by phase name in the order of a run; `{}` is the kind of memory."""
CURVES = {"eval/loss": "held-out loss", "train/loss": "training loss"}
"""Metrics that are drawn over steps, in nats per token."""
_COSTS = (
    # Name with unit, direction, metric.
    ("trainable parameters", "lower", "trainable_parameters"),
    ("saved model, bytes", "lower", "model_bytes"),
    ("energy, J", "lower", "energy_joules"),
    ("training speed, tokens per second", "higher", "tokens_per_second"),
)
LINES = 64
"""Most lines over r, and phases, in one figure: so many looks are on the page, however few rows there are."""
_NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?(?=$|[ x%])", re.IGNORECASE)
_NAME, _BRIEF = 60, 20
"""Most characters of a row's name, and of the one for narrow figures."""

Runs = list[tuple[int, Record]]
"""Runs with their places in the content's list of runs."""


def collect(
    comparison: Comparison, headings: Sequence[str], cells: dict[Row, list[str]], notes: Sequence[str]
) -> dict[str, Any]:
    """Return the content of the page, without secrets and control characters.

    Args:
        comparison: the comparison.
        headings: headings of the table.
        cells: cells of each row of the table, in the table's order.
        notes: lines of notes on the table.
    """
    left_out: Counter[str] = Counter()
    best = set(_best_first(comparison, list(cells))[:ROWS])
    left_out["rows, the worst, are not on this page; the .csv and .json files have them"] += len(cells) - len(best)
    rows = [row for row in cells if row in best]
    cells = {row: cells[row] for row in rows}
    runs = [(place, record) for place, row in enumerate(rows) for record in (*row.records, *row.failed)]
    detailed = _detailed(comparison, rows, runs, left_out)
    answers = _answers(detailed, left_out)
    content = {
        "title": f"{comparison.about.get('sweep', 'Comparison')} by {comparison.metric}",
        "about": comparison.about,
        "metric": {
            "name": looks.metric_name(comparison.metric),
            "label": looks.metric_label(comparison),
            "lower": comparison.lower_is_better,
        },
        "headings": list(headings),
        "sorts": _sorts(comparison, rows, headings, cells),
        "labels": len(rows[0].label),
        "baseline": rows.index(comparison.baseline),
        "rows": _rows(comparison, cells),
        "costs": _costs(rows),
        "phases": _phases(rows),
        "looks": [asdict(looks.look(index)) for index in range(max(len(rows), LINES))],
        "runs": _runs(runs),
        "curves": {name: _curves(metric, rows, detailed, left_out) for metric, name in CURVES.items()},
        "answers": answers,
        "losses": _losses(detailed, answers, left_out),
        "notes": list(notes),
        "left_out": [f"{count:,} {what}" for what, count in left_out.items() if count],
    }
    clean: dict[str, Any] = _plain(redacted(content))
    return clean


def memory_kind(rows: Sequence[Row]) -> str:
    """Return the kind of memory that all rows have: `allocated` on the device, or else `rss`, of the process."""
    measured = [row for row in rows if row.records]
    return "allocated" if all(row.mean("memory/allocated_peak_mib") for row in measured) else "rss"


def added_by_phase(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Return by how many MiB each phase raises the peak memory of the phases before it, for each row.

    The peaks of phases do not add up, because phases follow one another; a phase below an earlier peak adds nothing.
    """
    kind = memory_kind(rows)
    peaks, added = [0.0] * len(rows), {}
    for name, metric in PHASES.items():
        values = [peak.value if (peak := row.mean(metric.format(kind))) else 0.0 for row in rows]
        added[name] = [max(0.0, value - peak) for value, peak in zip(values, peaks, strict=True)]
        peaks = [max(value, peak) for value, peak in zip(values, peaks, strict=True)]
    return {name: values for name, values in added.items() if any(values)}


def _best_first(comparison: Comparison, rows: Sequence[Row]) -> list[Row]:
    """Return the baseline, then the other rows, the best first; rows without a value come last."""
    sign = 1 if comparison.lower_is_better else -1

    def order(row: Row) -> tuple[bool, float]:
        value = row.mean(f"after/{comparison.metric}")
        return row is not comparison.baseline, sign * value.value if value else math.inf

    return sorted(rows, key=order)


def _detailed(comparison: Comparison, rows: list[Row], runs: Runs, left_out: Counter[str]) -> Runs:
    """Return the runs with curves, answers and losses, by their places in `runs`: those of the best rows."""
    kept: set[int] = set()
    for row in _best_first(comparison, rows):
        if len(kept) + len(row.records) > RUNS:
            break
        kept |= {id(record) for record in row.records}
    left_out["runs, of the worst rows, have no curves, answers and losses on this page"] += sum(
        len(row.records) for row in rows
    ) - len(kept)
    return [(index, record) for index, (_, record) in enumerate(runs) if id(record) in kept]


def _sorts(
    comparison: Comparison, rows: list[Row], headings: Sequence[str], cells: dict[Row, list[str]]
) -> list[list[float | None] | None]:
    """Return for each column the numbers that it is sorted by; None: it is sorted as text."""
    columns: list[list[float | None] | None] = []
    for heading, *column in zip(headings, *cells.values(), strict=True):
        if heading.endswith("against the baseline"):
            verdicts = [comparison.verdicts.get(row.name) for row in rows]
            differences = [verdict.difference.value if verdict else None for verdict in verdicts]
            differences[rows.index(comparison.baseline)] = 0.0
            columns.append([None if each is None else _number(each) for each in differences])
            continue
        matches = [_NUMBER.match(text) for text in column]
        is_number = all(match or not text for match, text in zip(matches, column, strict=True))
        columns.append(
            [float(match[0].replace(",", "")) if match else None for match in matches] if is_number else None
        )
    return columns


def _rows(comparison: Comparison, cells: dict[Row, list[str]]) -> list[dict[str, Any]]:
    rows = list(cells)
    described = []
    for row, name, brief in zip(rows, looks.names(rows, _NAME), looks.names(rows, _BRIEF), strict=True):
        value = row.mean(f"after/{comparison.metric}")
        described.append(
            {
                "name": name,
                "label": row.label,
                "brief": brief,
                "cells": cells[row],
                "value": value and [_number(each) for each in (value.value, value.low, value.high)],
                "ties": comparison.ties.get(row.name, ""),
                "rest": {"r": rest(row, "method.r"), "map": rest(row, "method.r", "method.lora_alpha")},
            }
        )
    return described


def rest(row: Row, *drawn: str) -> str:
    """Return a row's label without the keys that the axes show."""
    words = (f"{key.rpartition('.')[2]}={value}" for key, value in row.label.items() if key not in drawn)
    return shown(" ".join(words))


def _costs(rows: list[Row]) -> list[dict[str, Any]]:
    """Return what quality can be drawn against: name with unit, direction, and the value of each row."""
    kind = memory_kind(rows)
    where = {"allocated": "peak memory on the device, MiB", "rss": "peak memory of the process, MiB"}[kind]
    named = [(where, "lower", f"memory/{kind}_peak_mib"), *_COSTS]
    costs = [
        {"name": name, "better": better, "values": [mean and _number(mean.value) for mean in map(_mean(metric), rows)]}
        for name, better, metric in named
    ]
    times = [(row.mean("step_seconds_mean"), row.mean("steps")) for row in rows]
    minutes = [_number(step.value * steps.value / 60) if step and steps else None for step, steps in times]
    costs.insert(1, {"name": "training time, minutes", "better": "lower", "values": minutes})
    return [cost for cost in costs if sum(value is not None for value in cost["values"]) > 1]


def _mean(metric: str) -> Any:
    return lambda row: row.mean(metric)


def _phases(rows: list[Row]) -> dict[str, Any]:
    kind = {"allocated": "on the device", "rss": "of the process"}[memory_kind(rows)]
    added = {name: [_number(value) for value in values] for name, values in added_by_phase(rows).items()}
    return {"name": f"peak memory {kind}, MiB (lower is better)", "added": added}


def _runs(runs: Runs) -> dict[str, Any]:
    """Return settings and metrics of all runs; settings that all have in common only once."""
    records = [record for _, record in runs]
    first = records[0].params
    common = {key: value for key, value in first.items() if all(each.params.get(key) == value for each in records)}
    metrics = sorted({name for record in records for name in record.metrics})
    return {
        "common": common,
        "metrics": metrics,
        "list": [
            {
                "row": place,
                "id": record.run_id,
                "name": record.name,
                "outcome": record.outcome,
                "failure": record.tags.get("failure", ""),
                "seed": record.params.get("seed", ""),
                "settings": {key: value for key, value in record.params.items() if key not in common},
                "values": [_number(record.metrics.get(name, math.nan)) for name in metrics],
            }
            for place, record in runs
        ],
    }


@lru_cache(maxsize=128)
def curves_of(row: Row, metric: str) -> list[list[tuple[int, float]]]:
    """Return the points of a metric of each successful run of a row; empty if a run did not log it."""
    return [record.curve(metric) if metric in record.metrics else [] for record in row.records]


def _curves(metric: str, rows: list[Row], runs: Runs, left_out: Counter[str]) -> dict[int, list[list[float | None]]]:
    """Return steps and values of a metric by run."""
    curves: dict[int, list[list[float | None]]] = {}
    places = {id(record): place for place, record in runs}
    for row in rows:
        if not row.records or id(row.records[0]) not in places:
            continue
        for record, points in zip(row.records, curves_of(row, metric), strict=True):
            every = max(1, math.ceil((len(points) - 1) / (POINTS - 1)))
            kept = points[::every]
            if points and kept[-1] != points[-1]:
                kept = [*kept[: POINTS - 1], points[-1]]
            left_out[f"points of curves: of more than {POINTS}, every k-th is drawn"] += len(points) - len(kept)
            if len(kept) > 1:
                curves[places[id(record)]] = [[step for step, _ in kept], [_number(value) for _, value in kept]]
    return curves


def _answers(runs: Runs, left_out: Counter[str]) -> dict[str, Any]:
    """Return the held-out prompts with their references, and of each run its answers and their scores."""
    places: dict[tuple[str, str], int] = {}
    of_run: dict[int, list[dict[str, Any]]] = {}
    count = 0
    for place, record in runs:
        try:
            answers = record.answers
        except (ConfigError, TrackingError) as error:
            left_out[f"run without answers on this page: {error}"] += 1
            continue
        for item, answer in enumerate(answers):
            prompt = str(answer.get("prompt", "")), str(answer.get("reference", ""))
            if count == ANSWERS or (prompt not in places and len(places) == PROMPTS):
                left_out["answers are not on this page; they are in the runs' answers.json"] += 1
                continue
            count += 1
            numbers = {name: value for name, value in answer.items() if isinstance(value, int | float)}
            scores = {name: _number(value) for name, value in numbers.items()}
            text = _limited(str(answer.get("answer", "")), left_out)
            at = places.setdefault(prompt, len(places))
            line = {"item": item, "prompt": at, "text": text, "scores": scores}
            of_run.setdefault(place, []).append(line)
    prompts = [[_limited(text, left_out) for text in prompt] for prompt in places]
    return {"prompts": prompts, "of_run": of_run}


def _losses(runs: Runs, answers: dict[str, Any], left_out: Counter[str]) -> dict[str, Any]:
    """Return of each run the loss per token of each held-out item, and which runs have the same items."""
    sets: dict[tuple[Any, ...], int] = {}
    prompts: dict[int, dict[int, int]] = {}
    of_run: dict[int, dict[str, Any]] = {}
    count = 0
    for place, record in runs:
        try:
            losses = record.losses
        except (ConfigError, TrackingError) as error:
            left_out[f"run without losses on this page: {error}"] += 1
            continue
        kept = losses[: min(ITEMS, LOSSES - count)]
        left_out["losses of held-out items are not on this page; they are in the runs' after_losses.jsonl"] += len(
            losses
        ) - len(kept)
        if not kept:
            continue
        count += len(kept)
        tokens = tuple(item["tokens"] for item in losses)
        items = sets.setdefault((record.params.get("data.evaluation_fingerprint", record.run_id), tokens), len(sets))
        # The first held-out items are those that are answered.
        answered = {answer["item"]: answer["prompt"] for answer in answers["of_run"].get(place, [])}
        prompts.setdefault(items, {}).update(answered)
        values = [_number(item["nll"] / item["tokens"]) if item["tokens"] else None for item in kept]
        of_run[place] = {"items": items, "values": values}
    lengths = [[_number(each) for each in tokens[:ITEMS]] for _, tokens in sets]
    return {"tokens": lengths, "prompts": prompts, "of_run": of_run}


def _limited(text: str, left_out: Counter[str]) -> str:
    if len(text) <= TEXT:
        return text
    left_out[f"texts are cut to {TEXT:,} characters"] += 1
    return f"{text[:TEXT]}… ({len(text) - TEXT:,} more characters)"


def _number(value: float) -> float | None:
    """Return a value with 7 digits; None if it is NaN or infinite, which JSON cannot represent."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Make control characters in nested lists and dictionaries visible, line breaks excepted."""
    if isinstance(value, str):
        return visible(value, keep=NEWLINES)
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
