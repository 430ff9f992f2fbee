"""A client writes artifacts nowhere but next to its store."""

import shutil
import sqlite3

import pytest
from mlflow import MlflowClient

from qlora_exp.tracking.mlflow_store import client
from qlora_exp.utils.errors import TrackingError


@pytest.mark.parametrize("column", ["run", "experiment", "link"])
def test_client_does_not_write_where_a_record_says(column, make_store, tmp_path):
    victim = tmp_path / "victim"
    (victim / "artifacts").mkdir(parents=True)
    for file in (victim / "README.md", victim / "artifacts" / "README.md"):
        file.write_text("mine")
    (tmp_path / "store").mkdir()
    uri = make_store("store/mlflow.db")
    mlflow = client(uri)
    own = tmp_path / "store" / "artifacts"
    experiment = mlflow.create_experiment("e", own.as_uri())
    run = mlflow.create_run(experiment).info.run_id
    with sqlite3.connect(tmp_path / "store" / "mlflow.db") as store:
        if column == "run":
            store.execute("UPDATE runs SET artifact_uri = ?", (victim.as_uri(),))
        elif column == "experiment":
            store.execute("UPDATE experiments SET artifact_location = ?", ((victim / "artifacts").as_uri(),))
    if column == "link":
        (own / run / "artifacts").mkdir(parents=True)
        (own / run / "artifacts" / "README.md").symlink_to(victim / "README.md")
    mlflow = client(uri)
    run = mlflow.create_run(experiment).info.run_id if column == "experiment" else run
    (tmp_path / "README.md").write_text("theirs")
    (tmp_path / "report").mkdir()
    shutil.copy("README.md", "report")
    model = mlflow.create_logged_model(experiment, "m") if column == "experiment" else None
    with pytest.raises(TrackingError, match="nothing is written there"):
        mlflow.log_artifact(run, "README.md")
    with pytest.raises(TrackingError, match="nothing is written there"):
        mlflow.log_artifacts(run, "report")
    if model is not None:
        for log, path in ((mlflow.log_model_artifact, "README.md"), (mlflow.log_model_artifacts, "report")):
            with pytest.raises(TrackingError, match="nothing is written there"):
                log(model.model_id, path)
    assert [file.read_text() for file in sorted(victim.rglob("*.md"))] == ["mine", "mine"]
    assert len(list(victim.rglob("*"))) == 3


def test_place_of_a_runs_artifacts_is_asked_once(make_store, tmp_path, monkeypatch):
    mlflow = client(make_store("mlflow.db"))
    experiment = mlflow.create_experiment("e", (tmp_path / "artifacts").as_uri())
    run = mlflow.create_run(experiment).info.run_id
    get_run, asked = MlflowClient.get_run, []
    monkeypatch.setattr(MlflowClient, "get_run", lambda self, run_id: asked.append(run_id) or get_run(self, run_id))
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        mlflow.log_artifact(run, name)
    assert asked == [run]
    assert [file.path for file in mlflow.list_artifacts(run)] == ["one", "two"]
