import io
import warnings

import pytest
from helpers.past_runs import recorded, shifted
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.results import plots, report
from qlora_exp.results.compare import compare
from qlora_exp.results.page.data import PHASES
from qlora_exp.results.page.looks import COLOURS
from qlora_exp.results.records import find


@pytest.fixture
def compare_grid(past_runs):
    """r x alpha for two quantizations; `grid(seeds)` compares them."""

    def make(seeds=(1,)):
        for number, (kind, r, alpha) in enumerate(
            (kind, r, alpha) for kind in ("nf4", "fp4") for r in (4, 8) for alpha in (8, 16)
        ):
            for seed in seeds:
                run = past_runs(
                    shifted(-r / 100 + seed / 50), seed=seed, quantization__name=kind, method__r=r,
                    method__lora_alpha=alpha,
                    metrics={"memory/rss_peak_mib": 900.0 + number, "memory/steady/rss_peak_mib": 900.0 + number,
                             "memory/baseline/rss_mib": 200.0, "memory/load/rss_peak_mib": 500.0,
                             "memory/save/rss_peak_mib": 300.0},
                )  # fmt: skip
                for step in range(3):
                    past_runs.mlflow.log_metric(run, "eval/loss", 4.0 - step, step=step)
        return compare(find(past_runs.uri, experiment=past_runs.experiment))

    return make


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_pareto_front_is_what_nothing_dominates(points: list[tuple[int, int]]):
    front = plots.pareto([(float(x), float(y)) for x, y in points])
    assert front
    for index, (x, y) in enumerate(points):
        beaten = any(a <= x and b <= y and (a < x or b < y) for a, b in points)
        assert (index in front) is not beaten


def test_every_plot_shows_what_was_measured(compare_grid):
    found = compare_grid(seeds=(1, 2))
    drawn = {title: draw(found) for title, draw in plots.PLOTS.items()}
    assert all(drawn.values())
    (ranked,) = drawn["Ranked"].axes
    names = [label.get_text() for label in ranked.get_yticklabels()]
    assert len(names) == 8
    assert names[-1].startswith(("quantization=nf4 r=8", "quantization=fp4 r=8"))  # the best on top
    assert sum("(baseline)" in name for name in names) == 1
    maps = drawn["Rank and alpha"].axes
    assert [one.get_title() for one in maps] == [
        "quantization=nf4",
        "quantization=fp4",
        "",
    ]  # the last is the scale of colours
    assert maps[-1].get_ylabel() == "held-out loss, nats per token (lower is better)"
    assert len(drawn["Over rank"].legends[0].get_texts()) == 4
    (memory,) = drawn["Memory by phase"].axes
    assert [text.get_text() for text in drawn["Memory by phase"].legends[0].get_texts()] == [
        "imports", "load", "steady steps"
    ]  # fmt: skip
    for title in ("Memory against quality", "Loss curves", "Over rank"):
        (axes,) = drawn[title].axes
        assert axes.get_ylabel() == "held-out loss, nats per token (lower is better)"
    assert ranked.get_xlabel().startswith("held-out loss, nats per token (lower is better)")
    for title in ("Memory against quality", "Memory by phase"):
        assert drawn[title].axes[0].get_xlabel().startswith("peak memory of the process, MiB (lower is better)")
    assert [bar.get_width() for bars in memory.containers for bar in bars[:1]] == [200.0, 300.0, 407.0]


def test_phase_of_only_some_runs_is_drawn(past_runs):
    past_runs(shifted(0.0), metrics={"memory/rss_peak_mib": 500.0, "memory/steady/rss_peak_mib": 500.0})
    peaks = {"memory/rss_peak_mib": 900.0, "memory/steady/rss_peak_mib": 500.0, "memory/evaluation/rss_peak_mib": 900.0}
    past_runs(shifted(0.1), method__r=8, metrics=peaks)
    (axes,) = plots.memory_by_phase(compare(find(past_runs.uri, experiment=past_runs.experiment))).axes
    ends = [max(bars[row].get_x() + bars[row].get_width() for bars in axes.containers) for row in range(2)]
    assert sorted(ends) == [500.0, 900.0]


def test_unplottable_settings_are_not_drawn(past_runs):
    past_runs(shifted(0.0), method__name="full", method__r="None", method__lora_alpha="None")
    for number in range(plots.NAMED + 1):
        settings = {"method__r": 4 + number % 2, "method__lora_alpha": 8, "dataset__drop_matching": f"$[a-{number}]^$"}
        past_runs(shifted(0.1), **settings)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert plots.rank_and_alpha(found) is None
    assert plots.over_rank(found) is None
    for draw in plots.PLOTS.values():
        if figure := draw(found):
            figure.savefig(io.BytesIO(), format="svg")


def test_single_run_has_only_the_ranking(past_runs):
    past_runs(shifted(0.0))
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    drawn = {title for title, draw in plots.PLOTS.items() if draw(found)}
    assert drawn == {"Ranked"}


def test_report_is_logged_with_its_sweep(compare_grid, past_runs):
    parent = past_runs.mlflow.create_run(
        past_runs.mlflow.get_experiment_by_name(past_runs.experiment).experiment_id
    ).info.run_id
    assert report.log(compare_grid(), None) is None
    past_runs(shifted(0.0), tags={"sweep": past_runs.experiment, "mlflow.parentRunId": parent})
    assert report.log(compare(find(past_runs.uri, [past_runs.experiment])), past_runs.uri) == parent
    kept = {one.path for one in past_runs.mlflow.list_artifacts(parent, "report")}
    figures = "report/comparison_figures"
    assert kept == {*(f"report/comparison.{kind}" for kind in ("csv", "json", "md", "tex", "html")), figures}
    pictures = {one.path for one in past_runs.mlflow.list_artifacts(parent, figures)}
    assert pictures == {f"{figures}/ranked.svg", f"{figures}/ranked.png"}


def test_every_phase_that_raises_the_peak_has_a_look_of_its_own(past_runs):
    peaks = {path.format("rss"): 100.0 * (place + 1) for place, path in enumerate(PHASES.values())}
    past_runs(shifted(0.0), metrics={"memory/rss_peak_mib": max(peaks.values()), **peaks})
    (axes,) = plots.memory_by_phase(compare(find(past_runs.uri, experiment=past_runs.experiment))).axes
    looks = {(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in axes.containers}
    assert len(looks) == len(PHASES) > len(COLOURS)


def test_long_and_foreign_labels_are_drawn_quietly(past_runs, tmp_path):
    for seed in (1, 2):
        for number, value in enumerate(("数据" * 30, "x" * 3000 + "A", "x" * 3000 + "B")):
            params = {f"training__a_long_name_{key}": f"{value}{key}" for key in range(12)}
            past_runs(shifted(number / 10), seed=seed, metrics={"memory/rss_peak_mib": 900.0 + number}, **params)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert len(found.rows) == 3
    with warnings.catch_warnings(action="error"):  # only here: an error while MLflow's tables are made would be kept
        files = report.write(found, tmp_path)
    assert max(map(len, report.markdown(found).splitlines())) < 2000
    assert any("x" * 3000 in file.read_text("utf-8") for file in files if file.suffix == ".csv")


def test_no_two_of_64_rows_look_alike():
    values = [*(number / 100 for number in range(63)), 100.0]
    runs = [
        recorded(shifted(value), method__r=r, metrics={"memory/rss_peak_mib": 900.0},
                 curves={"eval/loss": [(1, 3.0), (2, 2.0 + r)]})
        for r, value in enumerate(values)
    ]  # fmt: skip
    found = compare(runs)
    curves, points = plots.curves(found), plots.memory_and_quality(found)
    lines = curves.axes[0].lines
    assert len(lines) == 64
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 64
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 64
    assert len({text.get_text() for text in curves.legends[0].get_texts()}) == 64
    marks = [line for line in points.axes[0].lines if line.get_marker() != "None"]
    assert len({(mark.get_color(), mark.get_marker()) for mark in marks}) == len(marks) == 64
    assert len({text.get_text() for text in points.legends[0].get_texts()}) == 64  # not all names fit at the points


def test_points_have_names_that_cover_nothing():
    runs = [
        recorded(shifted(value), method__r=r, metrics={"memory/rss_peak_mib": memory})
        for r, (memory, value) in enumerate(
            [(900.0, 0.0), (900.5, 0.001), (950.0, -0.3), (1000.0, -0.4), (1000.0, 0.4)]
        )
    ]
    figure = plots.memory_and_quality(compare(runs))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 5
    assert figure.legends == []
    spots = axes.transData.transform([(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines[:5]])
    for place, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:place]) == 0
        assert not any(box.contains(*spot) for spot in spots)


def test_band_reaches_from_the_lowest_seed_to_the_highest():
    runs = [
        recorded(shifted(seed / 10), seed=seed, method__r=4, curves={"eval/loss": [(1, 3.0), (3, 1.0 + seed)]})
        for seed in (1, 2, 3)
    ]
    runs.append(recorded(shifted(0.5), seed=4, method__r=4, curves={"eval/loss": [(1, 3.0), (2, 2.0), (3, 3.0)]}))
    (axes,) = plots.curves(compare(runs)).axes
    (line,) = axes.lines
    assert [*line.get_xdata()] == [1, 2, 3]
    assert [*line.get_ydata()] == pytest.approx([3.0, (2.5 + 3.0 + 3.5 + 2.0) / 4, 3.0])
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (2.0, 4.0)


def test_figures_of_many_rows_name_how_many_are_left_out(monkeypatch):
    monkeypatch.setattr(plots, "ROWS", 5)
    monkeypatch.setattr(plots, "DRAWN", 4)
    memory = {"memory/rss_peak_mib": 900.0, "memory/steady/rss_peak_mib": 900.0}
    runs = [
        recorded(shifted(number / 10), method__r=number, metrics=memory, curves={"eval/loss": [(1, 3.0), (2, 2.0)]})
        for number in range(9, 0, -1)
    ]
    found = compare(runs)
    for draw, count in ((plots.ranked, 5), (plots.memory_by_phase, 5), (plots.curves, 4)):
        assert draw(found).axes[0].get_title() == f"the best {count} of 9 rows"
    names = [label.get_text() for label in plots.ranked(found).axes[0].get_yticklabels()]
    assert names == ["r=9 (baseline)", "r=4", "r=3", "r=2", "r=1"]


def test_each_figure_is_a_png_and_an_svg_file(tmp_path):
    files = plots.write(compare([recorded(shifted(0.0))]), tmp_path / "figures")
    assert [file.name for file in files] == ["ranked.svg", "ranked.png"]
    assert files[0].read_text("utf-8").startswith("<?xml")
    assert files[1].read_bytes().startswith(b"\x89PNG\r\n")
    assert int.from_bytes(files[1].read_bytes()[16:20]) == 1400  # seven inches
