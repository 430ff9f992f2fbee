import errno
import os
import socket
from pathlib import Path

import pytest
from support import exit_code

from qlora_exp.tracking.journal import FILE
from qlora_exp.tracking.stores.sqlite_store import read_only_uri


@pytest.fixture
def runs_here(make_store, tmp_path) -> Path:
    """Make an MLflow store in the working directory."""
    from qlora_exp.tracking.mlflow_store import client

    (tmp_path / "mlruns").mkdir()
    client(make_store("mlruns/mlflow.db"))
    return tmp_path / "mlruns" / "mlflow.db"


@pytest.mark.parametrize("port", ["taken", 99999999])
@pytest.mark.usefixtures("runs_here")
def test_ui_refuses_a_port_that_cannot_be_had_at_once(port, monkeypatch, capsys):
    monkeypatch.setattr("os.execve", lambda *_: pytest.fail("started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1] if port == "taken" else port
        assert exit_code("ui", "--port", str(number)) == 1
    assert "choose another: --port" in capsys.readouterr().err


def test_ui_without_runs_says_what_to_do(capsys):
    assert exit_code("ui") == 1
    assert "run `qlora-exp train` here first" in capsys.readouterr().err


def test_ui_opens_the_store_in_mlruns(runs_here, monkeypatch, capsys):
    started = []
    monkeypatch.setattr("os.execve", lambda program, words, environment: started.append(words))
    assert exit_code("ui", "--port", "5001") == 0
    assert f"sqlite:///{runs_here}" in started[0]
    assert "http://127.0.0.1:5001" in capsys.readouterr().out
    monkeypatch.setattr("os.access", lambda path, _: path != runs_here)  # the store of another user
    assert exit_code("ui", "--port", "5001") == 0
    assert read_only_uri(runs_here) in started[1]
    runs_here.write_bytes(b"")
    assert exit_code("ui", "--port", "5001") == 1
    assert "is not an MLflow store" in capsys.readouterr().err
    assert runs_here.stat().st_size == 0


def test_sync_looks_for_the_usual_folders_when_it_runs(tmp_path, capsys):
    assert exit_code("sync") == 1
    assert f"no folder outputs in {tmp_path}" in capsys.readouterr().err
    (tmp_path / "multirun").mkdir()
    assert exit_code("sync") == 0
    assert capsys.readouterr().out == "0 runs sent; MLflow has everything of all runs under multirun\n"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["line", "first", "delivered.json", "folder", "unreadable", "lock"])
def test_sync_sends_all_that_it_can_read(what: str, mlflow_uri, tmp_path, monkeypatch, capsys):
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.tracking import lifecycle
    from qlora_exp.tracking.mlflow_store import client

    for name in "abc":
        (tmp_path / "outputs" / name).mkdir(parents=True)
        with lifecycle.start(compose([f"tracking.uri={mlflow_uri}"]), tmp_path / "outputs" / name) as tracked:
            tracked.metrics({"loss": 2.0}, 1)
    bad = tmp_path / "outputs" / "a"
    if what == "delivered.json":
        (bad / what).write_text("{")
    elif what in ("folder", "lock"):
        (bad / {"folder": FILE, "lock": "journal.lock"}[what]).unlink()
        (bad / {"folder": FILE, "lock": "journal.lock"}[what]).mkdir()
    elif what == "unreadable":
        scan = os.scandir

        def refused(path):
            if not isinstance(path, int) and Path(path).absolute() == bad:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scan(path)

        monkeypatch.setattr("os.scandir", refused)
    else:
        lines = (bad / FILE).read_bytes().splitlines(keepends=True)
        at = 4 if what == "line" else 0
        lines[at:at] = [b'{"op": "met garbage\n']
        (bad / FILE).write_bytes(b"".join(lines))
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    assert exit_code("sync", "outputs", "--uri", uri) == 1
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].startswith("error: 2 runs sent; 1 runs or folders could not be read completely")
    (warning,) = [line for line in shown if line.startswith("warning: ")]
    assert "outputs/a" in warning
    if what == "line":
        assert "journal.jsonl, line 5: " in warning
    there = client(uri)
    runs = there.search_runs([there.get_experiment_by_name("qlora_exp").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED", *["RUNNING"] * (what == "line")]
