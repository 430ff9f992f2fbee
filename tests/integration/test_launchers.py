"""Sweeps through each launcher, as a user starts them."""

import pytest
from joblib.externals.loky import get_reusable_executor
from support import QUICK, exit_code

from qlora_exp.tracking.mlflow_store import client


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        ("local", []),
        pytest.param("joblib", [], marks=pytest.mark.thorough),
        pytest.param("slurm", ["hydra.launcher.cluster=local"], marks=pytest.mark.thorough),
    ],
)
def test_every_launcher_runs_a_sweep_and_skips_finished_jobs(
    launcher: str, more: list[str], mlflow_uri, tmp_path, monkeypatch, capfd, write_jsonl
):
    # A job whose file lacks a column fails before it loads torch, which costs each process of joblib and SLURM seconds.
    rows = write_jsonl([{"prompt": f"{number}+1=", "completion": str(number + 1)} for number in range(30)])
    words = [
        "train",
        "-m",
        f"hydra/launcher={launcher}",
        *more,
        *QUICK,
        "dataset=own",
        "dataset.format=prompt_completion",
    ]
    words += [
        f"dataset.path={rows}",
        "dataset.completion_column=answer,completion",
        "evaluation=loss_only",
        "method=lora",
    ]
    words += [f"tracking.uri={mlflow_uri}", f"tracking.experiment_name={launcher}"]
    # A name that shells, Hydra and SQL would read as something else; MLflow cannot create its own default store there.
    mlflow = client(mlflow_uri)
    folder = tmp_path / 'it\'s here, {1}="2"'
    folder.mkdir()
    monkeypatch.chdir(folder)
    for again in ([], [] if launcher == "local" else ["--dry-run"]):
        code = exit_code(*words, *again)
        if launcher == "joblib":  # its workers would stay until this process ends
            get_reusable_executor().shutdown()
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
