"""What a process of a run checks before it begins."""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qlora_exp.recipe import launch
from qlora_exp.utils.errors import ConfigError, RankError


@pytest.fixture
def request_(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "end_with_parent", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    arguments = {"output_dir": tmp_path, "tags": {}}
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


MISTAKE = ConfigError("training.packing: not for this model")
KILLED = "its process 7 ended with SIGKILL"
NOTICED = RankError(1, f"ConfigError: {MISTAKE}", "error")


@pytest.mark.parametrize(
    ("errors", "raised", "recorded"),
    [
        ({0: MISTAKE}, "training.packing: not for this model", None),
        ({0: NOTICED, 1: MISTAKE}, "training.packing: not for this model", None),  # rank 1 was the first to find it
        ({0: KeyboardInterrupt(), 1: MISTAKE}, "training.packing: not for this model", str(NOTICED)),
        ({0: RankError(1, "ValueError: x", "error"), 1: ValueError("x")}, "rank 1: ValueError: x", None),
        ({0: KeyboardInterrupt(), 1: ValueError("x")}, "rank 1: ValueError: x", "rank 1: ValueError: x"),
        ({0: KeyboardInterrupt(), 1: KeyboardInterrupt()}, "rank 1: it was interrupted", "rank 1: it was interrupted"),
        ({0: KeyboardInterrupt()}, f"rank 1: {KILLED}", f"rank 1: {KILLED}"),
    ],
)
def test_mistake_of_the_user_is_raised_as_it_is_whichever_process_finds_it(
    errors, raised, recorded, request_, tmp_path, monkeypatch
):
    told = []
    monkeypatch.setattr("qlora_exp.tracking.lifecycle.record_dead_main", lambda *words: told.append(str(words[-1])))
    for rank, error in errors.items():
        (tmp_path / f"{rank}.error").write_bytes(pickle.dumps(error))
    failures = {rank: SimpleNamespace(pid=7, exitcode=1 if rank in errors else -9) for rank in (0, 1)}
    assert str(launch._first_failure(request_, failures)) == raised
    assert told == ([] if recorded is None else [recorded])


@pytest.mark.parametrize("errors", [{0: KeyboardInterrupt()}, {}], ids=["interrupted", "ended without a word"])
def test_why_a_process_was_killed_is_not_lost_if_the_one_that_killed_it_ends_first(
    errors, request_, tmp_path, monkeypatch
):
    recorded = []
    monkeypatch.setattr("qlora_exp.tracking.lifecycle.record_dead_main", lambda *words: recorded.append(str(words[-1])))
    for rank, error in errors.items():
        (tmp_path / f"{rank}.error").write_bytes(pickle.dumps(error))
    why = "its process 7 on host gave no sign of life for 5 s"
    (tmp_path / "1.silent").write_text(why)
    failures = {rank: SimpleNamespace(pid=7, exitcode=1 if rank == 0 else -9) for rank in (0, 1)}
    assert (
        str(launch._first_failure(request_, failures)) == "rank 1: its process 7 on host gave no sign of life for 5 s"
    )
    assert recorded == ["rank 1: its process 7 on host gave no sign of life for 5 s"]
