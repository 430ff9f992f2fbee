"""What runs took is fitted to what was planned for them, and its error is that of runs left out."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp import calibration
from qlora_exp.calibration import Calibration, fit, measured, ratio, read, write
from qlora_exp.cli import main
from qlora_exp.device import Device, resolve
from qlora_exp.errors import ConfigError


def record(took, rates=1e9, device="GPU", outcome="ok", **planned):
    metrics = {f"plan/{phase}_mib": mib for phase, mib in planned.items()}
    metrics |= {f"memory/{phase}/reserved_peak_mib": took(mib) for phase, mib in planned.items()}
    metrics["flops_per_second"] = rates
    return SimpleNamespace(outcome=outcome, params={"resolved.device_name": device}, metrics=metrics)


@given(
    offset=st.floats(0, 2000),
    slope=st.floats(0.5, 3),
    plans=st.lists(st.floats(500, 50_000), min_size=3, max_size=8, unique_by=lambda mib: int(mib / 100)),
)
def test_a_line_is_found_again_and_misses_nothing(offset, slope, plans):
    found, few = fit([record(lambda mib: offset + slope * mib, steady=mib) for mib in plans])
    assert few == {}
    assert found["GPU"].worst_error < 1e-6
    assert found["GPU"].expected(1000 * 2**20) == pytest.approx((offset + slope * 1000) * 2**20, rel=1e-4)


def test_the_error_is_that_of_runs_that_were_left_out():
    plans = [1000.0, 2000.0, 4000.0, 8000.0]
    runs = [record(lambda mib: 1.1 * mib, steady=mib) for mib in plans]
    runs.append(record(lambda mib: 2.2 * mib, steady=3000.0))  # the others expect 3,300 MiB of it, and it took 6,600
    assert fit(runs)[0]["GPU"].worst_error == pytest.approx(0.5, abs=1e-6)


def test_devices_are_apart_and_too_few_runs_give_no_fit():
    runs = [record(lambda mib: mib, device="A", steady=mib) for mib in (10.0, 20.0, 30.0)]
    runs += [record(lambda mib: mib, device="B", steady=mib) for mib in (10.0, 20.0)]
    runs += [record(lambda mib: 9 * mib, device="A", outcome="oom", steady=5.0)]
    found, few = fit(runs)
    assert (set(found), few) == ({"A"}, {"B": 2})
    assert found["A"].runs == 3


def test_one_plan_again_and_again_gives_a_ratio():
    found, _ = fit([record(lambda mib: 1.5 * mib, steady=100.0) for _ in range(3)])
    assert (found["GPU"].offset_mib, found["GPU"].slope) == (0.0, 1.5)


def test_time_is_the_median_rate():
    runs = [record(lambda mib: mib, rate, steady=mib) for mib, rate in ((10.0, 1e9), (20.0, 2e9), (30.0, 4e9))]
    found = fit(runs)[0]["GPU"]
    assert found.flops_per_second == 2e9
    assert found.time_error == pytest.approx(4 / 1.5 - 1)


def test_on_a_cpu_the_imports_are_no_part_of_what_was_taken():
    metrics = {"memory/baseline/rss_mib": 700.0, "memory/steady/rss_peak_mib": 1700.0, "plan/steady_mib": 800.0}
    assert measured(metrics, "steady") == 1000.0
    assert ratio(metrics) == {"plan/memory_ratio": 1.25}
    assert ratio(metrics | {"memory/steady/reserved_peak_mib": 880.0}) == {"plan/memory_ratio": 1.1}
    assert ratio({"memory/steady/reserved_peak_mib": 880.0}) == {}


def test_the_ratio_is_of_the_fullest_phases():
    metrics = {"plan/first_step_mib": 100.0, "plan/steady_mib": 200.0}
    metrics |= {"memory/first_step/reserved_peak_mib": 300.0, "memory/steady/reserved_peak_mib": 220.0}
    assert ratio(metrics) == {"plan/memory_ratio": 1.5}


def test_what_is_kept_is_read_back(tmp_path):
    found = [Calibration("GPU", 3, 1.5, 1.1, 0.01, 0.02, 1e12, 0.3), Calibration("CPU", 4, 0.0, 1.4, 0.1, 0.2)]
    assert read(tmp_path) == []
    assert write(found, tmp_path / "new") == tmp_path / "new" / "calibration.json"
    assert read(tmp_path / "new") == found


@pytest.mark.parametrize(
    "text", ["{", "[1]", '[{"device": "GPU"}]', '[{"device": "x", "slope": -1, "offset_mib": 0, "runs": 3}]', "3"]
)
def test_a_file_that_is_broken_says_so(text, tmp_path):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ConfigError, match="calibrate"):
        read(tmp_path)


def test_no_fit_of_nonsense():
    for slope, error in ((0.0, 0.1), (float("nan"), 0.1), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="no fit"):
            Calibration("GPU", 3, 0.0, slope, 0.0, error)


def test_a_run_logs_what_was_planned_and_what_it_took(run):
    found = run("tracking.plan=true", "training.eval_strategy=steps", "training.eval_steps=2").metrics
    assert found["plan/peak_mib"] == max(found[f"plan/{phase}_mib"] for phase in calibration.PHASES)
    took = max(found[f"memory/{phase}/rss_peak_mib"] for phase in calibration.PHASES)
    ratio = (took - found["memory/baseline/rss_mib"]) / found["plan/peak_mib"]
    assert found["plan/memory_ratio"] == pytest.approx(ratio)


def test_planning_changes_no_result(run, losses):
    assert losses(run("tracking.plan=true")) == losses(run())


def test_a_run_that_cannot_be_planned_runs_all_the_same(run, caplog):
    found = run("tracking.plan=true", "method=boft").metrics
    assert "after/loss" in found
    assert "plan/peak_mib" not in found
    assert "not planned: method=boft cannot be planned" in caplog.text


def test_an_error_of_planning_does_not_end_the_run(config, monkeypatch, caplog):
    from qlora_exp import plan

    monkeypatch.setattr(plan, "Planner", lambda *_: {}["nothing"])
    checked = config("method=lora")
    assert calibration.plan_run(checked, resolve(checked, Device("cpu", "CPU", False, False)), 8, 8) == {}
    assert "not planned: KeyError" in caplog.text


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)


def test_the_command_fits_recorded_runs_and_plans_use_it(run, store, capsys, tmp_path):
    options = ["tracking.plan=true", "tracking.experiment_name=calibrate", "evaluation=loss_only"]
    for rows in (1, 2, 4):
        run(*options, f"training.per_device_train_batch_size={rows}")
    assert command("calibrate", "--uri", store, "--experiment", "calibrate") == 0
    assert "3" in capsys.readouterr().out
    (kept,) = json.loads((tmp_path / "mlruns" / "calibration.json").read_text())
    assert kept["runs"] == 3
    architecture = "+model.architecture={_name_or_path: random:llama, model_type: llama, num_hidden_layers: 2}"
    assert command("plan", "model=tiny_llama", architecture, "method=lora", "device=cpu", "training.max_length=64") == 0
    shown = capsys.readouterr().out
    assert f"of 3 runs on {kept['device']}" in shown
    assert "at the median rate of 3 runs on it" in shown


def test_without_planned_runs_there_is_nothing_to_fit(run, store, capsys):
    run("tracking.experiment_name=unplanned", "evaluation=loss_only")
    assert command("calibrate", "--uri", store, "--experiment", "unplanned") == 1
    assert "error: MLflow has no runs of" in capsys.readouterr().err
