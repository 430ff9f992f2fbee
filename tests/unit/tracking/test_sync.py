"""Many runs at once: stores that lost runs, and stores that get a sweep of another."""

import json
import shutil
import sqlite3

import pytest
from helpers.tracking import start_run
from support import exit_code

from qlora_exp.results import records
from qlora_exp.tracking import lifecycle, mlflow_store
from qlora_exp.tracking.journal import received
from qlora_exp.tracking.mlflow_store import client
from qlora_exp.tracking.stores import sqlite_store
from qlora_exp.tracking.stores.uris import store_uri
from qlora_exp.tracking.sync import Settled, settle


def run_id(folder, uri: str) -> str:
    return str(json.loads((folder / "delivered.json").read_text())[store_uri(uri)]["run_id"])


@pytest.fixture
def store(make_store, tmp_path):
    (tmp_path / "mlruns").mkdir()
    return make_store("mlruns/mlflow.db")


@pytest.fixture
def sweep(store, tmp_path):
    """Write a sweep of two jobs, delivered to `store`, and return its folder."""
    folder = tmp_path / "multirun" / "mine"
    folder.mkdir(parents=True)
    tags = {"sweep": "mine", "sweep.keys": "seed"}
    parent = lifecycle.open_run(folder, store, "qlora_exp", "mine", tags)
    for seed in (1, 2):
        of_sweep = {"mlflow.parentRunId": str(parent.run_id), "sweep": "mine"}
        with start_run(store, folder / f"job{seed}", f"seed={seed}", tags=of_sweep) as tracked:
            tracked.metrics({"after/loss": 1.0 * seed})
            tracked.text("x", "evaluation/x.txt")
    parent.text("[]", "jobs.json")
    parent.end("FINISHED", "ok")
    parent.close()
    return folder


def drop(store: str, run: str) -> None:
    """Delete a run from a store as if it had never been there."""
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        for table in ("latest_metrics", "metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (run,))
    database.close()


def check(store: str, folder) -> None:
    """Check that a store has the whole sweep, and nothing else."""
    mlflow = client(store)
    experiment = mlflow.get_experiment_by_name("qlora_exp")
    runs = {run.info.run_id: run for run in mlflow.search_runs([experiment.experiment_id])}
    parent = run_id(folder, store)
    assert runs.keys() == {parent, *(run_id(folder / f"job{seed}", store) for seed in (1, 2))}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    jobs = [run for run in runs.values() if run.info.run_id != parent]
    assert [job.data.tags["mlflow.parentRunId"] for job in jobs] == [parent, parent]
    assert sorted(job.data.metrics["after/loss"] for job in jobs) == [1.0, 2.0]
    for job in jobs:
        assert [file.path for file in mlflow.list_artifacts(job.info.run_id, "evaluation")] == ["evaluation/x.txt"]
    assert len(records.find(store)) == 2  # the newest sweep


def test_sweep_moves_to_another_store(sweep, store, tmp_path, capsys):
    other = f"sqlite:///{tmp_path / 'there' / 'other.db'}"
    assert exit_code("sync", "--uri", other) == 0
    assert capsys.readouterr().out == f"3 runs sent; MLflow has everything of all runs under multirun ({other})\n"
    check(other, sweep)
    location = client(other).get_experiment_by_name("qlora_exp").artifact_location
    assert location == (tmp_path / "there" / "artifacts").as_uri()
    check(store, sweep)
    assert exit_code("sync", "--uri", other) == 0
    assert capsys.readouterr().out.startswith("0 runs sent; MLflow has everything")


def test_jobs_are_created_in_their_sweep(sweep, make_store, monkeypatch):
    other = make_store("other.db")
    monkeypatch.setattr("qlora_exp.tracking.read_back.missing", lambda *_: [])  # which would correct it
    assert exit_code("sync", "--uri", other) == 0
    check(other, sweep)


def test_one_job_takes_its_sweep_along(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(sweep / "job1")
    assert exit_code("sync", ".", "--uri", "sqlite:///other.db") == 0
    mlflow = client(f"sqlite:///{sweep / 'job1' / 'other.db'}")
    parents = [run.data.tags.get("mlflow.parentRunId") for run in mlflow.search_runs(["1"])]
    assert parents == [run_id(sweep, "sqlite:///other.db"), None]


def test_job_without_its_sweep_is_sent_without_it(sweep, tmp_path, make_store):
    shutil.copytree(sweep / "job1", tmp_path / "alone")
    other = make_store("other.db")
    assert settle([tmp_path / "alone"], other).sent == 1
    assert "mlflow.parentRunId" not in client(other).get_run(run_id(tmp_path / "alone", other)).data.tags


def test_lost_store_gets_everything_again(sweep, store, tmp_path, capsys):
    shutil.rmtree(tmp_path / "mlruns")
    assert exit_code("sync") == 0
    assert capsys.readouterr().out.startswith("3 runs sent; MLflow has everything")
    check(store, sweep)


@pytest.mark.parametrize("what", ["", "job1"])
def test_lost_run_is_sent_again(what: str, sweep, store, capsys):
    drop(store, run_id(sweep / what, store))
    assert exit_code("sync") == 0
    check(store, sweep)
    assert exit_code("sync") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 runs sent; MLflow has everything")


def test_runs_that_were_read_back_are_looked_up_in_the_file_alone(sweep, store, monkeypatch):
    settle([sweep, *sweep.glob("job*")])
    for name in ("client", "reader"):  # importing MLflow takes longer than all else that a done sweep needs
        monkeypatch.setattr(f"qlora_exp.tracking.mlflow_store.{name}", None)
    assert settle([sweep, *sweep.glob("job*")]) == Settled()
    drop(store, run_id(sweep / "job1", store))
    with pytest.raises(TypeError, match="NoneType"):
        settle([sweep, *sweep.glob("job*")])


def test_client_finds_the_same_tags_as_the_file(sweep, store):
    states = [received(folder, store_uri(store)) for folder in (sweep, sweep / "job1", sweep / "job2")]
    found = mlflow_store.tags_of(store, [*states, {"run_id": "0" * 32, "experiment_id": "0"}])
    assert found == sqlite_store.tags_of(sqlite_store.sqlite_file(store), [state["run_id"] for state in states])
    assert len(found) == 3


def test_sync_of_a_running_run_says_so(store, tmp_path, capsys):
    with start_run(store, tmp_path / "outputs"):
        assert exit_code("sync") == 0
        assert "1 are still running and were left alone" in capsys.readouterr().out


def test_sync_names_what_mlflow_lacks(sweep, store, tmp_path, capsys):
    (sweep / "job1" / "evaluation" / "x.txt").unlink()
    assert exit_code("sync", "--uri", f"sqlite:///{tmp_path / 'other.db'}") == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "error: 2 runs sent; MLflow lacks a part of 1 runs (see the warnings)"
    (warning,) = [line for line in said if line.startswith("warning: ")]
    assert "job1: file evaluation/x.txt: " in warning


def test_run_whose_journal_lost_its_end_is_neither_forgotten_nor_ended_again(sweep, store, capsys):
    journal = sweep / "job1" / "journal.jsonl"
    whole = journal.read_bytes()
    for kept in (b"", whole[:9], whole[:-9], whole[: len(whole) // 2]):
        journal.write_bytes(kept)
        assert exit_code("sync") == 1
        assert f"{journal}: lines at its end are gone" in capsys.readouterr().err
        journal.write_bytes(whole)
        check(store, sweep)


def test_store_that_does_not_answer_is_asked_once(sweep, monkeypatch, capsys):
    asked = []
    connect = client

    def away(uri):
        asked.append(uri)
        return connect("nonsense://x")

    monkeypatch.setattr("qlora_exp.tracking.mlflow_store.client", away)
    assert exit_code("sync", "--uri", "http://127.0.0.1:9") == 1
    assert len(asked) == 1
    assert "3 runs here may not be there completely" in capsys.readouterr().err
