import io
import re

import pytest
from helpers.past_runs import shifted
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.results import plots, report
from qlora_exp.results.compare import compare
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
    assert names[-1].startswith(("name=nf4 r=8", "name=fp4 r=8"))  # the best on top
    assert sum("(baseline)" in name for name in names) == 1
    maps = drawn["Rank and alpha"].axes
    assert [one.get_title() for one in maps] == ["name=nf4", "name=fp4"]
    assert len(drawn["Over rank"].axes[0].get_legend().get_texts()) == 4
    assert "held-out loss" in drawn["Loss curves"].axes[0].get_ylabel()
    (memory,) = drawn["Memory by phase"].axes
    assert [text.get_text() for text in memory.get_legend().get_texts()] == ["imports", "load", "steady steps"]
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


def test_html_page_needs_no_network_and_has_no_scripts(past_runs, tmp_path):
    for seed, name in ((1, "<script>alert(1)</script>"), (1, "b & c")):
        past_runs(shifted(0.0), seed=seed, method__name=name, metrics={"memory/rss_peak_mib": 900.0 + len(name)})
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    (page,) = [file.read_text() for file in report.write(found, tmp_path) if file.suffix == ".html"]
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert "b &amp; c" in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith("#") for link in links)


def test_report_is_logged_with_its_sweep(compare_grid, past_runs):
    parent = past_runs.mlflow.create_run(
        past_runs.mlflow.get_experiment_by_name(past_runs.experiment).experiment_id
    ).info.run_id
    assert report.log(compare_grid(), None) is None
    past_runs(shifted(0.0), tags={"sweep": past_runs.experiment, "mlflow.parentRunId": parent})
    assert report.log(compare(find(past_runs.uri, [past_runs.experiment])), past_runs.uri) == parent
    kept = {one.path for one in past_runs.mlflow.list_artifacts(parent, "report")}
    assert kept == {f"report/comparison.{kind}" for kind in ("csv", "json", "md", "html")}


def test_every_phase_that_raises_the_peak_has_a_look_of_its_own(past_runs):
    peaks = {path.format("rss"): 100.0 * (place + 1) for place, path in enumerate(plots.PHASES.values())}
    past_runs(shifted(0.0), metrics={"memory/rss_peak_mib": max(peaks.values()), **peaks})
    (axes,) = plots.memory_by_phase(compare(find(past_runs.uri, experiment=past_runs.experiment))).axes
    looks = {(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in axes.containers}
    assert len(looks) == len(plots.PHASES) > len(plots.COLOURS)


@pytest.mark.filterwarnings("error")
def test_long_and_foreign_labels_are_drawn_quietly(past_runs, tmp_path):
    for seed in (1, 2):
        for number, value in enumerate(("数据" * 30, "x" * 3000 + "A", "x" * 3000 + "B")):
            params = {f"training__a_long_name_{key}": f"{value}{key}" for key in range(12)}
            past_runs(shifted(number / 10), seed=seed, metrics={"memory/rss_peak_mib": 900.0 + number}, **params)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    assert len(found.rows) == 3
    files = report.write(found, tmp_path)
    assert max(map(len, report.markdown(found).splitlines())) < 2000
    assert any("x" * 3000 in file.read_text("utf-8") for file in files if file.suffix == ".csv")
