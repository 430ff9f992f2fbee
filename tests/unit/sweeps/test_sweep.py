import pytest

from qlora_exp.config.sections.sweep import SweepConfig
from qlora_exp.sweeps.jobs import Job
from qlora_exp.sweeps.sweep import Sweep, _advice
from qlora_exp.utils.errors import TrackingError


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


def test_closing_line_can_be_pasted(make_config, tmp_path):
    for words, option in (([], ""), (["tracking.uri=http://h:5000"], " --uri http://h:5000")):
        config = make_config("method=lora", *words)
        sweep = Sweep(tmp_path / "a b", SweepConfig(), lambda waiting: [])
        sweep.register([Job({}, [], config, {}, "key", tmp_path)])
        assert sweep._compare_command() == f"qlora-exp compare 'a b'{option}"


def test_sweep_that_mlflow_refuses_leaves_no_folder(make_config, mlflow_uri, mlflow_client, tmp_path, monkeypatch):
    mlflow_client.delete_experiment(mlflow_client.create_experiment("deleted, for a sweep"))
    monkeypatch.chdir(tmp_path)
    words = [f"tracking.uri={mlflow_uri}", "tracking.experiment_name='deleted, for a sweep'"]
    folder = tmp_path / "multirun" / "refused"
    job = Job({}, [], make_config("method=lora", *words), {}, "key", folder / "job")
    with (
        pytest.raises(TrackingError, match="was deleted"),
        Sweep(folder, SweepConfig(), lambda waiting: []) as sweep,
    ):
        sweep.run([job])
    assert not list(tmp_path.iterdir())
