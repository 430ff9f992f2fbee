"""Past runs on the terminal."""

import pytest
from support import exit_code


@pytest.fixture
def listed(past_runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def listed(*words):
        code = exit_code("runs", "--uri", past_runs.uri, "--experiment", past_runs.experiment, *words)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return listed


def names(out: str) -> list[str]:
    return [line.split("│")[4].strip() for line in out.splitlines() if line.startswith("│")]


def test_runs_are_listed_newest_first_and_sorted_on_request(past_runs, listed):
    for loss, r in ((3.0, 8), (1.0, 16), (2.0, 4)):
        past_runs([loss], method__r=r)
    past_runs(outcome="oom", method__r=2, metrics={"after/loss": float("nan")})
    code, out, _ = listed()
    assert code == 0
    assert names(out) == ["run 3", "run 2", "run 1", "run 0"]
    assert "oom" in out
    assert names(listed("--sort", "after/loss")[1]) == ["run 1", "run 2", "run 0", "run 3"]  # without one, or NaN: last
    assert names(listed("--sort", "after/loss", "--reverse")[1]) == ["run 0", "run 2", "run 1", "run 3"]
    assert names(listed("--reverse")[1]) == ["run 0", "run 1", "run 2", "run 3"]
    assert names(listed("--sort", "method.r")[1]) == ["run 3", "run 2", "run 0", "run 1"]  # as numbers
    assert names(listed("--filter", "params.method.r = '4'")[1]) == ["run 2"]
    code, out, _ = listed("--limit", "1", "--columns", "method.r,outcome")
    assert names(out) == ["run 3"]
    assert "3 more; --limit 0 lists all" in out
    assert len(names(listed("--limit", "0")[1])) == 4


def test_one_run_is_shown_with_what_is_not_as_by_default(past_runs, listed):
    run = past_runs([3.0], training__max_steps=77, training__packing=False, tags={"failure": "none"})
    code, out, _ = listed(run)
    assert code == 0
    assert run in out
    assert "│ training.max_steps " in out
    assert "│ after/loss " in out
    assert "training.packing" not in out  # as by default


@pytest.mark.parametrize("words", [["--sort", "after/los"], ["--columns", "after/los"]])
def test_unknown_key_is_rejected_with_a_hint(past_runs, listed, words):
    past_runs([3.0])
    code, _, err = listed(*words)
    assert code == 1
    assert "no run has 'after/los'; did you mean 'after/loss'?" in err


def test_no_runs_are_said_to_be_none(past_runs, listed):
    past_runs([3.0])
    code, _, err = listed("--filter", "params.seed = '9'")
    assert code == 1
    assert "MLflow has no runs of params.seed = '9' there" in err


def test_ids_are_shown_on_request_and_users_if_there_are_several(past_runs, listed):
    run = past_runs([3.0], tags={"mlflow.user": "ana"})
    assert "ana" not in listed()[1]
    past_runs([2.0], tags={"mlflow.user": "ben"})
    assert listed("--columns", "user")[1].count("ben") == 1
    out = listed("--columns", "run_id")[1]
    assert run in out
    assert "ana" in out
    assert "ben" in out
