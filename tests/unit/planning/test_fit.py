"""What is expected of a device follows from its runs, and from what is published if there were none."""

from dataclasses import replace

import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.planning.calibration import Calibration
from qlora_exp.planning.fake_tensors import Work
from qlora_exp.planning.fit import expected, room, step_seconds, verdict
from qlora_exp.planning.gpus import GPUS, Gpu, here, this_cpu
from qlora_exp.planning.planner import Prediction
from qlora_exp.planning.replay import Phase
from qlora_exp.utils.units import GIB

GPU = GPUS["rtx4090"]


def planned(gib: float, *work: Work) -> Prediction:
    return Prediction({"steady": Phase({"weights": int(gib * GIB)}, int(gib * GIB), int(gib * GIB))}, list(work), 1, 1)


@pytest.mark.parametrize(("gib", "says"), [(21, "fits"), (22, "may fit"), (25, "may fit"), (26, "does not fit")])
def test_what_just_fits_may_not(gib: int, says: str):
    assert verdict(planned(gib), GPU) == says


@pytest.mark.parametrize(
    ("gib", "says"), [(10.9, "fits"), (11.1, "may fit"), (11.4, "may fit"), (11.5, "does not fit")]
)
def test_runs_on_the_device_move_what_is_expected(gib: float, says: str):
    gpu = replace(GPU, calibration=Calibration("NVIDIA GeForce RTX 4090", 5, 1024.0, 2.0, 0.01, 0.02))
    assert expected(planned(gib), gpu) == pytest.approx((1 + 2 * gib) * GIB)
    assert verdict(planned(gib), gpu) == says
    just = Prediction({"steady": Phase({}, 0, int(room(gpu)))}, [], 1, 1)
    assert expected(just, gpu) * 1.02 == pytest.approx((24 - 0.6) * GIB)


def test_a_fit_that_was_far_off_says_little():
    gpu = replace(GPU, calibration=Calibration("NVIDIA GeForce RTX 4090", 5, 0.0, 1.0, 0.5, 3.0))
    assert [verdict(planned(gib), gpu) for gib in (5, 50)] == ["fits", "may fit"]


def test_a_step_takes_as_long_as_its_arithmetic_or_its_traffic():
    config = compose(["method=lora", "training.gradient_accumulation_steps=2"])
    work = Work(int(165e12), 0), Work(0, int(1008e9)), Work(int(1e12), int(1008e9))
    assert step_seconds(config, planned(1, *work), GPU) == pytest.approx(6)
    assert GPU.rates == "the maker's rates"


def test_a_step_in_float32_has_no_known_time_but_that_of_runs():
    config, prediction = compose(["method=lora"]), replace(planned(1, Work(10**12, 0)), in_16_bits=False)
    assert step_seconds(config, prediction, GPU) is None
    gpu = replace(GPU, calibration=Calibration("x", 4, 0.0, 1.0, 0.0, 0.0, flops_per_second=5e11))
    assert step_seconds(config, prediction, gpu) == pytest.approx(2)
    assert gpu.rates == "the median rate of 4 runs on it"


@pytest.mark.parametrize(
    "driver",
    [
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA A10G",
    ],
)
def test_a_gpu_of_another_kind_is_not_taken_for_one(driver: str):
    one = Calibration(driver, 3, 0.0, 1.0, 0.0, 0.0)
    assert not [gpu.name for gpu in GPUS.values() if gpu.calibrated([one]).calibration]


@pytest.mark.parametrize(
    ("name", "driver"),
    [
        ("rtx4090", "NVIDIA GeForce RTX 4090"),
        ("a100-80gb", "NVIDIA A100-SXM4-80GB"),
        ("v100-32gb", "Tesla V100-SXM2-32GB"),
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("t4", "Tesla T4"),
    ],
)
def test_a_driver_calls_a_gpu_by_a_longer_name(name: str, driver: str):
    one = Calibration(driver, 3, 0.0, 1.0, 0.0, 0.0)
    assert GPUS[name].calibrated([one]).calibration == one
    assert [other.name for other in GPUS.values() if other.calibrated([one]).calibration] == [name]


def test_a_device_is_known_by_its_own_name():
    cpu = this_cpu()
    assert cpu.memory_gib > 0
    assert cpu.calibrated([Calibration(cpu.name, 3, 0.0, 1.0, 0.0, 0.0)]).calibration
    assert cpu.calibrated([Calibration("another", 3, 0.0, 1.0, 0.0, 0.0)]).calibration is None


def test_a_run_is_on_what_is_here_unless_a_gpu_is_told(config):
    assert here(config("device=cpu"), None).type == "cpu"
    assert here(config("device=cpu"), 8.0).type == "cpu"
    assert here(compose(["method=lora"]), 8.0) == Gpu("GPU", 8.0)
