"""What is expected of a device follows from its runs, and from what is published if there were none."""

from dataclasses import replace

import pytest

from qlora_exp.planning.calibration import Calibration
from qlora_exp.planning.fit import expected, room, step_seconds, verdict
from qlora_exp.planning.gpus import GPUS
from qlora_exp.planning.planner import Prediction
from qlora_exp.planning.recording.fake_tensors import Work
from qlora_exp.planning.replay import Phase
from qlora_exp.utils.units import GIB

GPU = GPUS["rtx4090"]


def planned(gib: float, *work: Work) -> Prediction:
    return Prediction({"steady": Phase({"weights": int(gib * GIB)}, int(gib * GIB), int(gib * GIB))}, list(work), 1, 1)


@pytest.mark.parametrize(("gib", "says"), [(21, "fits"), (22, "may fit"), (25, "may fit"), (26, "does not fit")])
def test_prediction_near_the_limit_may_fit(gib: int, says: str):
    assert verdict(planned(gib), GPU) == says


@pytest.mark.parametrize(
    ("gib", "says"), [(10.9, "fits"), (11.1, "may fit"), (11.4, "may fit"), (11.5, "does not fit")]
)
def test_calibration_changes_the_verdict(gib: float, says: str):
    gpu = replace(GPU, calibration=Calibration("NVIDIA GeForce RTX 4090", 5, 1024.0, 2.0, 0.01, 0.02))
    assert expected(planned(gib), gpu) == pytest.approx((1 + 2 * gib) * GIB)
    assert verdict(planned(gib), gpu) == says
    just = Prediction({"steady": Phase({}, 0, int(room(gpu)))}, [], 1, 1)
    assert expected(just, gpu) * 1.02 == pytest.approx((24 - 0.6) * GIB)


def test_calibration_with_large_errors_gives_no_certain_verdict():
    gpu = replace(GPU, calibration=Calibration("NVIDIA GeForce RTX 4090", 5, 0.0, 1.0, 0.5, 3.0))
    assert [verdict(planned(gib), gpu) for gib in (5, 50)] == ["fits", "may fit"]


def test_step_time_is_the_largest_of_arithmetic_traffic_and_starting():
    work = Work(int(165e12), 0), Work(0, int(1008e9)), Work(int(1e12), int(1008e9)), Work(1, 1)
    assert step_seconds(replace(planned(1, *work), batches=2), GPU) == pytest.approx(2 * (3 / 0.7 + 40e-6))
    assert GPU.rates == "0.7 of the manufacturer's rates and 40 µs an operation"


def test_float32_step_has_a_time_only_with_calibration():
    prediction = replace(planned(1, Work(10**12, 0)), in_16_bits=False)
    assert step_seconds(prediction, GPU) is None
    gpu = replace(GPU, calibration=Calibration("x", 4, 0.0, 1.0, 0.0, 0.0, flops_per_second=5e11))
    assert step_seconds(prediction, gpu) == pytest.approx(2)
    assert gpu.rates == "the median rate of 4 runs on it"
