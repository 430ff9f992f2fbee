import json
import math
from pathlib import Path

import pytest
from helpers.past_runs import answer, recorded, shifted

from qlora_exp.results import report
from qlora_exp.results.compare import compare
from qlora_exp.results.page import data


def collected(runs, **options):
    comparison = compare(runs, **options)
    headings, rows = report.table(comparison)
    ordered = sorted(comparison.rows, key=lambda row: not row.records)
    return data.collect(comparison, headings, dict(zip(ordered, rows, strict=True)), ["a note"])


def test_content_is_what_the_runs_recorded():
    memory = {"memory/rss_peak_mib": 900.0, "memory/load/rss_peak_mib": 500.0, "memory/steady/rss_peak_mib": 900.0}
    runs = [
        recorded(
            shifted(-r / 100 + seed / 50), seed=seed, method__r=r, method__lora_alpha=2 * r, metrics=memory,
            curves={"eval/loss": [(1, 3.0), (2, 2.5 + seed)], "train/loss": [(1, math.nan), (2, 2.0)]},
            answers=[answer("why?", f"because {seed}", rougeL=0.5), answer("how?", "", rougeL=math.inf)],
        )
        for r in (4, 8) for seed in (1, 2)
    ]  # fmt: skip
    runs.append(recorded(method__r=16, method__lora_alpha=32, outcome="oom", tags={"failure": "too big"}))
    content = collected(runs)
    json.dumps(content, allow_nan=False)
    assert [row["label"]["method.r"] for row in content["rows"]] == ["4", "8", "16"]
    assert content["baseline"] == 0
    assert [row["value"] and round(row["value"][0], 3) for row in content["rows"]] == [3.24, 3.2, None]
    assert content["metric"]["lower"] is True
    assert content["costs"][0] == {
        "name": "peak memory of the process, MiB", "better": "lower", "values": [900.0, 900.0, None]
    }  # fmt: skip
    assert content["phases"]["added"] == {"load": [500.0, 500.0, 0.0], "steady steps": [400.0, 400.0, 0.0]}
    assert content["curves"]["held-out loss"][1] == [[1, 2], [3.0, 4.5]]
    assert content["curves"]["training loss"][0] == [[1, 2], [None, 2.0]]
    assert content["answers"]["prompts"] == [["why?", "yes"], ["how?", "yes"]]
    assert content["answers"]["of_run"][1] == [
        {"item": 0, "prompt": 0, "text": "because 2", "scores": {"rougeL": 0.5}},
        {"item": 1, "prompt": 1, "text": "", "scores": {"rougeL": None}},
    ]
    assert content["losses"]["of_run"][0]["values"] == pytest.approx(shifted(-0.02))
    assert content["losses"]["prompts"] == {0: {0: 0, 1: 1}}
    assert content["losses"]["tokens"] == [[10.0] * 8]
    last = content["runs"]["list"][-1]
    assert (last["outcome"], last["failure"], last["settings"]["method.r"]) == ("oom", "too big", "16")
    assert content["runs"]["common"] == {"data.evaluation_fingerprint": "rows"}
    assert content["left_out"] == []


def test_columns_are_sorted_by_number_where_they_are_numbers():
    settings = ((0.0, 4, "1e-4", "lora"), (0.1, 16, "2e-5", "full"))
    runs = [
        recorded(shifted(by), tags={"sweep.method.r": str(r), "sweep.lr": rate, "sweep.method": name}, method__r=r,
                 metrics={"trainable_parameters": 1e4 * r, "trainable_share": r / 100})
        for by, r, rate, name in settings
    ]  # fmt: skip
    content = collected(runs)
    sorts = dict(zip(content["headings"], content["sorts"], strict=True))
    assert sorts["method.r"] == [4.0, 16.0]
    assert sorts["lr"] == [1e-4, 2e-5]
    assert sorts["method"] is None
    assert sorts["trainable"] == [40_000.0, 160_000.0]
    assert sorts["share"] == [4.0, 16.0]
    assert sorts["loss against the baseline"] == [0.0, pytest.approx(0.1)]
    assert sorts["ties"] is None


def test_limits_are_kept_and_what_is_left_out_is_counted(monkeypatch):
    monkeypatch.setattr(data, "RUNS", 3)
    monkeypatch.setattr(data, "ROWS", 5)
    monkeypatch.setattr(data, "POINTS", 50)
    monkeypatch.setattr(data, "PROMPTS", 2)
    monkeypatch.setattr(data, "TEXT", 10)
    monkeypatch.setattr(data, "ITEMS", 6)
    answers = [answer("x" * 30, "y"), answer("b", "y"), answer("c", "y")]
    curve = {"eval/loss": [(step, 1.0) for step in range(201)]}
    runs = [
        recorded(shifted(number / 10), method__r=number, answers=answers, curves=curve) for number in range(6, 0, -1)
    ]
    content = collected(runs)
    assert [row["label"]["method.r"] for row in content["rows"]] == ["6", "4", "3", "2", "1"]  # 6: the baseline
    kept = sorted(content["curves"]["held-out loss"])
    assert [content["runs"]["list"][place]["settings"]["method.r"] for place in kept] == ["6", "2", "1"]
    steps, values = content["curves"]["held-out loss"][kept[0]]
    assert len(steps) == len(values) <= 50
    assert (steps[0], steps[-1]) == (0, 200)
    assert content["answers"]["prompts"][0][0] == "x" * 10 + "… (20 more characters)"
    assert len(content["answers"]["prompts"]) == 2
    assert all(len(losses["values"]) == 6 for losses in content["losses"]["of_run"].values())
    said = "\n".join(content["left_out"])
    for words in ("1 rows", "2 runs", "3 answers", "6 losses", "1 texts are cut", "points of curves"):
        assert words in said


def test_damaged_files_are_named_and_cost_only_themselves():
    broken = recorded(shifted(0.1), method__r=8, texts={"evaluation/answers.json": "{"})
    content = collected([recorded(shifted(0.0), method__r=4, answers=[answer("a", "b")]), broken])
    assert list(content["answers"]["of_run"]) == [0]
    assert any("answers.json" in line and broken.run_id in line and "damaged" in line for line in content["left_out"])


def test_secrets_and_control_characters_are_not_in_the_content():
    token = "hf_" + "a" * 30
    runs = [recorded(shifted(0.1 * r), method__r=r, dataset__path=f"{token}\x1b[2J\u202e",
                     answers=[answer(f"my token is {token}", f"{token}\nx")]) for r in (1, 2)]  # fmt: skip
    text = json.dumps(collected(runs), ensure_ascii=False)
    assert token not in text
    assert "***" in text
    assert not {"\x1b", "\u202e"} & {*text}
    assert r"***\nx" in text


def test_no_measured_value_but_the_metric_is_enough():
    content = collected([recorded([1.0])])
    assert content["costs"] == []
    assert content["curves"] == {"held-out loss": {}, "training loss": {}}
    assert content["phases"]["added"] == {}


def test_runs_with_other_items_are_not_of_one_set():
    runs = [recorded(shifted(0.0), method__r=4), recorded(shifted(0.0)[:5], method__r=8)]
    losses = collected(runs)["losses"]
    assert [losses["of_run"][place]["items"] for place in (0, 1)] == [0, 1]


def test_limits_are_those_that_the_docs_name():
    page = (Path(__file__).parents[4] / "docs" / "how_to" / "compare.md").read_text("utf-8")
    limits = (data.ROWS, data.RUNS, data.ANSWERS, data.LOSSES)
    named = "rows beyond the best {:,}, runs beyond {:,}, answers beyond {:,}, losses beyond {:,}".format(*limits)
    assert named in " ".join(page.split())
