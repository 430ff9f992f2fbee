"""A record cannot choose where files are written, or which server gets the user's token."""

import shutil
import sqlite3
from pathlib import Path

import pytest
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from qlora_exp.tracking.mlflow_store import client, reader
from qlora_exp.tracking.stores import artifacts
from qlora_exp.tracking.stores.sqlite_store import read_only_uri
from qlora_exp.utils.errors import TrackingError

RUN = "0123456789abcdef0123456789abcdef"
ELSEWHERE = (
    "http://127.0.0.1:7711/api/2.0/mlflow-artifacts/artifacts/1/x", "https://host/x", "mlflow-artifacts:/1/x",
    "mlflow-artifacts://host/1", "s3://bucket/x", "ftp://host/x", "file://host/x", "models:/m-1", "dbfs:/x",
)  # fmt: skip


@pytest.mark.parametrize("recorded", ELSEWHERE)
@pytest.mark.parametrize("store", ["sqlite:////data/mlflow.db", read_only_uri(Path("/data/mlflow.db"))])
def test_record_of_a_file_names_no_server(recorded, store):
    for use in (artifacts.folder, artifacts.require_own):
        with pytest.raises(TrackingError, match="neither read nor written: the store is a file"):
            use(recorded, store)


@pytest.mark.parametrize(
    ("recorded", "store", "problem"),
    [
        ("http://evil/x", "http://host:5000", "another server"),
        ("http://host:5001/x", "http://host:5000", "another server"),
        ("http://host:5000/x", "https://host:5000", "another server"),
        ("http://host:5000@evil/x", "http://host:5000", "another server"),
        ("mlflow-artifacts://evil/x", "https://host", "another server"),
        ("http://host/x", "postgresql://host/db", "no tracking server"),
        ("mlflow-artifacts:/x", "postgresql://host/db", "no tracking server"),
        ("http://host:5000/x", "http://host:5000", None),
        ("mlflow-artifacts:/1/x", "https://host/prefix", None),
        ("mlflow-artifacts://host/1/x", "https://host", None),
        ("s3://bucket/x", "http://host:5000", None),
        ("gs://bucket/x", "postgresql://host/db", None),
    ],
)
def test_record_of_a_server_names_no_other_server(recorded, store, problem):
    if problem is None:
        assert artifacts.folder(recorded, store) is None
        artifacts.require_own(recorded, store)
        return
    for use in (artifacts.folder, artifacts.require_own):
        with pytest.raises(TrackingError, match=problem):
            use(recorded, store)


@pytest.mark.parametrize(
    ("recorded", "store", "warns"),
    [
        ("/home/of/another/user/mlruns/1", "postgresql://host/db", True),
        ("file:///home/of/another/user/mlruns/1", "http://host:5000", True),
        ("{here}/mlruns/1", "postgresql://host/db", False),  # MLflow makes these folders with the first artifact
        ("/x", "postgresql://host/db", False),
        ("/home/of/another/user/mlruns/1", "sqlite:////data/mlflow.db", False),
        ("mlflow-artifacts:/1", "http://host:5000", False),
        ("s3://bucket/x", "postgresql://host/db", False),
    ],
)
def test_artifacts_in_a_folder_of_another_machine_are_warned_of(recorded, store, warns, tmp_path, caplog):
    artifacts.warn_of_other_machine(recorded.format(here=tmp_path), store)
    assert ("only a tracking server" in caplog.text) is warns


@pytest.fixture
def project(tmp_path) -> Path:
    """Make the folders of a store."""
    (tmp_path / "mlruns" / "artifacts" / RUN / "artifacts").mkdir(parents=True)
    return tmp_path / "mlruns"


@pytest.mark.parametrize(
    ("recorded", "allowed"),
    [
        ("{own}/artifacts/{run}/artifacts", True),
        ("file://{own}/artifacts/{run}/artifacts", True),
        ("file://localhost{own}/artifacts/models/m-1/artifacts", True),
        ("{own}/0/{run}/artifacts", True),  # as MLflow makes them in ./mlruns
        ("file://{own}/../victim", False),
        ("file://{own}/artifacts/../../victim", False),
        ("file://{own}/artifacts/%2e%2e/%2e%2e/victim", False),
        ("{own}/artifacts/link", False),
        ("{own}x/artifacts", False),
        ("/", False),
        ("", False),
    ],
)
def test_artifacts_are_written_only_next_to_the_store(recorded, allowed, project):
    (project / "artifacts" / "link").symlink_to(project.parent)
    place, store = recorded.format(own=project, run=RUN), f"sqlite:///{project / 'mlflow.db'}"
    if allowed:
        artifacts.require_own(place, store, "README.md")
    else:
        with pytest.raises(TrackingError, match="nothing is written there"):
            artifacts.require_own(place, store, "README.md")


def test_moved_artifacts_are_found_next_to_the_store(project):
    store, here = f"sqlite:///{project / 'mlflow.db'}", project / "artifacts" / RUN / "artifacts"
    for old in (f"file:///old/mlruns/artifacts/{RUN}/artifacts", f"/old/artifacts/{RUN}/artifacts", f"{here}"):
        assert artifacts.folder(old, store) == here
    (project / "artifacts" / "models" / "m-1" / "artifacts").mkdir(parents=True)
    model = artifacts.folder("file:///old/artifacts/models/m-1/artifacts", store)
    assert model == project / "artifacts" / "models" / "m-1" / "artifacts"
    for gone in ("file:///old/artifacts/none/artifacts", "/old/..", "/"):
        assert artifacts.folder(gone, store) == Path(gone.removeprefix("file://"))


def locations(file: Path) -> set[str]:
    with sqlite3.connect(file) as store:
        query = "SELECT artifact_location FROM experiments UNION SELECT artifact_uri FROM runs"
        return {location for (location,) in store.execute(query)}


def test_client_follows_a_moved_project_and_writes_nowhere_else(make_store, tmp_path, caplog):
    (tmp_path / "old" / "mlruns").mkdir(parents=True)
    uri = make_store("old/mlruns/mlflow.db")
    mlflow = client(uri)
    experiment = mlflow.create_experiment("e", (tmp_path / "old" / "mlruns" / "artifacts").as_uri())
    run = mlflow.create_run(experiment).info.run_id
    mlflow.log_text(run, "text", "a/b.txt")
    shutil.copytree("old", "copied")
    Path("old").rename("moved")
    for name in ("moved", "copied"):
        folder = tmp_path / name / "mlruns"
        address = f"sqlite:///{folder}/mlflow.db"
        place = reader(address).get_run(run).info.artifact_uri
        assert artifacts.folder(place, address) == folder / "artifacts" / run / "artifacts"
        assert "old" in place  # reading changed nothing
        _artifact_repos_cache.clear()  # MLflow's, by run id; here one process uses the store in three places
        again = client(address)
        again.log_text(run, "more", "c.txt")
        new = again.create_run(experiment).info.artifact_uri
        assert new.startswith((folder / "artifacts").as_uri())
        assert (folder / "artifacts" / run / "artifacts" / "c.txt").read_text() == "more"
        assert not (tmp_path / "old").exists()
        assert "was moved or copied from" in caplog.text
    shutil.copytree("moved", "second")  # while the first is still there
    _artifact_repos_cache.clear()
    client(f"sqlite:///{tmp_path}/second/mlruns/mlflow.db").log_text(run, "second", "c.txt")
    assert (tmp_path / "moved" / "mlruns" / "artifacts" / run / "artifacts" / "c.txt").read_text() == "more"
