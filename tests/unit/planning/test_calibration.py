"""What runs took is fitted to what was planned for them, and its error is that of runs left out."""

import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_exp.environment.device import Device, resolve
from qlora_exp.planning import calibration
from qlora_exp.planning.calibration import Calibration, fit, measured, ratio, read, write
from qlora_exp.tracking import run_key
from qlora_exp.utils.errors import ConfigError


def record(took, rates=1e9, device="GPU", outcome="ok", code=None, **planned):
    metrics = {f"plan/{phase}_mib": mib for phase, mib in planned.items()}
    metrics |= {f"memory/{phase}/reserved_peak_mib": took(mib) for phase, mib in planned.items()}
    metrics["flops_per_second"] = rates
    tags = {"identity.code": code or run_key.code_digest()}
    return SimpleNamespace(outcome=outcome, params={"resolved.device_name": device}, metrics=metrics, tags=tags)


@settings(deadline=None)  # the first imports scipy
@given(
    offset=st.floats(0, 2000),
    slope=st.floats(0.5, 3),
    plans=st.lists(st.floats(500, 50_000), min_size=3, max_size=8, unique_by=lambda mib: int(mib / 100)),
)
def test_fit_recovers_a_line(offset, slope, plans):
    few, *rest = sorted(plans)
    plans = [few, *rest, 4 * rest[-1], 8 * rest[-1]]  # any of them left out, the others are far enough apart
    found, left_out = fit([record(lambda mib: offset + slope * mib, steady=mib) for mib in plans])
    assert left_out == []
    assert found["GPU"].worst_error < 1e-6
    assert found["GPU"].expected(1000 * 2**20) == pytest.approx((offset + slope * 1000) * 2**20, rel=1e-4)


def test_worst_error_is_that_of_runs_left_out():
    plans = [1000.0, 2000.0, 4000.0, 8000.0]
    runs = [record(lambda mib: 1.1 * mib, steady=mib) for mib in plans]
    runs.append(record(lambda mib: 2.2 * mib, steady=3000.0))  # the others expect 3,300 MiB of it, and it took 6,600
    assert fit(runs)[0]["GPU"].worst_error == pytest.approx(1, abs=1e-6)


@settings(deadline=None)  # the first imports scipy
@given(st.lists(st.floats(-30, 30), min_size=4, max_size=8))
def test_one_plan_with_noise_gives_a_ratio(noise):
    runs = [
        record(lambda mib, more=more: 1.03 * mib + more, first_step=20_000.0, steady=20_040.0 + place)
        for place, more in enumerate(noise)
    ]
    found = fit(runs)[0]["GPU"]
    assert found.offset_mib == 0
    assert found.slope == pytest.approx(1.03, abs=0.002)


@settings(deadline=None)  # the first imports scipy
@given(
    plans=st.lists(st.floats(200, 50_000), min_size=3, max_size=9),
    shares=st.lists(st.floats(0.5, 2), min_size=9, max_size=9),
)
def test_fit_is_positive_and_increasing(plans, shares):
    runs = [record(lambda mib, share=share: share * mib, steady=mib) for mib, share in zip(plans, shares, strict=False)]
    found = fit(runs)[0]["GPU"]
    assert found.offset_mib >= 0
    assert 0 < found.expected(1.0) < found.expected(2**40)


def test_unbiased_runs_give_an_unbiased_fit():
    draw = random.Random(0)
    runs = [record(lambda mib: draw.gauss(1, 0.2) * mib, steady=1000.0 * (1 + place % 8)) for place in range(400)]
    assert fit(runs)[0]["GPU"].expected(4000 * 2**20) == pytest.approx(4000 * 2**20, rel=0.04)


def test_devices_are_fitted_separately_and_need_three_runs():
    runs = [record(lambda mib: mib, device="A", steady=mib) for mib in (10.0, 20.0, 30.0)]
    runs += [record(lambda mib: mib, device="B", steady=mib) for mib in (10.0, 20.0)]
    runs += [record(lambda mib: 9 * mib, device="A", outcome="oom", steady=5.0)]
    runs += [record(lambda mib: 9 * mib, device="A", code="older", steady=5.0)]
    found, left_out = fit(runs)
    assert (set(found), len(left_out)) == ({"A"}, 2)
    assert "1 runs of another version" in left_out[0]
    assert "B: 2 different runs, too few" in left_out[1]
    assert found["A"].runs == 3


def test_repeated_plan_gives_a_ratio():
    found, _ = fit([record(lambda mib: 1.5 * mib, steady=100.0) for _ in range(3)])
    assert (found["GPU"].offset_mib, found["GPU"].slope) == (0.0, 1.5)


def test_time_is_fitted_by_the_median_rate():
    runs = [record(lambda mib: mib, rate, steady=mib) for mib, rate in ((10.0, 1e9), (20.0, 2e9), (30.0, 4e9))]
    found = fit(runs)[0]["GPU"]
    assert found.flops_per_second == 2e9
    assert found.time_error == pytest.approx(3 / 1 - 1)


def test_imports_do_not_count_as_memory_on_a_cpu():
    metrics = {"memory/baseline/rss_mib": 700.0, "memory/steady/rss_peak_mib": 1700.0, "plan/steady_mib": 800.0}
    assert measured(metrics, "steady") == 1000.0
    assert ratio(metrics) == {"plan/memory_ratio": 1.25}
    assert ratio(metrics | {"memory/steady/reserved_peak_mib": 880.0}) == {"plan/memory_ratio": 1.1}
    assert ratio({"memory/steady/reserved_peak_mib": 880.0}) == {}


def test_ratio_compares_the_largest_phases():
    metrics = {"plan/first_step_mib": 100.0, "plan/steady_mib": 200.0}
    metrics |= {"memory/first_step/reserved_peak_mib": 300.0, "memory/steady/reserved_peak_mib": 220.0}
    assert ratio(metrics) == {"plan/memory_ratio": 1.5}


def test_calibration_survives_a_round_trip(tmp_path):
    found = [Calibration("GPU", 3, 1.5, 1.1, 0.01, 0.02, 1e12, 0.3), Calibration("CPU", 4, 0.0, 1.4, 0.1, 0.2)]
    assert read(tmp_path) == []
    assert write(found, tmp_path / "new") == tmp_path / "new" / "calibration.json"
    assert read(tmp_path / "new") == found


@pytest.mark.parametrize(
    "text", ["{", "[1]", '[{"device": "GPU"}]', '[{"device": "x", "slope": -1, "offset_mib": 0, "runs": 3}]', "3"]
)
def test_broken_calibration_file_is_rejected(text, tmp_path):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ConfigError, match="calibrate"):
        read(tmp_path)


def test_writing_keeps_fits_of_other_devices(tmp_path):
    one, other = Calibration("A", 3, 0.0, 1.0, 0.0, 0.0), Calibration("B", 3, 0.0, 2.0, 0.0, 0.0)
    write([one, other], tmp_path)
    write([Calibration("A", 4, 0.0, 3.0, 0.0, 0.0)], tmp_path)
    assert [(known.device, known.slope) for known in read(tmp_path)] == [("A", 3.0), ("B", 2.0)]


@pytest.mark.parametrize(
    "change",
    [
        {"slope": 0.0},
        {"slope": float("nan")},
        {"worst_error": float("inf")},
        {"offset_mib": -900.0},
        {"device": None},
        {"flops_per_second": -5},
    ],
    ids=str,
)
def test_invalid_calibration_is_rejected(change):
    with pytest.raises(ValueError, match="validation error"):
        Calibration(
            **{"device": "GPU", "runs": 3, "offset_mib": 0, "slope": 1, "median_error": 0, "worst_error": 0} | change
        )


@pytest.mark.slow
def test_packed_row_is_planned_at_full_length(make_config):
    resolved = resolve(make_config("method=lora"), Device("cpu", "CPU", False, False))
    rows, packed = (
        calibration.plan_run(
            make_config("method=lora", f"training.packing={on}", "training.max_length=512"), resolved, 64, 8
        )
        for on in ("false", "true")
    )
    assert packed["plan/steady_mib"] > 3 * rows["plan/steady_mib"]


@pytest.mark.slow
def test_plan_is_shared_by_runs_that_differ_in_irrelevant_keys(make_config, monkeypatch):
    from qlora_exp.planning import planner

    made = []
    real = planner.Planner
    monkeypatch.setattr(planner, "Planner", lambda *given: made.append(given) or real(*given))

    def planned(*words: str, longest: int = 77):
        checked = make_config("method=lora", *words)
        return calibration.plan_run(checked, resolve(checked, Device("cpu", "CPU", False, False)), longest, 9)

    first = planned("seed=1")
    assert planned("seed=2", "training.learning_rate=1e-3") == first
    before = len(made)
    assert before <= 1  # none, if another test has made it
    assert planned("method.r=3") != first
    assert planned(longest=99) != first
    assert len(made) <= before + 2
