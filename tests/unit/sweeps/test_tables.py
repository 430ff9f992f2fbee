from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from qlora_exp.sweeps import tables

METRICS = {
    "after/loss": 3.25, "after/rougeL": 0.5, "after/exact_match": 0.25, "after/task_score": 0.75, "forgetting": 0.1234,
    "after/lm_eval/arc_easy/acc": 0.625, "before/lm_eval/arc_easy/acc": 0.1, "train/loss": 2.5,
    "memory/rss_peak_mib": 700.0, "tokens_per_second": 99.0,
}  # fmt: skip
JOB = SimpleNamespace(swept={"method": "lora"}, key="0123456789abcdef")


def test_every_score_has_a_column():
    measured = METRICS | {"after/metric/length": 177.75, "before/metric/length": 1.0}
    assert tables.further_scores(measured) == ["after/metric/length", "after/lm_eval/arc_easy/acc"]
    assert tables.row(JOB, {"outcome": "ok", "seconds": 12.3, "metrics": measured}) == {
        "method": "lora", "outcome": "ok", "loss": "3.2500", "ROUGE-L": "0.500", "exact match": "0.250",
        "task score": "0.750", "metric/length": "177.8", "arc_easy/acc": "0.625", "forgotten": "+0.1234",
        "train loss": "2.5000", "peak MiB": "700", "tokens/s": "99", "seconds": "12", "key": JOB.key,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("width", "shown", "left_out"),
    [(200, ["train loss", "tokens/s"], []), (90, ["task score", "loss", "arc_easy/acc"], ["train loss", "tokens/s"])],
)
def test_narrow_terminals_get_the_columns_that_fit(width: int, shown, left_out, monkeypatch, capsys):
    monkeypatch.setattr(tables, "_console", lambda: Console(width=width))
    tables.show_rows([tables.row(JOB, {"outcome": "ok", "metrics": METRICS})], Path("night"))
    heading = " ".join(capsys.readouterr().out.splitlines()[2].split())
    assert [name for name in (*shown, *left_out) if name in heading] == shown


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["ok", "pruned"], ""),
        (["ok", "oom"], "1 of 2 jobs did not end well; 1 failed: sweep.rerun=failed runs them again"),
        (["killed", "not started"], "2 of 2 jobs did not end well; 2 did not finish: the same command"),
        (["nan", "running", "ok"], "2 of 3 jobs did not end well; 1 failed: sweep.rerun=failed runs them again; 1 did"),
    ],
)
def test_advice_names_what_to_do_about_failed_jobs(outcomes: list[str], expected: str):
    assert tables.advice(outcomes).startswith(expected)
    assert bool(tables.advice(outcomes)) is bool(expected)
