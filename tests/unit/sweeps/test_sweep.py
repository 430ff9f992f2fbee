import pytest

from qlora_exp.sweeps.sweep import _advice


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["ok", "pruned"], ""),
        (["ok", "oom"], "1 of 2 jobs did not end well; 1 failed: sweep.rerun=failed runs them again"),
        (["killed", "not started"], "2 of 2 jobs did not end well; 2 did not finish: the same command"),
        (["nan", "running", "ok"], "2 of 3 jobs did not end well; 1 failed: sweep.rerun=failed runs them again; 1 did"),
    ],
)
def test_advice_names_what_to_do_about_failed_jobs(outcomes: list[str], expected: str):
    assert _advice(outcomes).startswith(expected)
    assert bool(_advice(outcomes)) is bool(expected)
