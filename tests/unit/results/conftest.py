"""Fixtures of tests of results."""

import hashlib
import json

import pytest

from qlora_exp.tracking.mlflow_store import client
from qlora_exp.tracking.stores.sqlite_store import sqlite_file

BASE = {
    "model.model_name_or_path": "m", "method.name": "lora", "method.r": "4", "training.loss_type": "nll",
    "data.evaluation_fingerprint": "rows", "training.per_device_train_batch_size": "4", "device": "auto",
    "training.gradient_accumulation_steps": "1", "tracking.uri": "None",
}  # fmt: skip


@pytest.fixture
def past_runs(mlflow_uri, tmp_path):
    """An experiment of the test's own; `past(...)` adds a run with one loss for each held-out row."""
    mlflow = client(mlflow_uri)
    experiment = mlflow.create_experiment(
        tmp_path.name, artifact_location=(sqlite_file(mlflow_uri).parent / "artifacts").as_uri()
    )
    count = iter(range(10**6))

    def add(losses=(), *, seed=1, outcome="ok", tags=None, metrics=None, weights=None, sources=None, **params):
        number = next(count)
        known = {
            "run_key": hashlib.sha256(f"{tmp_path}{number}".encode()).hexdigest()[:16],
            "outcome": outcome,
            **(tags or {}),
        }
        run = mlflow.create_run(experiment, number + 1, known, f"run {number}").info.run_id
        given = {key.replace("__", "."): str(value) for key, value in params.items()}
        for key, value in (BASE | {"seed": str(seed)} | given).items():
            mlflow.log_param(run, key, value)
        weights = weights or [10.0] * len(losses)
        if losses:
            rows = [{"nll": a * b, "tokens": b} for a, b in zip(losses, weights, strict=True)]
            named = [row | {"source": name} for row, name in zip(rows, sources or (), strict=False)] or rows
            lines = [json.dumps(row) for row in named]
            mlflow.log_text(run, "\n".join(lines), "evaluation/after_losses.jsonl")
            mean = sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights)
            mlflow.log_metric(run, "after/loss", mean)
        for key, value in (metrics or {}).items():
            mlflow.log_metric(run, key, value)
        mlflow.set_terminated(run, "FINISHED" if outcome == "ok" else "FAILED")
        return run

    add.uri, add.mlflow, add.experiment = mlflow_uri, mlflow, tmp_path.name
    return add
