"""Sweeps through each launcher, as a user starts them."""

import pytest
from support import QUICK, command, exit_code

from qlora_exp.tracking.mlflow_store import client


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "more"), [("local", []), ("joblib", []), ("slurm", ["hydra.launcher.cluster=local"])]
)
def test_every_launcher_runs_a_sweep_and_skips_finished_jobs(
    launcher: str, more: list[str], mlflow_uri, tmp_path, monkeypatch, capfd
):
    words = ["train", "-m", f"hydra/launcher={launcher}", *more, *QUICK]
    words += ["evaluation=loss_only", "method=lora", "training.max_length=5,300", f"tracking.uri={mlflow_uri}"]
    words += [f"tracking.experiment_name={launcher}"]
    # A name that shells, Hydra and SQL would read as something else; MLflow cannot create its own default store there.
    mlflow = client(mlflow_uri)
    folder = tmp_path / 'it\'s here, {1}="2"'
    folder.mkdir()
    monkeypatch.chdir(folder)
    for again in ([], [] if launcher == "local" else ["--dry-run"]):
        if launcher == "joblib" and not again:  # its workers end with the process that started them
            done = command(*words)
            code, shown, errors = done.returncode, done.stdout, done.stderr
        else:
            code = exit_code(*words, *again)
            shown, errors = capfd.readouterr()
        assert "Traceback" not in errors
        if not again:
            assert code == 1, errors  # one of the two must fail
            assert "1 of 2 jobs did not end well" in errors
    assert len(list(folder.glob("multirun/*/*/model"))) == 1
    assert "sweep.rerun=failed" in shown
    assert "done in" in shown
    runs = mlflow.search_runs([mlflow.get_experiment_by_name(launcher).experiment_id])
    (parent,) = [run for run in runs if "sweep.keys" in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.data.tags["outcome"] for run in children) == ["error", "ok"]
    assert len(runs) == 3
