"""Find out, without importing torch, which device a run would take, so that what it cannot do is refused at once."""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from qlora_exp.config.schema import Config
from qlora_exp.environment.device import Device, cpu_name, own_nvml_handle, remarks, resolve, visible_gpus
from qlora_exp.utils.errors import ConfigError

_NODES = ("nvidia[0-9]*", "kfd", "dxg")
"""Files in /dev of GPUs of NVIDIA, of AMD, and of Windows' GPUs under WSL."""
_FLASH = {
    "flash_attention_2": ("flash_attn", "pip install flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "build flash-attn-3"),
    "flash_attention_4": ("flash_attn", "pip install flash-attn-4"),
}
"""Module of each version of FlashAttention, and how to get it."""


def device(config: Config) -> Device | None:
    """Return the device that the run would take, as far as it can be told without torch; None if it cannot."""
    if config.device == "cpu" or (config.device != "mps" and _has_no_gpu()):
        return Device("cpu", cpu_name(), bf16=False, paging=False)
    if config.device == "mps" or (handle := own_nvml_handle()) is None:
        return None
    import pynvml

    name = str(pynvml.nvmlDeviceGetName(handle))
    major, _ = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Device("cuda", name, bf16=major >= 8, paging=True, visible_gpus=len(visible_gpus()))


def check(config: Config) -> list[str]:
    """Check that this machine can run the config.

    Returns:
        Sentences about what it can do but slowly.

    Raises:
        ConfigError: it lacks a package or a device.
    """
    found = device(config)
    if found is not None and found.type == "cpu" and config.device == "cuda":
        raise ConfigError("device=cuda: this machine has no GPU, or CUDA_VISIBLE_DEVICES hides it; use device=auto")
    if problems := [*_attention(config, found)]:
        raise ConfigError("\n".join(problems))
    if found is None or config.distributed.cpu_offload:  # which `recipe.launch` checks
        return []
    resolve(config, found)
    return [*remarks(config, found)]


def _attention(config: Config, found: Device | None) -> Iterator[str]:
    """Check FlashAttention: transformers refuses it only when it builds the model."""
    asked = config.model.attn_implementation or ""
    module, how = _FLASH.get(asked, ("", ""))
    if not module:
        return
    instead = "use model.attn_implementation=sdpa, which has a flash kernel of its own"
    if found is not None and found.type != "cuda":
        yield f"model.attn_implementation={asked} needs a GPU, and this run computes on the CPU: {instead}"
    elif find_spec(module) is None and find_spec("kernels") is None:
        yield f"model.attn_implementation={asked} needs a package that is not installed ({how}): {instead}"


def _has_no_gpu() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return sys.platform != "darwin" and not visible_gpus()
    return sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _NODES)
