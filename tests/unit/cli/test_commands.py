import errno
import os
import socket
from pathlib import Path

import pytest
from support import command

from qlora_exp.cli import commands
from qlora_exp.tracking.journal import FILE
from qlora_exp.utils.errors import ConfigError, TrackingError


@pytest.mark.parametrize("section", [None, "method", "training"])
def test_keys_says_what_keys_mean(section: str | None, capsys):
    commands.keys(section)
    text = capsys.readouterr().out
    assert ("gradient_checkpointing: auto | bool = 'auto'" in text) == (section != "method")
    assert ("  max_steps: int = -1; 30 in the default run\n" in text) == (section != "method")
    assert ("use_dora" in text) == (section != "training")


def test_keys_finds_one_key(capsys):
    commands.keys("training.eval_steps")
    assert capsys.readouterr().out == "  eval_steps: int | null = None; 12 in the default run\n"
    with pytest.raises(ConfigError, match="did you mean 'training.learning_rate'"):
        commands.keys("learning_rate")


@pytest.mark.parametrize("port", ["taken", 99999999])
def test_a_port_that_cannot_be_had_is_explained_at_once(port, tmp_path, monkeypatch):
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_text("")
    monkeypatch.setattr("os.execve", lambda *_: pytest.fail("started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1] if port == "taken" else port
        with pytest.raises(ConfigError, match="choose another: --port"):
            commands.ui(None, "127.0.0.1", number)


def test_ui_without_runs_says_what_to_do(tmp_path):
    assert "run `qlora-exp train` here first" in command("ui", cwd=tmp_path).stderr


def test_ui_opens_the_store_in_mlruns(tmp_path, monkeypatch, capsys):
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_text("")
    started = []
    monkeypatch.setattr("os.execve", lambda program, words, environment: started.append(words))
    commands.ui(None, "127.0.0.1", 5001)
    assert f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}" in started[0]
    assert "http://127.0.0.1:5001" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["line", "first", "delivered.json", "folder", "unreadable", "lock"])
def test_sync_sends_all_that_it_can_read(what: str, mlflow_uri, tmp_path, monkeypatch, capsys):
    from helpers.tracking import damage, start_run

    from qlora_exp.tracking.mlflow_store import client

    for name in "abc":
        (tmp_path / "outputs" / name).mkdir(parents=True)
        with start_run(mlflow_uri, tmp_path / "outputs" / name) as tracked:
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
            if Path(path) == bad:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scan(path)

        monkeypatch.setattr("os.scandir", refused)
    else:
        damage(b'{"op": "met garbage', 4 if what == "line" else 0)(bad)
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    with pytest.raises(TrackingError, match="^2 runs sent; 1 runs or folders could not be read whole"):
        commands.sync([tmp_path / "outputs"], uri)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert str(bad) in said
    if what == "line":
        assert "journal.jsonl, line 5: " in said
    there = client(uri)
    runs = there.search_runs([there.get_experiment_by_name("qlora_exp").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED", *["RUNNING"] * (what == "line")]
