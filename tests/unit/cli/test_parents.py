from itertools import chain

import pytest
from support import exit_code

from qlora_exp.cli import main

# Of each command that takes KEY=VALUE: what it is called with, as words and pairs that belong together.
TAKING = {
    "plan": [["--gpu", "t4"], ["--price", "1"]],
    "advise": [["--models"], ["--vram", "24"]],
    "probe": [["--base", "4bit"], ["--base", "8bit"]],
    "quantize-error": [["--blocksize", "128"], ["--out", "x"]],
    "reproduce": [["RUN"], ["--check-only"], ["--out", "x"]],
    "export": [["RUN"], ["--to", "gptq"], ["--out", "gptq"]],
    "deployment-gap": [["RUN"], ["--forms", "merged"], ["--uri", "sqlite://"]],
}
NOT_TAKING = {
    "merge": ["RUN", "--out", "x"],
    "bundle": ["RUN"],
    "register": ["RUN", "--name", "x"],
    "generate": ["RUN", "--prompt", "x"],
    "chat": ["RUN"],
    "serve": ["RUN"],
    "calibrate": [],
    "ui": [],
    "doctor": ["--json"],
    "schema": ["model"],
}


def test_every_command_is_tested():
    takes_other_words = {"train", "keys", "runs", "compare", "sync"}
    assert {*TAKING, *NOT_TAKING, *takes_other_words} == {*main.parsers()}


@pytest.mark.parametrize(("command", "parts"), TAKING.items(), ids=TAKING)
def test_key_value_goes_before_between_and_after_options(command: str, parts: list[list[str]]):
    first = 1 if parts[0] == ["RUN"] else 0
    expected = vars(main._parse([command, *chain(*parts), "a.b=-1", "c=d e"]))
    assert expected["overrides"] == ["a.b=-1", "c=d e"]
    for one in range(first, len(parts) + 1):
        for two in range(one, len(parts) + 1):
            pieces = [parts[:one], [["a.b=-1"]], parts[one:two], [["c=d e"]], parts[two:]]
            words = [word for piece in pieces for part in piece for word in part]
            assert vars(main._parse([command, *words])) == expected, words


@pytest.mark.parametrize(("command", "parts"), TAKING.items(), ids=TAKING)
def test_other_words_and_unknown_options_are_refused_by_name(command: str, parts: list[list[str]], capsys):
    words = [command, *chain(*parts)]
    assert exit_code(*words, "a=b", "dataset.path") == 2
    assert "argument KEY=VALUE: 'dataset.path' has no '='" in capsys.readouterr().err
    for unknown in ("--unknown", "--unknown=1", "-u"):
        assert exit_code(*words, "a=b", unknown) == 2
        assert f"unrecognized arguments: {unknown}" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "words"), NOT_TAKING.items(), ids=NOT_TAKING)
def test_key_value_is_refused_where_it_has_no_meaning(command: str, words: list[str], capsys):
    assert exit_code(command, *words, "method.r=8") == 2
    assert "unrecognized arguments: method.r=8" in capsys.readouterr().err


def test_required_words_are_asked_for(capsys):
    for words, missing in (
        (["probe"], "KEY=VALUE"),
        (["export", "a=b"], "--out, --to"),
        (["chat"], "RUN|MODEL|FOLDER"),
    ):
        assert exit_code(*words) == 2
        assert f"required: {missing}" in capsys.readouterr().err
