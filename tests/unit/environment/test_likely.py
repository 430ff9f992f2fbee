"""What a machine cannot run is refused before anything is loaded, without torch."""

import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment import device as environment_device
from qlora_exp.environment import likely
from qlora_exp.environment.device import Device
from qlora_exp.utils.errors import ConfigError

CPU = Device("cpu", "CPU", bf16=False, paging=False)
AMPERE = Device("cuda", "A100", bf16=True, paging=True)
TURING = Device("cuda", "T4", bf16=False, paging=True)


@pytest.mark.parametrize(
    ("words", "device", "message"),
    [
        (["training.fp16=true"], CPU, "training.fp16: needs a CUDA device"),
        (["device=cuda"], CPU, "use device=auto"),
        (["training.activation_offloading=true"], CPU, "needs a CUDA device"),
        (["model.attn_implementation=flash_attention_2"], CPU, "needs a GPU.*model.attn_implementation=sdpa"),
        (["model.attn_implementation=flash_attention_2"], AMPERE, "pip install flash-attn.*implementation=sdpa"),
        (["model.attn_implementation=flash_attention_3"], None, "not installed.*model.attn_implementation=sdpa"),
        (["method=full", "model.dtype=float16"], TURING, "use model.dtype=float32"),
    ],
)
def test_what_this_machine_cannot_run_is_refused(words, device, message, monkeypatch):
    monkeypatch.setattr(likely, "device", lambda config: device)
    monkeypatch.setattr(likely, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        likely.check(compose(words))


@pytest.mark.parametrize("device", [CPU, AMPERE, TURING, None])
@pytest.mark.parametrize("words", [[], ["method=full"], ["method=lora", "model.attn_implementation=eager"]])
def test_what_it_can_run_is_not(words, device, monkeypatch):
    monkeypatch.setattr(likely, "device", lambda config: device)
    assert likely.check(compose(words)) == []


def test_emulated_bfloat16_is_said(monkeypatch):
    monkeypatch.setattr(likely, "device", lambda config: TURING)
    (remark,) = likely.check(compose(["training.bf16=true"]))
    assert remark.startswith("training.bf16=true: T4 has no bfloat16")


@pytest.mark.parametrize(
    ("visible", "nodes", "asked", "found"),
    [
        ("", ["nvidia0"], "auto", "cpu"),
        ("-1", ["nvidia0"], "cuda", "cpu"),
        (None, [], "auto", "cpu"),
        (None, ["kfd"], "auto", None),
        (None, ["dxg"], "auto", None),
        ("GPU-1234", ["nvidia0"], "auto", None),
        ("3", [], "auto", None),
        (None, ["nvidia0"], "mps", None),
        (None, ["nvidia0"], "cpu", "cpu"),
        (None, ["nvidia0"], "auto", "cuda"),
    ],
)
def test_device_is_told_without_torch(visible, nodes, asked, found, monkeypatch, tmp_path):
    for node in nodes:
        (tmp_path / node).touch()
    monkeypatch.setattr(likely, "Path", lambda _: tmp_path)
    monkeypatch.setattr(likely.sys, "platform", "linux")
    gpus = [name for name in (visible or "").split(",") if name not in ("", "-1")]
    for module in (likely, environment_device):
        monkeypatch.setattr(
            module, "visible_gpus", lambda: gpus if visible is not None else ["0"] * ("nvidia0" in nodes)
        )
    monkeypatch.setattr(environment_device, "nvml_handles", lambda: ["handle"])
    monkeypatch.setattr("pynvml.nvmlDeviceGetName", lambda handle: "Tesla T4")
    monkeypatch.setattr("pynvml.nvmlDeviceGetCudaComputeCapability", lambda handle: (7, 5))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device = likely.device(compose([f"device={asked}", *["method=lora"] * (asked == "mps")]))
    assert (device and device.type) == found
    assert not (device and device.type == "cuda" and device.bf16)
