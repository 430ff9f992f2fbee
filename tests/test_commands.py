import socket

import pytest
from test_cli import command

from qlora_exp import commands
from qlora_exp.errors import ConfigError


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
