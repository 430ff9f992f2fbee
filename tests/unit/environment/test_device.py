from typing import Any

import pynvml
import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import Device, autocast, detect, nvml_handles, resolve, take
from qlora_exp.utils.errors import ConfigError

CPU = Device("cpu", "some CPU", bf16=False, paging=False)
AMPERE = Device("cuda", "A100", bf16=True, paging=True)
TURING = Device("cuda", "T4", bf16=False, paging=True)
MPS = Device("mps", "Apple GPU", bf16=False, paging=False)


def test_cpu_computes_in_float32_without_checkpointing():
    resolved = resolve(compose(), CPU)
    assert (resolved.dtype, resolved.compute_dtype, resolved.adapter_dtype) == ("float32",) * 3
    assert not (resolved.bf16)
    assert not (resolved.fp16)
    assert not (resolved.gradient_checkpointing)


def test_cpu_falls_back_from_paging_and_says_so():
    resolved = resolve(compose(["method=qlora"]), CPU)
    assert resolved.optim == "adamw_torch"
    assert "no paged memory for paged_adamw_32bit" in str(resolved.optim_fallback)
    assert resolve(compose(["optimizer=paged_adamw_8bit"]), CPU).optim == "adamw_bnb_8bit"


@pytest.mark.parametrize(("device", "half"), [(AMPERE, "bfloat16"), (TURING, "float16")])
def test_gpu_stores_the_base_in_half_precision_and_trains_in_float32(device: Device, half: str):
    resolved = resolve(compose(["method=qlora"]), device)
    assert (resolved.dtype, resolved.compute_dtype, resolved.adapter_dtype) == (half, half, "float32")
    assert (resolved.bf16, resolved.fp16) == (half == "bfloat16", half == "float16")
    assert (resolved.optim, resolved.optim_fallback) == ("paged_adamw_32bit", None)
    assert resolved.gradient_checkpointing


@pytest.mark.parametrize("device", [CPU, AMPERE, TURING])
def test_lora_and_qlora_differ_in_the_base_only(device: Device):
    lora = resolve(compose(["method=lora", "optimizer=paged_adamw_32bit"]), device)
    qlora = resolve(compose(["method=qlora"]), device)
    for name in ("dtype", "adapter_dtype", "bf16", "fp16", "gradient_checkpointing", "optim"):
        assert getattr(lora, name) == getattr(qlora, name)


def test_full_fine_tuning_keeps_float32_weights_under_autocast():
    resolved = resolve(compose(["method=full"]), AMPERE)
    assert (resolved.dtype, resolved.bf16, resolved.adapter_dtype) == ("float32", True, None)


def test_explicit_choices_override_auto():
    resolved = resolve(
        compose(["model.dtype=float32", "training.fp16=true", "training.gradient_checkpointing=false",
                 "quantization.bnb_4bit_compute_dtype=float16", "method.adapter_dtype=bfloat16"]), AMPERE
    )  # fmt: skip
    assert (resolved.dtype, resolved.compute_dtype, resolved.adapter_dtype) == (
        "float32",
        "float16",
        "bfloat16",
    )
    assert (resolved.bf16, resolved.fp16, resolved.gradient_checkpointing) == (False, True, False)


@pytest.mark.parametrize(("key", "half"), [("fp16", "float16"), ("bf16", "bfloat16")])
@pytest.mark.parametrize("device", [AMPERE, TURING])
def test_base_and_4_bit_products_follow_the_precision_of_training(key: str, half: str, device: Device):
    resolved = resolve(compose(["method=qlora", f"training.{key}=true"]), device)
    assert (resolved.dtype, resolved.compute_dtype) == (half, half)
    assert (resolved.fp16, resolved.bf16) == (key == "fp16", key == "bf16")


@pytest.mark.parametrize("other", ["model.dtype", "quantization.bnb_4bit_compute_dtype"])
@pytest.mark.parametrize(("key", "half"), [("fp16", "bfloat16"), ("bf16", "float16")])
def test_two_16_bit_precisions_in_one_run_are_rejected(other: str, key: str, half: str):
    with pytest.raises(ConfigError, match=rf"training\.{key} and {other}={half} do not go together"):
        compose(["method=qlora", f"training.{key}=true", f"{other}={half}"])


def test_unsupported_settings_of_a_device_are_rejected():
    with pytest.raises(ConfigError, match="mps"):
        resolve(compose(["quantization=int8"]), MPS)
    with pytest.raises(ConfigError, match="fp16"):
        resolve(compose(["training.fp16=true"]), CPU)


def test_optimizer_that_is_compiled_needs_a_compiler_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    config = compose(["method=full", "optimizer=adamw_torch_8bit"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"^optimizer=adamw_torch_8bit: .* takes a C\+\+ compiler: install g\+\+"):
        resolve(config, CPU)
    assert resolve(config, AMPERE).optim == "adamw_torch_8bit"


def test_autocast_uses_the_precision_of_training():
    import torch

    with autocast(resolve(compose(["training.bf16=true"]), CPU)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(resolve(compose(), CPU)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_cpu_is_detected_and_named():
    found = detect("cpu")
    assert found.type == "cpu"
    assert found.name


def test_missing_device_is_rejected(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=cuda"):
        detect("cuda")


def test_quantized_base_on_a_mac_uses_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert detect("auto", bitsandbytes=True).type == "cpu"
    assert detect("auto").type == "mps"


def test_first_of_several_gpus_is_used_and_named(monkeypatch):
    current = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: f"GPU of rank {index}")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    resolved = resolve(compose(), detect("auto"))
    assert resolved.place == ("GPU of rank 0 (cuda:0, the first of 2 GPUs; CUDA_VISIBLE_DEVICES chooses another)")
    assert (resolved.device_index, resolved.visible_gpus) == (0, 2)
    take(resolved)
    take(resolve(compose(), CPU))
    assert current == [0]


@pytest.mark.parametrize(
    ("device_map", "refused"),
    [({"": 1}, True), ({"": "cuda:1"}, True), ({"": 0}, False), ({"a": 0, "b": 1}, False), ("auto", False)],
)
def test_device_map_that_names_another_gpu_is_rejected(device_map: Any, refused: bool):
    config = compose()
    config = config.model_copy(update={"model": config.model.model_copy(update={"device_map": device_map})})
    resolve(config, CPU)
    if refused:
        with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1"):
            resolve(config, AMPERE)
    else:
        assert resolve(config, AMPERE).place == "A100 (cuda:0)"


def test_gpus_are_listed_without_initializing_cuda(monkeypatch):
    monkeypatch.setattr("pynvml.nvmlInit", lambda: None)
    monkeypatch.setattr("pynvml.nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr("pynvml.nvmlDeviceGetHandleByIndex", lambda index: f"handle {index}")
    assert nvml_handles() == ["handle 0", "handle 1"]

    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr("pynvml.nvmlInit", no_driver)
    assert nvml_handles() == []


@pytest.mark.parametrize(("method", "recomputes"), [("lora", True), ("prefix_tuning", False)])
def test_auto_gradient_checkpointing_is_on_where_it_works(method: str, recomputes: bool):
    gpu = Device("cuda", "a GPU", bf16=True, paging=True)
    assert resolve(compose([f"method={method}"]), gpu).gradient_checkpointing is recomputes
