"""What a process of a run checks before it begins."""

import pickle
from dataclasses import replace

import pytest

from qlora_exp.recipe import launch


@pytest.fixture
def request_(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "end_with_parent", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    arguments = {"output_dir": tmp_path}
    return launch._Request(lambda *_, **__: "done", make_config(), arguments, {}, str(tmp_path), 30, tmp_path)


def test_process_calls_the_run_with_its_arguments(request_):
    assert launch._main(request_) == "done"


def test_process_with_other_code_says_so(request_, tmp_path):
    with pytest.raises(SystemExit):
        launch._main(replace(request_, package="/elsewhere/qlora_exp/recipe/launch.py"))
    error = pickle.loads((tmp_path / "0.error").read_bytes())
    assert "this command runs /elsewhere/qlora_exp/recipe/launch.py, and its processes would run " in str(error)


def test_error_that_cannot_be_pickled_keeps_what_it_says():
    class OwnError(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    assert str(pickle.loads(launch._pickled(OwnError("a", "b")))) == "OwnError: a and b"
