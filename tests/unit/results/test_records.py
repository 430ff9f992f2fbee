"""Runs of an SQLite file are read directly, as MLflow's client would give them."""

import re
import sqlite3
from dataclasses import fields

import pytest
from helpers.tracking import start_run
from requests import JSONDecodeError as RequestsJSONDecodeError
from support import exit_code

from qlora_exp.results import records
from qlora_exp.results.compare import compare
from qlora_exp.results.records import every, find
from qlora_exp.tracking.stores.sqlite_store import sqlite_file
from qlora_exp.utils.errors import ConfigError


def facts(record) -> str:
    """Give everything but the client as text: NaN is not equal to itself."""
    return repr([getattr(record, field.name) for field in fields(record) if field.name != "mlflow"])


def test_runs_of_a_file_are_those_of_the_client(past_runs, monkeypatch):
    for number in range(5):
        past_runs([2.0, float(number)], seed=number, metrics={"x": float("inf"), "y": float("nan")}, note="ü'; --")
    deleted = past_runs([1.0])
    past_runs(outcome="oom", tags={"sweep": "s", "reproduces": "r"})
    past_runs.mlflow.delete_run(deleted)
    chosen = (
        {"experiment": past_runs.experiment},
        {"chosen": ["s"], "where": "tags.reproduces = 'r'"},
        {"chosen": ["run 3"]},
    )
    direct = [records.find(past_runs.uri, **each) for each in chosen]
    assert len(direct[0]) == 5
    monkeypatch.setattr(records, "sqlite_file", lambda _: None)
    for ours, each in zip(direct, chosen, strict=True):
        theirs = records.find(past_runs.uri, **each)
        assert [facts(record) for record in ours] == [facts(record) for record in theirs]
        assert [list(record.params) for record in ours] == [list(record.params) for record in theirs]


def moved(past_runs, run: str, uri: str) -> None:
    with sqlite3.connect(sqlite_file(past_runs.uri)) as store:
        store.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (uri, run))


@pytest.mark.parametrize("uri", ["file:///old/mlruns/artifacts/0/artifacts", "http://127.0.0.1:1/artifacts"])
def test_artifacts_that_cannot_be_read_are_named(uri, past_runs):
    past_runs([2.0, 3.0])
    moved(past_runs, past_runs([2.5, 3.5], method__r=8), uri)
    found = records.find(past_runs.uri, experiment=past_runs.experiment)
    assert found[1].text("evaluation/after_losses.jsonl") == ""
    compared = compare(found)
    assert compared.without_artifacts.startswith("1 runs have no artifacts: ")
    assert re.search("which is not there|neither read nor written", compared.without_artifacts)
    with pytest.raises(ConfigError, match=r"has no qlora_exp.yaml: .*(old/mlruns/artifacts|127\.0\.0\.1)"):
        found[1].yaml()


def test_link_in_the_store_is_not_read(past_runs, tmp_path):
    run = past_runs([2.0, 3.0])
    (tmp_path / "private").write_text("key")
    artifacts = sqlite_file(past_runs.uri).parent / "artifacts" / run / "artifacts"
    (artifacts / "environment.txt").symlink_to(tmp_path / "private")
    (record,) = records.find(past_runs.uri, experiment=past_runs.experiment)
    with pytest.raises(records.TrackingError, match="environment.txt cannot be read: .*a link"):
        record.text("environment.txt")


def test_answer_that_is_no_answer_of_mlflow_is_one_line():
    with pytest.raises(records.TrackingError, match="MLflow: Expecting value"), records.mlflow_errors_explained():
        raise RequestsJSONDecodeError("Expecting value", "<html>", 0)


@pytest.mark.parametrize("table", ["latest_metrics", "tags", "runs", "experiments"])
def test_damaged_page_of_a_store_is_one_line(table: str, make_store, tmp_path, capsys):
    store = make_store("own.db")
    with start_run(store, tmp_path / "run") as tracked:
        tracked.metrics({"after/loss": 1.0})
    with sqlite3.connect(tmp_path / "own.db") as connection:
        ((page,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,))
        ((size,),) = connection.execute("PRAGMA page_size")
    connection.close()
    with (tmp_path / "own.db").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    for words in (["compare", "--experiment", "qlora_exp"], ["bundle", str(tracked.run_id), "--out", "b"]):
        assert exit_code(*words, "--uri", store) == 1
        said = capsys.readouterr().err
        assert "malformed" in said
        assert len(said.splitlines()) == 1


def test_jobs_of_a_sweep_that_were_done_before_it_belong_to_it(past_runs):
    before = past_runs([3.0], method__r=4)
    inside = past_runs([2.0], method__r=8, tags={"sweep": "later", "mlflow.parentRunId": "f" * 32})
    (experiment,) = [past_runs.mlflow.get_experiment_by_name(past_runs.experiment).experiment_id]
    tags = {"sweep": "later", "sweep.keys": "method.r", "sweep.elsewhere.0": f"{before} not-an-id"}
    sweep = past_runs.mlflow.create_run(experiment, tags=tags).info.run_id
    for read in (find, every):
        assert {run.run_id for run in read(past_runs.uri, ["later"], past_runs.experiment)} == {before, inside}
        assert {run.run_id for run in read(past_runs.uri, [sweep], past_runs.experiment)} == {
            before
        }  # of no other parent
    assert {run.run_id for run in find(past_runs.uri, ["later"], where="params.`method.r` = '4'")} == {before}
