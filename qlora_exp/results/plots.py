"""Draw the plots of a comparison. Each function returns a figure, or None if the runs have no data for it.

The plots suit print and colour-blind readers: they use the palette of Okabe and Ito (2008), and never colour alone.
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from qlora_exp.results.compare import Comparison
from qlora_exp.results.page import looks
from qlora_exp.results.page.data import CURVES, added_by_phase, curves_of, memory_kind, rest
from qlora_exp.results.row import Row
from qlora_exp.utils.files import write_atomically

NAMED = 12
"""Most maps, and most lines over r, in a figure."""
DRAWN, ROWS = 64, 200
"""Most rows with looks of their own, and most lines of a figure with a line for each row; others are left out."""
_OTHERS = "#b4bec7"
_PIXELS = 20_000
"""Most pixels of a picture's longer side."""
_NAME, _BRIEF = 50, 24
"""Most characters of a row's name on an axis or in a legend, and at a point."""
HATCHES = ("", "//", "\\\\", "..", "xx", "++", "oo", "**")

mpl.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
mpl.rcParams["text.parse_math"] = False  # a regular expression in a label is not a formula
mpl.rcParams["axes.formatter.useoffset"] = False  # show a loss as it is, without an offset


def memory_and_quality(comparison: Comparison) -> Figure | None:
    """Draw the metric over peak memory, and the line of rows that no other row beats in both.

    Points have names where they fit; if some do not, a legend names all rows. Of more than `DRAWN` rows, those on the
    line and the baseline are named.
    """
    key = f"memory/{memory_kind(comparison.rows)}_peak_mib"
    rows, points = [], []
    for row in _measured(comparison):
        memory, value = row.mean(key), row.mean(f"after/{comparison.metric}")
        if memory and value:
            rows.append(row)
            points.append((memory.value, value.value))
    if len(points) < 2:
        return None
    sign = 1 if comparison.lower_is_better else -1
    front = pareto([(memory, sign * value) for memory, value in points])
    own = [
        index
        for index in range(len(rows))
        if len(rows) <= DRAWN or index in front or rows[index] is comparison.baseline
    ]
    figure, axes = _figure(7, 5)
    look_of = _looks(comparison)
    handles = []
    for index, point in enumerate(points):
        look, named = look_of[rows[index]], index in own
        handles += axes.plot(
            *point,
            look.marker if named else "o",
            color=look.colour if named else _OTHERS,
            markersize=9 if index in front else 6,
            markeredgecolor="black" if index in front else "none",
            zorder=3 if named else 1,
        )
    line = sorted(points[index] for index in front)
    axes.step(*zip(*line, strict=True), where="post", color="black", linewidth=0.8, zorder=2)
    axes.margins(0.12)
    axes.set_xlabel(_memory_label(comparison))
    axes.set_ylabel(looks.metric_label(comparison))
    names = dict(zip(own, looks.names([rows[index] for index in own], _BRIEF), strict=True))
    if not _name_points(figure, axes, points, names) and len(rows) <= DRAWN:
        _legend(figure, [handles[index] for index in own], looks.names([rows[index] for index in own], _NAME))
        _name_points(figure, axes, points, names)
    return figure


def _name_points(figure: Figure, axes: Any, points: Sequence[tuple[float, float]], names: dict[int, str]) -> bool:
    """Write names at points where they cover no point and no other name; return whether all fit."""
    for text in list(axes.texts):
        text.remove()
    figure.draw_without_rendering()  # so that the axes have their place
    figure.set_layout_engine("none")  # and keep it
    spots = axes.transData.transform(points)
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    fits = 0
    for index, name in names.items():
        for x, y in ((7, 4), (7, -11), (-7, 4), (-7, -11), (0, 9), (0, -16)):
            side = ("left", "right", "center")[0 if x > 0 else 1 if x < 0 else 2]
            where: dict[str, Any] = {"xytext": (x, y), "textcoords": "offset points", "fontsize": 7, "ha": side}
            text = axes.annotate(name, points[index], **where)
            box = text.get_window_extent()
            inside = (
                axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            )
            if inside and not box.count_overlaps([*taken[:index], *taken[index + 1 :]]):
                taken.append(box)
                fits += 1
                break
            text.remove()
    return fits == len(names)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto front: points for which no other is <= in both coordinates and < in one."""
    front: list[int] = []
    best = (math.inf, math.inf)
    for index in sorted(range(len(points)), key=points.__getitem__):
        if points[index][1] < best[1] or points[index] == best:
            best = points[index]
            front.append(index)
    return sorted(front)


def ranked(comparison: Comparison) -> Figure | None:
    """Draw the metric of each row, best first, with its interval over seeds and the letters of ties.

    Points instead of bars, because the axis does not begin at zero.
    """
    best = _best(comparison, ROWS)
    rows = [(row, value) for row in best if (value := row.mean(f"after/{comparison.metric}"))]
    # The best row comes last, so that it is drawn on top.
    rows.sort(key=lambda pair: pair[1].value, reverse=comparison.lower_is_better)
    figure, axes = _rows_figure([row for row, _ in rows], 0.2, comparison)
    for place, (row, value) in enumerate(rows):
        half = [[0.0], [0.0]] if math.isnan(value.low) else [[value.value - value.low], [value.high - value.value]]
        colour, marker = (looks.COLOURS[1], "D") if row is comparison.baseline else (looks.COLOURS[0], "o")
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
        looks.metric_label(comparison)
        + ("\nrows that share a letter do not differ significantly" if len(rows) <= 30 else "")
    )
    return figure


def curves(comparison: Comparison) -> Figure | None:
    """Draw held-out loss during training (training loss if none was measured) of the best rows and the baseline.

    The line is the mean over seeds; a band reaches from the lowest seed to the highest.
    """
    rows = _best(comparison, DRAWN)
    for metric, name in CURVES.items():
        lines = {row: line for row in rows if len((line := _over_seeds(curves_of(row, metric)))[0]) > 1}
        if not lines:
            continue
        figure, axes = _figure(7, 4.5)
        look_of = _looks(comparison)
        handles = []
        for row, (steps, mean, low, high) in lines.items():
            look = look_of[row]
            handles += axes.plot(
                steps,
                mean,
                linestyle=(0, look.dashes) if look.dashes else "-",
                color=look.colour,
                marker=look.marker,
                markevery=max(1, len(steps) // 8),
                markersize=5,
                linewidth=1.3,
            )
            axes.fill_between(steps, low, high, color=look.colour, alpha=0.15, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"{name}, nats per token (lower is better)")
        if len(rows) < len(_measured(comparison)):
            axes.set_title(f"the best {len(lines)} of {len(_measured(comparison))} rows", fontsize=9)
        _legend(figure, handles, looks.names(list(lines), _NAME))
        return figure
    return None


def _over_seeds(lines: Sequence[Sequence[tuple[int, float]]]) -> tuple[Any, Any, Any, Any]:
    """Return steps, mean, lowest and highest value over seeds; between its own steps, a seed's line is straight."""
    lines = [line for line in lines if len(line) > 1]
    first, last = max((line[0][0] for line in lines), default=0), min((line[-1][0] for line in lines), default=-1)
    steps = sorted({step for line in lines for step, _ in line if first <= step <= last})
    if not steps:
        return (np.array([]),) * 4
    values = np.array([np.interp(steps, [step for step, _ in line], [value for _, value in line]) for line in lines])
    return steps, values.mean(0), values.min(0), values.max(0)


def memory_by_phase(comparison: Comparison) -> Figure | None:
    """Draw by how much each phase raises the peak memory of the phases before it; stacked, this is the run's peak."""
    key = f"memory/{memory_kind(comparison.rows)}_peak_mib"
    rows = [row for row in _best(comparison, ROWS)[::-1] if row.mean(key)]
    phases = added_by_phase(rows)
    if not rows or not phases:
        return None
    figure, axes = _rows_figure(rows, 0.25, comparison)
    left = np.zeros(len(rows))
    for index, (name, added) in enumerate(phases.items()):
        style = {"color": looks.COLOURS[index % len(looks.COLOURS)], "hatch": _hatch(index), "edgecolor": "white"}
        axes.barh(range(len(rows)), added, left=left, height=0.75, label=name, linewidth=0.5, **style)
        left += added
    axes.set_xlabel(f"{_memory_label(comparison)}; each phase adds")
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


def _hatch(index: int) -> str:
    """Return the pattern of a bar; bars that repeat a colour get another pattern."""
    return HATCHES[(index + index // len(looks.COLOURS)) % len(HATCHES)]


def rank_and_alpha(comparison: Comparison) -> Figure | None:
    """Draw a heat map of the metric over r and lora_alpha, one map for each combination of the other swept keys."""
    maps: dict[str, dict[tuple[float, float], float]] = {}
    for row in _measured(comparison):
        value = row.mean(f"after/{comparison.metric}")
        if value and row.label.get("method.r") and row.label.get("method.lora_alpha"):
            others = rest(row, "method.r", "method.lora_alpha")
            place = float(row.label["method.r"]), float(row.label["method.lora_alpha"])
            maps.setdefault(others, {})[place] = value.value
    if not maps or len(maps) > NAMED:
        return None
    ranks = sorted({r for grid_values in maps.values() for r, _ in grid_values})
    alphas = sorted({alpha for grid_values in maps.values() for _, alpha in grid_values})
    all_values = [value for grid_values in maps.values() for value in grid_values.values()]
    figure = Figure(
        figsize=(1.5 + max(2.5, 0.8 * len(alphas)) * len(maps), 1.5 + 0.6 * len(ranks)), layout="constrained"
    )
    colours = "cividis_r" if comparison.lower_is_better else "cividis"  # the best is the brightest
    titles = looks.distinct(list(maps), _NAME)
    all_axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, title, grid_values in zip(all_axes, titles, maps.values(), strict=True):
        grid = np.array([[grid_values.get((r, alpha), np.nan) for alpha in alphas] for r in ranks])
        image = axes.imshow(grid, cmap=colours, vmin=min(all_values), vmax=max(all_values), aspect="auto")
        middle = (min(all_values) + max(all_values)) / 2
        for y, x in np.argwhere(~np.isnan(grid)):
            colour = "white" if (grid[y, x] > middle) == comparison.lower_is_better else "black"
            axes.text(x, y, f"{grid[y, x]:.4g}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        axes.set_yticks(range(len(ranks)), [f"{r:g}" for r in ranks])
        axes.set_xlabel("lora_alpha")
        axes.set_ylabel("r (rank)")
        axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=list(all_axes), label=looks.metric_label(comparison))
    return figure


def over_rank(comparison: Comparison) -> Figure | None:
    """Draw the metric over r, a line for each combination of the other swept keys, such as LoRA and rsLoRA."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in _measured(comparison):
        value = row.mean(f"after/{comparison.metric}")
        if value and row.label.get("method.r"):
            lines.setdefault(rest(row, "method.r"), []).append(
                (float(row.label["method.r"]), value.value, value.low, value.high)
            )
    lines = {others: sorted(line) for others, line in lines.items() if len(line) > 1}
    if not lines or len(lines) > NAMED:
        return None
    figure, axes = _figure(6, 4)
    for index, (name, line) in enumerate(zip(looks.distinct(list(lines), _NAME), lines.values(), strict=True)):
        r, mean, low, high = (np.array(column) for column in zip(*line, strict=True))
        errors = np.nan_to_num(np.stack([mean - low, high - mean]))
        look = looks.look(index)
        style = {"marker": look.marker, "color": look.colour, "linestyle": (0, look.dashes) if look.dashes else "-"}
        axes.errorbar(r, mean, errors, capsize=3, label=name or None, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted({point[0] for line in lines.values() for point in line}), [f"{r:g}" for r in ticks])
    axes.minorticks_off()
    axes.set_xlabel("r (rank)")
    axes.set_ylabel(looks.metric_label(comparison))
    if any(lines):
        _legend(figure, *axes.get_legend_handles_labels())
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


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write each plot as `.svg` and `.png` into a folder, which is created, and return the files."""
    folder.mkdir(exist_ok=True)
    files = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a browser's font has it
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)  # many or long labels
        for title, draw in PLOTS.items():
            if not (figure := draw(comparison)):
                continue
            for kind in ("svg", "png"):
                picture = io.BytesIO()
                figure.savefig(picture, format=kind, dpi=min(200.0, _PIXELS / max(figure.get_size_inches())))
                figure.set_layout_engine("none")  # the second picture has the places of the first
                files.append(folder / f"{title.lower().replace(' ', '_')}.{kind}")
                write_atomically(files[-1], picture.getvalue())
    return files


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _rows_figure(rows: Sequence[Row], height: float, comparison: Comparison) -> tuple[Figure, Any]:
    """Return a figure and axes with one line for each row, from the bottom up."""
    figure, axes = _figure(7, 1 + height * len(rows))
    names = looks.names(rows, _NAME)
    names = [
        f"{name} (baseline)" if row is comparison.baseline else name for name, row in zip(names, rows, strict=True)
    ]
    axes.set_yticks(range(len(rows)), names, fontsize=8 if len(rows) <= 30 else 6)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    if len(_measured(comparison)) > ROWS:
        axes.set_title(f"the best {len(rows)} of {len(_measured(comparison))} rows", fontsize=9)
    return figure, axes


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put a legend on the right, and widen the figure by it."""
    columns = math.ceil(len(labels) / 24)
    legend = figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside right upper", ncols=columns)
    figure.set_layout_engine("constrained")
    figure.set_size_inches(
        figure.get_figwidth() + legend.get_window_extent().width / figure.dpi - 1.5, figure.get_figheight()
    )


def _looks(comparison: Comparison) -> dict[Row, looks.Look]:
    return {row: looks.look(index) for index, row in enumerate(_measured(comparison))}


def _memory_label(comparison: Comparison) -> str:
    where = {"allocated": "on the device", "rss": "of the process"}[memory_kind(comparison.rows)]
    return f"peak memory {where}, MiB (lower is better)"


def _measured(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if row.records]


def _best(comparison: Comparison, most: int) -> list[Row]:
    """Return at most `most` measured rows in the order of the table: the baseline and those with the best values."""
    rows = _measured(comparison)
    if len(rows) <= most:
        return rows
    sign = 1 if comparison.lower_is_better else -1
    values = {row: sign * mean.value for row in rows if (mean := row.mean(f"after/{comparison.metric}"))}
    best = {comparison.baseline, *sorted(values, key=values.__getitem__)[: most - 1]}
    return [row for row in rows if row in best]
