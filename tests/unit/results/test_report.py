import csv
import io
import json
import re
from dataclasses import replace

import pytest
from helpers.past_runs import ROWS, recorded, shifted
from support import exit_code

from qlora_exp.results import report
from qlora_exp.results.compare import compare
from qlora_exp.results.records import find

COST = {
    "trainable_parameters": 100.0, "trainable_share": 0.01, "tokens_per_second": 50.0, "step_seconds_mean": 2.0,
    "steps": 10.0, "memory/rss_peak_mib": 900.0, "memory/steady/rss_peak_mib": 800.0, "model_bytes": 2e6,
}  # fmt: skip


@pytest.fixture
def comparison(past_runs):
    for r, by, seconds in ((4, 0.0, 2.0), (8, -0.2, 3.0)):
        for seed in (1, 2):
            past_runs(shifted(by + seed / 100), seed=seed, method__r=r, metrics=COST | {"step_seconds_mean": seconds})
    past_runs(method__r=16, outcome="oom", tags={"failure": "a | b"})
    past_runs(method__r=32, outcome="pruned")
    return compare(find(past_runs.uri, experiment=past_runs.experiment))


def test_table_has_only_measured_columns(comparison):
    headings, rows = report.table(comparison)
    table = [dict(zip(headings, row, strict=True)) for row in rows]
    assert [row["method.r"] for row in table] == ["4", "8", "16", "32"]
    assert [row["time"] for row in table] == ["1.00x", "1.50x", "", ""]
    assert [row["train min"] for row in table] == ["0.3", "0.5", "", ""]  # 20 and 30 seconds
    assert table[0]["share"] == "1.00%"
    assert table[0]["saved MB"] == "2.0"
    assert table[0]["loss against the baseline"] == "baseline"
    assert table[2]["loss against the baseline"] == "oom: a | b"
    assert [row["seeds"] for row in table[2:]] == ["0 (+1 failed)", "0 (+1 pruned)"]
    assert table[1]["loss"].startswith(f"{sum(ROWS) / 8 - 0.185:.4f} ±")
    assert not {"ROUGE-L", "task score", "load MiB"} & set(headings)


def test_every_score_has_a_column(past_runs):
    scores = {"after/lm_eval/arc/acc": 0.25, "after/lm_eval/mmlu/acc": 0.5, "after/task_score": 1.0, "train/loss": 2.5}
    past_runs([3.0, 3.1], metrics=scores)
    past_runs([3.0, 3.2], seed=2, metrics=scores)
    found = compare(find(past_runs.uri, experiment=past_runs.experiment))
    headings, (row,) = report.table(found)
    for metric, heading in {"lm_eval/arc/acc": "arc/acc", "task_score": "task score"}.items():
        assert heading in report.table(replace(found, metric=metric), "cost")[0]  # what is compared is shown
    shown = dict(zip(headings, row, strict=True))
    assert {name: shown[name] for name in ("arc/acc", "mmlu/acc", "task score", "train loss")} == {
        "arc/acc": "0.250", "mmlu/acc": "0.500", "task score": "1.000", "train loss": "2.5000"
    }  # fmt: skip


def test_scaling_of_lora_has_a_column_if_it_differs(past_runs):
    def headings_and_rows():
        return report.table(compare(find(past_runs.uri, [], past_runs.experiment)))

    past_runs([1.0, 2.0], method__r=4, resolved__lora_scaling="0.5")
    past_runs([1.0, 2.0], method__r=8, resolved__lora_scaling="0.5")
    assert "LoRA scaling" not in headings_and_rows()[0]
    past_runs([1.0, 2.0], method__r=16, resolved__lora_scaling="0.25")
    headings, rows = headings_and_rows()
    assert [row[headings.index("LoRA scaling")] for row in rows] == ["0.5", "0.5", "0.25"]


def test_preset_chooses_columns(comparison):
    headings, _ = report.table(comparison, "cost")
    assert headings[2:-2] == ["trainable", "share", "peak MiB", "time", "loss"]


def test_of_many_rows_the_best_and_the_worst_are_shown(past_runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for place, r in enumerate((8, 4, 64, 16, 32)):
        for seed in (1, 2):
            past_runs(shifted(place / 10 + seed / 100), seed=seed, method__r=r)
    past_runs(method__r=2, outcome="oom")
    found = compare(find(past_runs.uri, experiment=past_runs.experiment), baseline="r=64")
    report.show(found, most=3)
    shown = capsys.readouterr().out
    assert [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")] == ["8", "4", "64", "32"]
    assert "2 of 6 rows are not shown (1 significantly different, 1 without a result): --rows 0 prints all" in shown
    report.show(found, most=6)
    assert "not shown" not in capsys.readouterr().out


def test_rows_without_a_successful_run_are_in_tables_with_every_column(past_runs, tmp_path):
    everything = {
        "step_seconds_mean": 1.0, "steps": 3.0, "tokens_per_second": 9.0, "trainable_parameters": 1.0,
        "forgetting": 0.1, "memory/rss_peak_mib": 1.0, "after/rougeL": 0.1, "saved_mb": 1.0,
    }  # fmt: skip
    for r, outcome in ((4, "ok"), (8, "ok"), (16, "killed"), (32, "running")):
        more = {"outcome": outcome} | ({} if outcome == "ok" else {"metrics": {}})
        past_runs(shifted(r), method__r=r, resolved__lora_scaling=str(16 / r), **{"metrics": everything} | more)
    comparison = compare(find(past_runs.uri, experiment=past_runs.experiment))
    for preset in report.PRESETS:
        assert len(report.table(comparison, preset)[1]) == 4
    assert "LoRA scaling" in report.table(comparison)[0]
    report.write(comparison, tmp_path)


def test_run_that_goes_on_is_not_called_failed(past_runs):
    past_runs(shifted(0.0), method__r=4)
    past_runs(method__r=8, outcome="running")
    headings, rows = report.table(compare(find(past_runs.uri, experiment=past_runs.experiment)))
    assert dict(zip(headings, rows[1], strict=True))["seeds"] == "0 (+1 running)"


def test_report_files_agree(comparison, tmp_path):
    files = {file.suffix: file for file in report.write(comparison, tmp_path / "new")}
    with files[".csv"].open(newline="") as lines:
        first, second, failed, pruned = csv.DictReader(lines)
    assert (float(first["trainable_parameters"]), first["difference"]) == (100.0, "")
    assert float(second["difference"]) == pytest.approx(-0.2)
    assert float(second["after/loss low"]) < float(second["after/loss"]) < float(second["after/loss high"])
    assert (failed["failed"], failed["after/loss"]) == ("1", "")
    assert (pruned["failed"], pruned["pruned"]) == ("0", "1")
    told = json.loads(files[".json"].read_text())
    assert [len(row["runs"]) for row in told["rows"]] == [2, 2, 1, 1]
    assert told["rows"][0]["baseline"] is True
    assert told["rows"][1]["against_baseline"]["difference"] == pytest.approx(-0.2)
    assert r"oom: a \| b" in files[".md"].read_text()
    assert r"\midrule" in files[".tex"].read_text()


def test_compare_command_shows_the_table(comparison, past_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["compare", "--experiment", past_runs.experiment, "--uri", past_runs.uri]
    assert exit_code(*words, "--out", str(tmp_path)) == 0
    assert "better -0.2000" in capsys.readouterr().out
    assert len(list(tmp_path.glob("comparison_*"))) == 6
    mistakes = {
        "--metric=x": "choose one of loss",
        "--baseline=x": "no row matches",
        "--baseline=method.r": "several rows match",
        "--baseline=r=16": "method.r=16 has no successful run",
        f"--out={tmp_path / 'file'}": "cannot write to",
    }
    (tmp_path / "file").write_text("")
    for wrong, message in mistakes.items():
        assert exit_code(*words, wrong) == 1
        told = capsys.readouterr().err
        assert message in told
        assert "Traceback" not in told


def test_hostile_text_of_records_is_harmless(past_runs, tmp_path, capsys):
    title, bidi, link = "\x1b]0;OWNED\x07\x1b[2J\x9b1m", "\u202e", "[x](http://evil) <img src=x> *b*"
    past_runs(shifted(0.0), method__target_modules='=HYPERLINK("x")', tags={"sweep": f"a{title}\n# b"})
    past_runs(shifted(-0.2), method__target_modules=f"@SUM {title}{bidi} {link} [red]y[/red]")
    past_runs(method__target_modules="-1", outcome="error", tags={"failure": f"{title}{link}\nnext"})
    words = ["compare", "--experiment", past_runs.experiment, "--uri", past_runs.uri]
    assert exit_code(*words, "--out", str(tmp_path / "out")) == 0
    screen = capsys.readouterr().out
    files = {file.suffix: file.read_text("utf-8") for file in (tmp_path / "out").glob("*.*")}
    for text in (screen, *files.values()):
        assert not {"\x1b", "\x07", "\x9b"} & {*text}
    for text in (screen, files[".csv"], files[".md"], files[".html"]):
        assert bidi not in text
        assert r"\x1b]0;OWNED\x07\x1b[2J" in text.replace("\\\\", "\\").replace("\\]", "]").replace("\\[", "[")
    assert "[red]y[/red]" in screen
    assert "error: " in screen
    assert r"\nnext" in screen
    cells = [row["method.target_modules"] for row in csv.DictReader(io.StringIO(files[".csv"]))]
    assert cells[0] == '\'=HYPERLINK("x")'
    assert cells[1].startswith("'@SUM ")
    assert cells[2] == "-1"
    assert r"\[x\](http://evil) \<img src=x\> \*b\*" in files[".md"]
    assert "<img src=x>" not in files[".html"]


def test_rows_stay_different_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    long = "/a/path/that/is/long/enough/" * 3
    runs = []
    for number in range(4):
        swept = {key: f"{long}{number if key == 7 else number // 2}" for key in range(14)}
        tags = {f"sweep.a_long_setting_{key}": value for key, value in swept.items()}
        runs.append(recorded(shifted(number / 10), tags=tags, method__r=number))
    report.show(compare(runs))
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    table = [line for line in lines if line.startswith("│")]
    assert len({line.split("│")[1] for line in table}) == len(table) == 4
    assert max(map(len, table)) <= 80
    assert all("." in line.split("│")[3] for line in table)  # the loss has its place
