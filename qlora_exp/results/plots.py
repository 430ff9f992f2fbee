"""Draw the plots of a comparison. Each function returns a figure, or None if the runs have no data for it.

The plots suit print and colour-blind readers: they use the palette of Okabe and Ito (2008), and never colour alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qlora_exp.results.compare import Comparison
from qlora_exp.results.row import Row
from qlora_exp.utils.text import shortened

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"
LINES = ("-", "--", "-.", ":")
NAMED = 12
"""Number of rows that colours and markers can distinguish; with more, only the best and the baseline are named."""
_NAME = 50
"""Most characters of a row's label."""
HATCHES = ("", "//", "\\\\", "..", "xx", "++", "oo", "**")
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

mpl.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
mpl.rcParams["text.parse_math"] = False  # a regular expression in a label is not a formula
mpl.rcParams["axes.formatter.useoffset"] = False  # show a loss as it is, without an offset


@dataclass(frozen=True)
class _Point:
    row: Row
    memory: float
    value: float


def memory_and_quality(comparison: Comparison) -> Figure | None:
    """Draw the metric over peak memory; rows that no other row beats in both are joined by a line and named."""
    key = _memory_key(comparison)
    points = []
    for row in _measured(comparison):
        memory, value = row.mean(key), row.mean(f"after/{comparison.metric}")
        if memory and value:
            points.append(_Point(row, memory.value, value.value))
    if len(points) < 2:
        return None
    sign = 1 if comparison.lower_is_better else -1
    front = pareto([(point.memory, sign * point.value) for point in points])
    figure, axes = _figure(7, 5)
    for index, point in enumerate(points):
        few_points = len(points) <= NAMED
        axes.plot(
            point.memory,
            point.value,
            MARKERS[index % len(MARKERS)] if few_points else "o",
            color=COLOURS[index % len(COLOURS)] if few_points else (COLOURS[0] if index in front else COLOURS[-1]),
            markersize=9 if index in front else 6,
            markeredgecolor="black" if index in front else "none",
            label=_name(point.row) if few_points else None,
        )
    line = sorted((points[index].memory, points[index].value) for index in front)
    axes.step(*zip(*line, strict=True), where="post", color="black", linewidth=0.8, label="no row is better in both")
    if len(points) > NAMED:
        for index in front:
            point = points[index]
            axes.annotate(_name(point.row), (point.memory, point.value), (6, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("peak memory, MiB")
    axes.set_ylabel(_named(comparison))
    _legend(axes)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto front: points for which no other is <= in both coordinates and < in one."""
    return [
        index
        for index, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    ]


def ranked(comparison: Comparison) -> Figure | None:
    """Draw the metric of each row, best first, with its interval over seeds and the letters of ties.

    Points instead of bars, because the axis does not begin at zero.
    """
    rows = [(row, value) for row in _measured(comparison) if (value := row.mean(f"after/{comparison.metric}"))]
    if not rows:
        return None
    # The best row comes last, so that it is drawn on top.
    rows.sort(key=lambda pair: pair[1].value, reverse=comparison.lower_is_better)
    figure, axes = _rows_figure([row for row, _ in rows], 0.2, comparison.baseline)
    for place, (row, value) in enumerate(rows):
        half = [[0.0], [0.0]] if math.isnan(value.low) else [[value.value - value.low], [value.high - value.value]]
        colour, marker = (COLOURS[1], "D") if row is comparison.baseline else (COLOURS[0], "o")
        axes.errorbar(value.value, place, xerr=half, fmt=marker, color=colour, capsize=2)
        if len(rows) <= 30:
            axes.text(
                1.01,
                place,
                comparison.ties.get(row.name, ""),
                transform=axes.get_yaxis_transform(),
                va="center",
                fontsize=8,
            )
    axes.grid(axis="y", linewidth=0.3)
    axes.set_xlabel(
        _named(comparison) + ("\nrows that share a letter do not differ significantly" if len(rows) <= 30 else "")
    )
    return figure


def curves(comparison: Comparison) -> Figure | None:
    """Draw held-out loss during training (training loss if none was measured), a line for each row's first seed."""
    for metric, name in (("eval/loss", "held-out loss"), ("train/loss", "training loss")):
        lines = [(row, row.records[0].curve(metric)) for row in _measured(comparison)]
        lines = [(row, line) for row, line in lines if len(line) > 1]
        if not lines:
            continue
        figure, axes = _figure(7, 4.5)
        best = {row.name for row, _ in sorted(lines, key=lambda pair: pair[1][-1][1])[:5]} | {comparison.baseline.name}
        for index, (row, line) in enumerate(lines):
            shown = len(lines) <= NAMED or row.name in best
            axes.plot(
                *zip(*line, strict=True),
                LINES[index // len(COLOURS) % len(LINES)],
                color=COLOURS[index % len(COLOURS)] if shown else "#cccccc",
                marker=MARKERS[index % len(MARKERS)] if len(line) <= 20 and shown else None,
                linewidth=1.5 if shown else 0.7,
                zorder=2 if shown else 1,
                label=_name(row) if shown else None,
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        _legend(axes)
        return figure
    return None


def memory_by_phase(comparison: Comparison) -> Figure | None:
    """Draw by how much each phase raises the peak memory of the phases before it; stacked, this is the run's peak.

    The peaks of phases do not add up, because phases follow one another; a phase below an earlier peak adds nothing.
    """
    key = _memory_key(comparison)
    kind = key.removesuffix("_peak_mib").removeprefix("memory/")
    rows = [row for row in _measured(comparison)[::-1] if row.mean(key)]
    metric_of_phase = [(name, path.format(kind)) for name, path in PHASES.items()]
    phases = [(name, path) for name, path in metric_of_phase if any(row.mean(path) for row in rows)]
    if not rows or not phases:
        return None
    figure, axes = _rows_figure(rows, 0.25, comparison.baseline)
    left = np.zeros(len(rows))
    for index, (name, path) in enumerate(phases):
        peaks = np.array([peak.value if (peak := row.mean(path)) else 0.0 for row in rows])
        added = np.maximum(peaks - left, 0)
        if added.any():
            style = {
                "color": COLOURS[index % len(COLOURS)],
                "hatch": _hatch(index),
                "edgecolor": "white",
                "linewidth": 0.5,
            }
            axes.barh(range(len(rows)), added, left=left, height=0.75, label=name, **style)
        left += added
    axes.set_xlabel("peak memory, MiB, and what each phase adds to it")
    _legend(axes)
    return figure


def _hatch(index: int) -> str:
    """Return the pattern of a bar; bars that repeat a colour get another pattern."""
    return HATCHES[(index + index // len(COLOURS)) % len(HATCHES)]


def rank_and_alpha(comparison: Comparison) -> Figure | None:
    """Draw a heat map of the metric over r and lora_alpha, one map for each combination of the other swept keys."""
    maps: dict[str, dict[tuple[float, float], float]] = {}
    for row in _measured(comparison):
        value = row.mean(f"after/{comparison.metric}")
        if value and row.label.get("method.r") and row.label.get("method.lora_alpha"):
            rest = _rest(row, "method.r", "method.lora_alpha")
            place = float(row.label["method.r"]), float(row.label["method.lora_alpha"])
            maps.setdefault(rest, {})[place] = value.value
    if not maps or len(maps) > NAMED:
        return None
    ranks = sorted({r for grid_values in maps.values() for r, _ in grid_values})
    alphas = sorted({alpha for grid_values in maps.values() for _, alpha in grid_values})
    all_values = [value for grid_values in maps.values() for value in grid_values.values()]
    figure = Figure(
        figsize=(1.5 + max(2.5, 0.8 * len(alphas)) * len(maps), 1.5 + 0.6 * len(ranks)), layout="constrained"
    )
    for axes, (rest, grid_values) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        grid = np.array([[grid_values.get((r, alpha), np.nan) for alpha in alphas] for r in ranks])
        axes.imshow(grid, cmap="cividis", vmin=min(all_values), vmax=max(all_values), aspect="auto")
        middle = (min(all_values) + max(all_values)) / 2
        for y, x in np.argwhere(~np.isnan(grid)):
            colour = "white" if grid[y, x] < middle else "black"
            axes.text(x, y, f"{grid[y, x]:.4g}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        axes.set_yticks(range(len(ranks)), [f"{r:g}" for r in ranks])
        axes.set_xlabel("lora_alpha")
        axes.set_ylabel("r")
        axes.set_title(rest or _named(comparison), fontsize=9)
    figure.suptitle(_named(comparison), fontsize=9)
    return figure


def over_rank(comparison: Comparison) -> Figure | None:
    """Draw the metric over r, a line for each combination of the other swept keys, such as LoRA and rsLoRA."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in _measured(comparison):
        value = row.mean(f"after/{comparison.metric}")
        if value and row.label.get("method.r"):
            rest = _rest(row, "method.r")
            lines.setdefault(rest, []).append((float(row.label["method.r"]), value.value, value.low, value.high))
    lines = {rest: sorted(line) for rest, line in lines.items() if len(line) > 1}
    if not lines or len(lines) > NAMED:
        return None
    figure, axes = _figure(6, 4)
    for index, (rest, line) in enumerate(lines.items()):
        r, mean, low, high = (np.array(column) for column in zip(*line, strict=True))
        errors = np.nan_to_num(np.stack([mean - low, high - mean]))
        style = MARKERS[index % len(MARKERS)] + LINES[index % len(LINES)]
        axes.errorbar(r, mean, errors, fmt=style, color=COLOURS[index % len(COLOURS)], capsize=3, label=rest or None)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted({point[0] for line in lines.values() for point in line}), [f"{r:g}" for r in ticks])
    axes.minorticks_off()
    axes.set_xlabel("r")
    axes.set_ylabel(_named(comparison))
    if any(lines):
        _legend(axes)
    return figure


PLOTS: dict[str, Callable[[Comparison], Figure | None]] = {
    "Memory against quality": memory_and_quality,
    "Ranked": ranked,
    "Over rank": over_rank,
    "Rank and alpha": rank_and_alpha,
    "Loss curves": curves,
    "Memory by phase": memory_by_phase,
}
"""Plot functions by title."""


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _name(row: Row) -> str:
    """Return a row's label, short enough to leave room for the axes."""
    return shortened(row.short, _NAME)


def _rest(row: Row, *drawn: str) -> str:
    """Return a row's label without the keys that the axes show."""
    rest = {key: value for key, value in row.label.items() if key not in drawn}
    return shortened(" ".join(f"{key.rpartition('.')[2]}={value}" for key, value in rest.items()), _NAME)


def _rows_figure(rows: Sequence[Row], height: float, baseline: Row) -> tuple[Figure, Any]:
    """Return a figure and axes with one line for each row, from the bottom up."""
    figure, axes = _figure(7, 1 + height * len(rows))
    names = [f"{_name(row)} (baseline)" if row is baseline else _name(row) for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8 if len(rows) <= 30 else 6)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _named(comparison: Comparison) -> str:
    words = {"loss": "held-out loss", "rougeL": "ROUGE-L"}.get(comparison.metric, comparison.metric.replace("_", " "))
    return f"{words} ({'lower' if comparison.lower_is_better else 'higher'} is better)"


def _measured(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if row.records]


def _memory_key(comparison: Comparison) -> str:
    allocated = "memory/allocated_peak_mib"
    return allocated if all(row.mean(allocated) for row in _measured(comparison)) else "memory/rss_peak_mib"
