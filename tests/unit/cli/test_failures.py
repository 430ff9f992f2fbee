import errno
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from qlora_exp.cli.failures import exit_code, full_disk_named
from qlora_exp.utils.errors import ConfigError, DivergedError, TimeLimitError


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (ConfigError("no such key"), 1, "error: no such key\n"),
        (TimeLimitError("60 minutes are over"), 1, "error: 60 minutes are over\n"),
        (DivergedError("loss is nan"), 1, "error: DivergedError: loss is nan\n"),
        (OutOfMemoryError("no GiB"), 1, "error: OutOfMemoryError: no GiB\n"),
        (MemoryError("of the host"), 1, "error: out of memory: MemoryError: of the host\n"),
        (
            RuntimeError("can't allocate memory: 9\nat x"),
            1,
            "error: out of memory: RuntimeError: can't allocate memory: 9\n",
        ),
        (OSError(errno.ENOSPC, "no space", "file"), 1, "error: no space left on the disk of file\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ConfigError("at http://me:password@host/x with a-secret-value"), 1, "error: at http://***@host/x with ***\n"),
        (TimeLimitError("with a-secret-value"), 1, "error: with ***\n"),
    ],
)
def test_errors_become_one_message_and_a_status(error, code, shown, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(OutOfMemoryError=OutOfMemoryError))
    monkeypatch.setenv("SOME_API_KEY", "a-secret-value")

    def fail() -> None:
        raise error

    assert exit_code(fail) == code
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("error", [OutOfMemoryError("no GiB"), MemoryError("no GiB"), ConfigError("no GiB")])
def test_commands_that_run_out_of_memory_say_what_takes_less(error, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(OutOfMemoryError=OutOfMemoryError))

    def fail() -> None:
        raise error

    assert exit_code(fail, "less is taken with X") == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert ("; less is taken with X" in shown) == (not isinstance(error, ConfigError))


@pytest.mark.parametrize("torch", [None, SimpleNamespace()])
def test_a_fault_of_the_program_is_shown_whole_without_secrets(torch, monkeypatch, capsys):
    """An error that is only named as an expected one is a fault too, whether torch is imported or not."""
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setenv("SOME_API_KEY", "a-secret-value")

    def fail() -> None:
        raise OutOfMemoryError("a-secret-value")

    assert exit_code(fail) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "OutOfMemoryError: ***" in shown


def test_success_is_0(capsys):
    assert exit_code(lambda: print("done")) == 0
    assert capsys.readouterr().out == "done\n"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "outputs/run"),
        (
            RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file"),
            "outputs/run",
        ),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 15552 vs 15444"), "outputs/run"),
        (OSError(errno.ENOSPC, "No space left on device"), "outputs/run"),
        (OSError(errno.ENOSPC, "No space left on device", "elsewhere"), "elsewhere"),
    ],
)
def test_full_disk_is_one_line_that_names_it(error, shown, capsys):
    def command() -> None:
        with full_disk_named(Path("outputs/run")):
            raise error

    assert exit_code(command) == 1
    assert capsys.readouterr().err == f"error: no space left on the disk of {shown}\n"


def test_other_errors_are_not_changed():
    for error in (OSError(errno.EACCES, "Permission denied"), ValueError("No space")):
        with pytest.raises(type(error)) as raised, full_disk_named(Path("outputs")):
            raise error
        assert raised.value is error
