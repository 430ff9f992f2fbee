from types import SimpleNamespace

import pytest
from helpers.planning import ARCHITECTURE
from support import exit_code

from qlora_exp.config.hydra_compose import compose
from qlora_exp.planning import gpus
from qlora_exp.planning.calibration import Calibration
from qlora_exp.planning.gpus import GPUS, Gpu, here, this_cpu


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "rtx4091"], "did you mean 'rtx4090'"),
        (["--vram", "-3"], "--vram -3"),
        (["--vram", "8", "--gpu", "t4"], "one of them"),
        (["--price", "1"], "--price needs the GPU's name"),
        (["--gpu", "a10,a10"], "a10 is named twice"),
        (["--gpu", "a10,a11"], "--gpu a11: not listed"),
        (["--gpu", "a10", "--price", "-1"], "--price -1: not a price"),
        (["--gpu", "a10", "--price", "nan"], "--price nan: not a price"),
        (["--gpu", "a10", "--price", "a10=cheap"], "--price a10=cheap: not a price"),
        (["--gpu", "a10,l4", "--price", "t4=1"], "--price t4=...: not a card of --gpu a10,l4"),
        (["--gpu", "a10,l4", "--price", "a10=1,2"], "'2' names no card"),
        (["--gpu", "a10", "--price", "a10=1,a10=2"], "a10 is priced twice"),
        (["--rows", "0"], "--rows 0: not a number of training rows"),
        (["--rows", "9", "training.max_steps=3"], "training.max_steps=3 already says how long"),
    ],
)
def test_invalid_gpu_argument_is_rejected(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert exit_code("plan", "model=tiny_llama", ARCHITECTURE, "method=lora", *arguments) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "driver",
    [
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 NVL",
        "NVIDIA GeForce RTX 4070 Ti SUPER",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA A10G",
    ],
)
def test_similar_driver_name_of_another_gpu_does_not_match(driver: str):
    one = Calibration(driver, 3, 0.0, 1.0, 0.0, 0.0)
    assert not [gpu.name for gpu in GPUS.values() if gpu.calibrated([one]).calibration]


@pytest.mark.parametrize(
    ("name", "driver"),
    [
        ("rtx4090", "NVIDIA GeForce RTX 4090"),
        ("a100-80gb", "NVIDIA A100-SXM4-80GB"),
        ("v100-32gb", "Tesla V100-SXM2-32GB"),
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("h100-pcie", "NVIDIA H100 PCIe"),
        ("rtx4070ti", "NVIDIA GeForce RTX 4070 Ti"),
        ("rtx5090", "NVIDIA GeForce RTX 5090"),
        ("rtx6000-ada", "NVIDIA RTX 6000 Ada Generation"),
        ("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
        ("a40", "NVIDIA A40"),
        ("t4", "Tesla T4"),
    ],
)
def test_longer_driver_name_matches_its_gpu(name: str, driver: str):
    one = Calibration(driver, 3, 0.0, 1.0, 0.0, 0.0)
    assert GPUS[name].calibrated([one]).calibration == one
    assert [other.name for other in GPUS.values() if other.calibrated([one]).calibration] == [name]


def test_calibration_matches_a_device_by_name():
    cpu = this_cpu()
    assert cpu.memory_gib > 0
    assert cpu.calibrated([Calibration(cpu.name, 3, 0.0, 1.0, 0.0, 0.0)]).calibration
    assert cpu.calibrated([Calibration("another", 3, 0.0, 1.0, 0.0, 0.0)]).calibration is None


def test_device_is_the_present_one_unless_vram_is_given(make_config):
    assert here(make_config("device=cpu"), None).type == "cpu"
    assert here(make_config("device=cpu"), 8.0).type == "cpu"
    assert here(compose(["method=lora"]), 8.0) == Gpu("GPU", 8.0)


@pytest.mark.parametrize(
    ("driver", "rates"), [("NVIDIA GeForce RTX 4090", GPUS["rtx4090"].tflops), ("NVIDIA GeForce RTX 4070 SUPER", 0)]
)
def test_plan_without_a_gpu_is_for_the_one_of_this_machine(driver, rates, monkeypatch, capsys):
    monkeypatch.setattr(gpus, "own_nvml_handle", lambda: "handle")
    monkeypatch.setattr("pynvml.nvmlDeviceGetName", lambda handle: driver)
    monkeypatch.setattr("pynvml.nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(total=12 * 2**30))
    monkeypatch.setattr("pynvml.nvmlDeviceGetCudaComputeCapability", lambda handle: (8, 9))
    found = gpus.of_this_machine()
    assert (found.name, found.memory_gib, found.tflops, found.bf16) == (driver, 12, rates, True)
    assert exit_code("plan", "model=tiny_llama", ARCHITECTURE, "method=lora") == 0
    assert f"fits in 12 GiB ({driver})" in capsys.readouterr().out


def test_card_for_a_run_on_the_cpu_is_refused(capsys):
    assert exit_code("plan", "model=tiny_llama", ARCHITECTURE, "device=cpu", "--vram", "8") == 1
    assert "device=cpu is planned for the CPU of this machine" in capsys.readouterr().err
