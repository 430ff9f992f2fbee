"""What the checks on each cluster share: a sweep's command, and what MLflow knows of it."""

import sys
from pathlib import Path

from support import QUICK

from qlora_exp.tracking.journal import metrics
from qlora_exp.tracking.mlflow_store import client


def command(store: str, experiment: str, *more: str) -> list[str]:
    where = [f"tracking.uri={store}", f"tracking.experiment_name={experiment}", "evaluation=loss_only", "method=lora"]
    return [sys.executable, "-m", "qlora_exp", "train", "-m", *QUICK, *where, *more]


def runs(store: str, experiment: str):
    mlflow = client(store)
    found = mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id])
    parents = [run for run in found if "sweep.keys" in run.data.tags]
    return parents, [run for run in found if "run_key" in run.data.tags]


def steps_told(folder: Path) -> list[int]:
    return [one["step"] for one in metrics(folder) if "train/loss" in one]
