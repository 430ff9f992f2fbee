"""Sweeps through each launcher, as a user starts them."""

import subprocess
import sys

import pytest
from support import QUICK

from qlora_exp.tracking.mlflow_store import client


@pytest.mark.parametrize(
    ("launcher", "more"), [("local", []), ("joblib", []), ("slurm", ["hydra.launcher.cluster=local"])]
)
def test_every_launcher_runs_a_sweep_and_skips_finished_jobs(launcher: str, more: list[str], mlflow_uri, tmp_path):
    words = [sys.executable, "-m", "qlora_exp", "train", "-m", f"hydra/launcher={launcher}", *more, *QUICK]
    words += ["evaluation=loss_only", "method=lora", "training.max_length=5,300", f"tracking.uri={mlflow_uri}"]
    words += [f"tracking.experiment_name={launcher}"]
    # A name that shells, Hydra and SQL would read as something else; MLflow cannot create its own default store there.
    mlflow = client(mlflow_uri)
    folder = tmp_path / 'it\'s here, {1}="2"'
    folder.mkdir()
    for again in ([], [] if launcher == "local" else ["--dry-run"]):
        result = subprocess.run([*words, *again], capture_output=True, text=True, check=False, cwd=folder)
        assert "Traceback" not in result.stderr
        if not again:
            assert result.returncode == 1, result.stderr  # one of the two must fail
            assert "1 of 2 jobs did not end well" in result.stderr
    assert len(list(folder.glob("multirun/*/*/model"))) == 1
    assert "sweep.rerun=failed" in result.stdout
    assert "done in" in result.stdout
    runs = mlflow.search_runs([mlflow.get_experiment_by_name(launcher).experiment_id])
    (parent,) = [run for run in runs if "sweep.keys" in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.data.tags["outcome"] for run in children) == ["error", "ok"]
    assert len(runs) == 3
