"""A store is whole or not there."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import pytest
from helpers.tracking import start_run
from mlflow.exceptions import MlflowException

from qlora_exp.sweeps.launchers.local import warm
from qlora_exp.tracking import mlflow_store
from qlora_exp.tracking.mlflow_store import client, finished_runs
from qlora_exp.utils.errors import TrackingError


@pytest.mark.slow
def test_interrupted_creation_of_a_store_is_repeated(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    made = mlflow_store.create_tables

    def cut_off(database):
        made(database)
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow_store, "create_tables", cut_off)
    with pytest.raises(KeyboardInterrupt):
        mlflow_store.client(uri)
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.undo()
    assert [one.name for one in mlflow_store.client(uri).search_experiments()] == ["Default"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def test_file_that_is_no_database_is_reported(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    with pytest.raises(TrackingError, match="mlflow.db is not an MLflow store: file is not a database"):
        mlflow_store.client(f"sqlite:///{tmp_path / 'mlflow.db'}")


def create(uri: str) -> str:
    return client(uri).create_experiment(f"experiment {os.getpid()}")


@pytest.mark.slow
def test_concurrent_processes_share_one_database(tmp_path):
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    with warm(1).Pool(3) as pool:
        assert len(set(pool.map(create, [uri] * 3))) == 3


def test_finished_runs_are_found_by_their_key(mlflow_uri, mlflow_client, tmp_path):
    name = "tracking.experiment_name=finished"
    with start_run(mlflow_uri, tmp_path / "a", name) as tracked:
        tracked.metrics({"after/loss": 2.5}, 3)
    with pytest.raises(ValueError, match="x"), start_run(mlflow_uri, tmp_path / "b", name, "seed=1"):
        raise ValueError("x")
    key = mlflow_client.get_run(tracked.run_id).data.tags["run_key"]
    found = finished_runs(mlflow_uri, "finished", [key, "0123456789abcdef"])
    assert list(found) == [key]
    assert 0 <= found[key].pop("seconds") < 60
    assert found[key] == {"run_id": tracked.run_id, "outcome": "ok", "metrics": {"after/loss": 2.5}}
    assert finished_runs(mlflow_uri, "no such experiment", [key]) == {}
    assert finished_runs(f"sqlite:///{tmp_path / 'none.db'}", "finished", [key]) == {}
    assert not (tmp_path / "none.db").exists()


def test_error_of_a_store_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(TrackingError, match="MLFLOW_ALLOW_FILE_STORE=true allows a store of files"):
        client((tmp_path / "mlruns").as_uri())
    texts = {
        f"API request failed: {'x' * 400} (Caused by SSLError('CERTIFICATE_VERIFY_FAILED'))": (
            r"Caused by SSLError.*MLFLOW_TRACKING_SERVER_CERT_PATH=FILE names"
        ),
        "API request to endpoint /x failed with error code 401 != 200": "401.*; set MLFLOW_TRACKING_USERNAME and",
        "API request to endpoint /x failed with error code 403 != 200": "403.*; ask who manages the experiment",
    }
    for text, message in texts.items():
        monkeypatch.setattr("mlflow.MlflowClient.search_experiments", Mock(side_effect=MlflowException(text)))
        with pytest.raises(TrackingError, match=message):
            client("https://host")


class Cutting(BaseHTTPRequestHandler):
    """A server that does what it is asked, and whose answer to the creation of a run is cut."""

    created = 0

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "runs/create" in self.path:
            Cutting.created += 1
            return
        experiment = {"experiment_id": "1", "name": "qlora_exp", "artifact_location": "mlflow-artifacts:/1"}
        answer = {"experiment": experiment | {"lifecycle_stage": "active"}} if "get-by-name" in self.path else {}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


def test_request_that_creates_a_run_is_not_repeated_without_a_search(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Cutting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(TrackingError), start_run(f"http://127.0.0.1:{server.server_port}", tmp_path / "run"):
        pass
    server.shutdown()
    assert Cutting.created == 1
