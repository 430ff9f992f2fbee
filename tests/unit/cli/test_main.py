import importlib
import os
import pkgutil
import subprocess
import sys

import pytest
from support import exit_code

import qlora_exp.cli
from qlora_exp.cli import main
from qlora_exp.utils.errors import ConfigError

MODULES = [f"qlora_exp.cli.{module.name}" for module in pkgutil.iter_modules(qlora_exp.cli.__path__)]
COMMANDS = [*main.parsers()]


def test_every_module_with_commands_is_in_the_table():
    with_commands = {name for name in MODULES if hasattr(importlib.import_module(name), "add_parsers")}
    assert with_commands == {family.__name__ for families in main.FAMILIES.values() for family in families}


def test_help_lists_every_command_once_under_a_title(capsys):
    assert exit_code("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[:2] == "  " and line.split()[0] in COMMANDS] == COMMANDS
    assert all(f"{title}:" in lines for title in main.FAMILIES)
    assert len(main.FAMILIES) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys):
    parser = main.parsers()[command]
    summary = parser.description.splitlines()[0]
    assert summary[0].isupper()
    assert summary.endswith(".")
    assert all(line == line.rstrip() and len(line) <= 100 for line in parser.description.splitlines())
    if command != "train":  # Hydra writes its help
        assert exit_code(command, "--help") == 0
        assert summary in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_not_abbreviated(command: str, capsys):
    if command == "train":
        pytest.skip("its unknown options are Hydra's")
    assert exit_code(command, "--hel") == 2
    assert exit_code("--vers") == 2
    assert capsys.readouterr().out == ""


def test_parsers_and_helps_import_nothing_heavy():
    code = (
        "import sys, importlib, contextlib, io\n"
        "from qlora_exp.cli.main import main\n"
        f"for name in {MODULES!r}: importlib.import_module(name)\n"
        f"for words in [['--help'], *([name, '--help'] for name in {COMMANDS!r})]:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(words)\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'datasets', 'peft', 'trl'} & set(sys.modules)\n"
        "sys.exit(f'heavy imports: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


SAMPLE = {
    "keys": (["keys"], "keys.keys"),
    "plan": (["plan", "model=tiny_llama"], "planning.plan"),
    "compare": (["compare"], "runs.compare"),
    "sync": (["sync"], "runs.sync"),
    "ui": (["ui"], "runs.ui"),
    "reproduce": (["reproduce", "RUN"], "runs.reproduce"),
    "chat": (["chat", "RUN"], "inference.chat"),
    "register": (["register", "RUN", "--name", "x"], "models.register"),
    "train": (["train"], "train.train"),
}


@pytest.mark.parametrize(("words", "handler"), SAMPLE.values(), ids=SAMPLE)
def test_dot_env_counts_for_every_command_and_is_redacted(words, handler, tmp_path, monkeypatch, capsys):
    (tmp_path / ".env").write_text("QLORA_TEST_TOKEN=value-of-the-file\nQLORA_TEST_REAL=file\n")
    monkeypatch.setenv("QLORA_TEST_TOKEN", "")  # so that what is set below is taken away again
    monkeypatch.delenv("QLORA_TEST_TOKEN")
    monkeypatch.setenv("QLORA_TEST_REAL", "environment")
    seen = []

    def fail(options) -> None:
        """Fail."""
        seen.append((os.environ["QLORA_TEST_TOKEN"], os.environ["QLORA_TEST_REAL"]))
        raise ConfigError("refused value-of-the-file")

    module, _, name = handler.partition(".")
    monkeypatch.setattr(f"qlora_exp.cli.{module}.{name}", fail)
    assert exit_code(*words) == 1
    assert seen == [("value-of-the-file", "environment")]
    assert capsys.readouterr().err == "error: refused ***\n"


def test_a_dot_env_that_cannot_be_read_is_explained(tmp_path, capsys):
    (tmp_path / ".env").write_bytes(b"TOKEN=\xff\n")
    assert exit_code("keys", "seed") == 1
    assert "error: .env: cannot be read" in capsys.readouterr().err
