"""What only a CUDA device can show; `nox -s gpu` runs this folder."""

import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment import efficiency
from qlora_exp.environment.device import detect, resolve
from qlora_exp.environment.efficiency import EnergyMeter, FlopCounter, peak_flops
from qlora_exp.environment.memory import MIB, MemoryMonitor
from qlora_exp.environment.turns import Turns
from qlora_exp.models.base import load_model
from qlora_exp.tracking.journal import last_message

pytestmark = pytest.mark.gpu
OFFLOAD = "distributed.cpu_offload=true"


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_method_trains_on_the_gpu(method: str, run_quick):
    metrics = run_quick(
        "device=cuda", f"method={method}", "training.learning_rate=1e-2", "training.max_steps=6"
    ).metrics
    assert metrics["after/loss"] < metrics["before/loss"]
    assert metrics["memory/steady/allocated_peak_mib"] > 0


def test_run_out_of_gpu_memory_is_recorded_as_oom(run_quick, mlflow_uri, tmp_path):
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            run_quick("device=cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert last_message(tmp_path / "run0")["outcome"] == "oom"
    assert run_quick("device=cuda").metrics["after/loss"] > 0


@pytest.mark.parametrize("quantization", ["nf4_double", "fp4", "int8"])
def test_quantized_base_does_the_same_arithmetic_on_the_gpu(quantization: str):
    counts = []
    for name in ("none", quantization):
        config = compose(["model=tiny_llama", "method=lora", f"quantization={name}"])
        model = load_model(config.model, config.quantization, resolve(config, detect("cuda"))).train()
        with FlopCounter() as counter:
            model(input_ids=torch.arange(40, 72, device="cuda")[None])
        counts.append(counter.flops)
    assert counts[0] == counts[1] > 0


def test_resumed_run_ends_like_an_uninterrupted_one_on_the_gpu(run_quick, read_losses):
    words = ["device=cuda", "method=qlora", "training.max_steps=4"]
    words += ["training.save_strategy=steps", "training.save_steps=2"]
    whole = run_quick(*words)
    resumed = run_quick(*words, f"training.resume_from_checkpoint={whole.output_dir}/checkpoints/checkpoint-2")
    assert read_losses(resumed) == read_losses(whole)[2:]
    assert resumed.metrics["after/loss"] == whole.metrics["after/loss"]


@pytest.mark.parametrize("words", [["method=full"], ["method=lora"], ["method=qlora"], ["method=lora", OFFLOAD]])
def test_sharded_run_on_the_gpu_is_the_whole_one(words, run_quick, read_losses):
    """FSDP2 with one process, on the GPU and with parameters in the CPU's memory."""
    words = [*words, "device=cuda", "method.lora_dropout=0"] if words != ["method=full"] else [*words, "device=cuda"]
    whole = run_quick(*[word for word in words if word != OFFLOAD])
    sharded = run_quick(*words, "distributed=fsdp", "distributed.num_processes=1")
    assert read_losses(sharded) == pytest.approx(read_losses(whole), rel=1e-3)
    assert sharded.metrics["after/loss"] == pytest.approx(whole.metrics["after/loss"], rel=1e-3)


@pytest.mark.parametrize(
    "argument",
    [
        "activation_offloading=true",
        "sft_config.gradient_checkpointing_kwargs={offload: true}",
        "sft_config.torch_empty_cache_steps=1",
        "sft_config.dataloader_pin_memory=false",
        "sft_config.tf32=false",
    ],
)
def test_arguments_for_gpus_change_no_losses(argument: str, run_quick, read_losses):
    """Never run so far."""
    words = ["device=cuda", "method=lora", "method.lora_dropout=0", "training.gradient_checkpointing=true"]
    losses = [read_losses(run_quick(*words, *more)) for more in ([], [f"training.{argument}"])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_energy_of_a_gpu_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(efficiency, "PEAK_SECONDS", 0.1)  # other tests measure the peak roughly
    with EnergyMeter(tmp_path) as meter:
        end = time.monotonic() + 2  # NVML's counter moved by nothing in a hundred products of an H100
        while time.monotonic() < end:
            most = peak_flops("cuda", torch.bfloat16)
    assert meter.joules is not None
    assert meter.joules > 0
    assert most > 1e12


def test_peak_of_a_phase_is_measured_on_the_gpu():
    monitor = MemoryMonitor("cuda")
    with monitor.phase("step"):
        torch.zeros(64 * MIB // 4, device="cuda")
    assert 64 <= monitor.peaks["step"]["allocated"] - torch.cuda.memory_allocated() / MIB < 80


def test_gpu_is_detected():
    assert detect("auto").type == "cuda"


ON_GPU = """
import importlib, os, sys, torch

def is_bad():
    if (child := os.fork()) == 0:
        os._exit(torch.cuda._is_in_bad_fork())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1

def import_module(name, package=None, load=importlib.import_module):
    module = load(name, package)
    assert not is_bad(), f"{name} initialized CUDA"
    return module

importlib.import_module = import_module
import qlora_exp.recipe.preload
assert "qlora_exp.training.trainer" in sys.modules
if os.fork() == 0:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    x = torch.randn(64, 64, device="cuda")
    error = (dequantize_4bit(*quantize_4bit(x, quant_type="nf4")) - x).abs().mean()
    os._exit(0 if 0 < error < 0.2 else 1)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_process_forked_after_preloading_uses_the_gpu():
    result = subprocess.run([sys.executable, "-c", ON_GPU], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("rows_together", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_jobs_on_one_base_learn_on_the_gpu_what_they_learn_alone(
    method: str, rows_together: bool, run_quick, read_losses, mlflow_uri, tmp_path
):
    words = ["device=cuda", f"method={method}", "method.lora_dropout=0", f"tracking.uri={mlflow_uri}"]
    chosen = [[*words, "method.r=4"], [*words, "method.r=16", "training.learning_rate=1e-3"]]
    results: dict[int, Any] = {}

    def job(number: int):
        def call() -> None:
            results[number] = run_quick(*chosen[number])

        return call

    turns = Turns([job(0), job(1)], [tmp_path / "0.log", tmp_path / "1.log"], rows_together)
    assert turns.run() == [None, None]
    for number, each in enumerate(chosen):
        alone = run_quick(*each)
        assert read_losses(results[number]) == pytest.approx(read_losses(alone), rel=1e-3)
        assert results[number].metrics["after/loss"] == pytest.approx(alone.metrics["after/loss"], rel=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_in_4_bits_learn_on_the_gpu(family: str, run_quick):
    words = ["device=cuda", "method=qlora", "method.lora_dropout=0", "training.learning_rate=1e-2"]
    metrics = run_quick(*words, f"model.model_name_or_path=random:{family}", "training.max_steps=6").metrics
    assert metrics["after/loss"] < metrics["before/loss"]


@pytest.mark.parametrize(
    "words", [["training.padding=free"], ["training.padding=by_length"], ["training.activation_offloading=true"]]
)
def test_ways_to_compute_a_step_give_the_same_losses_on_the_gpu(words, run_quick, read_losses):
    shared = ["device=cuda", "method=lora", "method.lora_dropout=0", "training.gradient_accumulation_steps=2"]
    plain, other = run_quick(*shared), run_quick(*shared, *words)
    assert read_losses(other) == pytest.approx(read_losses(plain), rel=2e-3)
