"""What `benchmarks/team.py` counts is right: it needs servers, so `nox -s team` runs it and no test does."""

from pathlib import Path

import pytest

from qlora_exp.tracking.journal import Journal

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
POINT = ("loss", "1", "1000", "0.5")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_missing_postgresql_is_refused_in_one_line(tmp_path, monkeypatch):
    from team_servers import programs

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^no PostgreSQL: .*; apt install postgresql$"):
        programs(())
    for name in ("initdb", "pg_ctl", "postgres"):
        (tmp_path / name).touch(mode=0o755)
    assert programs((str(tmp_path),)) == tmp_path


def test_facts_of_a_run_are_those_of_its_journal(tmp_path):
    from team_facts import attempt, expected

    (tmp_path / "model").mkdir()
    for name in ("run.log", "config.yaml", "model/weights"):
        (tmp_path / name).write_text(name)
    journal = Journal(tmp_path)
    begin = {"experiment": "e", "uri": "u", "run_name": "r", "timestamp": 1}
    tags = {"attempt": "abc", "outcome": "running", "mlflow.parentRunId": "differs from store to store"}
    for message in (
        {"op": "start", **begin, "tags": tags},
        {"op": "params", "values": {"seed": "1"}},
        {"op": "metrics", "step": 1, "timestamp": 1000, "values": {"loss": 0.5}},
        {"op": "dataset", "name": "faq", "digest": "d", "source": "s", "context": "training", "rows": 3},
        {"op": "file", "path": "run.log"},
        {"op": "file", "path": "config.yaml"},
        {"op": "model", "folder": "model", "name": "m", "params": {}, "step": 1, "files": ["weights"]},
        {"op": "tags", "values": {"outcome": "ok", "note": "x" * 9000}},
        {"op": "end", "status": "FINISHED", "outcome": "ok", "timestamp": 2, "metrics": {}},
    ):
        journal.append(message)
    journal.close()
    facts = expected(tmp_path)
    assert attempt(facts) == "abc"
    assert facts["status"] == {("FINISHED",)}
    assert (facts["params"], facts["points"], facts["datasets"]) == ({("seed", "1")}, {POINT}, {("faq", "d")})
    of_tags = dict(facts["tags"])
    assert (of_tags["outcome"], len(of_tags["note"])) == ("ok", 8000)
    assert "mlflow.parentRunId" not in of_tags
    assert {path for path, _ in facts["artifacts"]} == {"run.log", "config.yaml"}
    assert {facts_of[:2] for facts_of in facts["models"]} == {("m", "weights")}
    with (tmp_path / "run.log").open("a") as log:
        log.write("written after it was sent")
    assert expected(tmp_path) == facts
    (tmp_path / "model" / "weights").write_text("others")
    assert expected(tmp_path)["models"] != facts["models"]


def test_everything_that_a_store_lacks_or_has_too_much_is_counted():
    from team_facts import compare

    whole = {"status": {("FINISHED",)}, "params": {("a", "1"), ("b", "2")}, "points": {POINT}}
    journals = [(name, whole) for name in ("whole", "cut", "gone")]
    cut = {"status": {("KILLED",)}, "params": {("a", "1")}, "points": {("loss", "2", "1000", "0.5")}}
    counts = compare(journals, [("whole", whole), ("whole", whole), ("cut", cut), ("stranger", whole)])
    found = {what: count for what, count in counts.items() if count and what not in whole}
    assert found == {
        "journals": 3,
        "runs": 4,
        "runs doubled": 1,
        "runs of nobody": 1,
        "runs missing": 1,
        "runs not FINISHED": 2,
        "status missing": 2,
        "params missing": 3,
        "points missing": 2,
        "points too many": 1,
    }
    assert (counts["status"], counts["params"], counts["points"]) == (3, 6, 3)
    assert not any(compare([("whole", whole)], [("whole", whole)])[f"{kind} missing"] for kind in whole)
