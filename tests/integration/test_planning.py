"""Runs that log what was planned for them, and fits of planned memory from such runs."""

import json

import pytest
from support import exit_code

from qlora_exp.planning import calibration


def test_run_logs_planned_and_measured_memory(run_quick):
    found = run_quick("tracking.plan=true", "training.eval_strategy=steps", "training.eval_steps=2").metrics
    assert found["plan/peak_mib"] == max(found[f"plan/{phase}_mib"] for phase in calibration.PHASES)
    before = found["memory/baseline/rss_mib"]
    pairs = {found[f"plan/{phase}_mib"]: found[f"memory/{phase}/rss_peak_mib"] - before for phase in calibration.PHASES}
    grown = {planned: took for planned, took in pairs.items() if took > 0}  # not where other tests freed as much before
    ratio = max(grown.values()) / max(grown) if grown else None
    assert found.get("plan/memory_ratio") == (ratio and pytest.approx(ratio))


def test_planning_does_not_change_losses(run_quick, read_losses):
    assert read_losses(run_quick("tracking.plan=true")) == read_losses(run_quick())


def test_run_that_cannot_be_planned_still_runs(run_quick, caplog):
    found = run_quick("tracking.plan=true", "method=lora", "quantization=torchao_int8").metrics
    assert "after/loss" in found
    assert "plan/peak_mib" not in found
    assert "quantization=torchao_int8 cannot be planned yet: choose nf4_double" in caplog.text


def test_calibrate_command_fits_recorded_runs_and_plan_uses_the_fit(run_quick, mlflow_uri, capsys, tmp_path):
    options = ["tracking.plan=true", "tracking.experiment_name=calibrate", "evaluation=loss_only"]
    options += ["training.eval_strategy=no"]
    for rows in (1, 2, 4):
        run_quick(*options, f"training.per_device_train_batch_size={rows}")
    assert exit_code("calibrate", "--uri", mlflow_uri, "--experiment", "calibrate") == 0
    assert "x plan" in capsys.readouterr().out
    (kept,) = json.loads((tmp_path / "mlruns" / "calibration.json").read_text())
    assert kept["runs"] == 3
    architecture = "+model.architecture={_name_or_path: random:llama, model_type: llama, num_hidden_layers: 2}"
    assert (
        exit_code("plan", "model=tiny_llama", architecture, "method=lora", "device=cpu", "training.max_length=64") == 0
    )
    shown = capsys.readouterr().out
    assert f"over 3 runs on {kept['device']}" in shown
    assert "at the median rate of 3 runs on it" in shown


def test_calibrate_without_planned_runs_fails_with_a_message(run_quick, mlflow_uri, capsys):
    run_quick("tracking.experiment_name=unplanned", "evaluation=loss_only")
    assert exit_code("calibrate", "--uri", mlflow_uri, "--experiment", "unplanned") == 1
    assert "error: MLflow has no runs of" in capsys.readouterr().err
