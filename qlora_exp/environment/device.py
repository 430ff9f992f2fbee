"""Detect the device, and make all choices that depend on it: precision, gradient checkpointing, paged optimizers.

Device-specific decisions are made only here. `resolve` is a pure function, so tests can resolve configs for devices
that they do not have; only `detect` asks torch, and only `nvml_handles` asks NVIDIA's driver.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qlora_exp.config import trainer_settings
from qlora_exp.config.schema import Config
from qlora_exp.config.tables.optimizers import COMPILED
from qlora_exp.environment.ranks import ranks
from qlora_exp.utils.errors import ConfigError

# The same optimizer without paging. bitsandbytes has no unpaged 32-bit AdamW that differs from torch's.
UNPAGED = {
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw_8bit": "adamw_bnb_8bit",
    "paged_lion_32bit": "lion_32bit",
    "paged_lion_8bit": "lion_8bit",
}


@dataclass(frozen=True)
class Device:
    """One accelerator, or the CPU."""

    type: str
    name: str
    bf16: bool
    """Whether it computes fast in bfloat16."""
    paging: bool
    """Whether it has unified memory, so that bitsandbytes can page optimizer states."""
    visible_gpus: int | None = None
    """Number of GPUs that this process sees; None for other devices, or if it was not determined."""
    index: int = 0
    """Index of the GPU that this process takes."""


@dataclass(frozen=True)
class Resolved:
    """The values that replace `auto` and fallbacks in this run; logged with it, so that comparisons are fair."""

    device: str
    device_index: int | None
    """Index of the process's only GPU, the first that it sees unless the run has several; None for other devices."""
    visible_gpus: int | None
    device_name: str
    dtype: str
    compute_dtype: str | None
    """Dtype of 4-bit matrix products; None if the base is not quantized to 4 bits by bitsandbytes."""
    quant_storage: str | None
    """Dtype in which 4-bit weights are packed so that FSDP can shard them; None: uint8, or no such weights."""
    adapter_dtype: str | None
    """Dtype of the adapter's parameters; None for a full fine-tune."""
    bf16: bool
    fp16: bool
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    recomputed_layers: int | None
    """Number of layers, the first ones, that recompute; None: all or none, as `gradient_checkpointing` says."""
    activation_offloading: bool
    tiled_mlp: bool
    padding: str
    """`batch`, `by_length` or `free`, as in `training.padding`."""
    tuned: str | None
    """What `training.tune` chose, with the reason; None if it chose nothing."""
    optim: str
    optim_fallback: str | None
    """Why `optim` differs from the configured optimizer; None if it does not."""
    num_processes: int
    """Number of processes that share the run."""
    global_batch: int
    """Rows of one optimizer step, of all processes together."""

    @property
    def place(self) -> str:
        """Return the device's name for people to read."""
        if self.device_index is None:
            return self.device_name
        others = (self.visible_gpus or 1) > 1 and ranks().size == 1
        choice = f", the first of {self.visible_gpus} GPUs; CUDA_VISIBLE_DEVICES chooses another" if others else ""
        return f"{self.device_name} ({self.device}:{self.device_index}{choice})"


def detect(requested: str = "auto", bitsandbytes: bool = False) -> Device:
    """Return the device to run on.

    Args:
        requested: `auto`, `cpu`, `cuda` or `mps`.
        bitsandbytes: whether bitsandbytes quantizes the base. It does not run on mps, where `auto` then means the CPU.

    Raises:
        ConfigError: the requested device does not exist.
    """
    import torch

    if requested in ("auto", "cuda") and torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # older GPUs emulate it, slowly
        index, count = ranks().local_rank, torch.cuda.device_count()
        if index >= count:
            raise ConfigError(f"distributed.num_processes: process {index} of this machine has no GPU: {count} visible")
        return Device("cuda", torch.cuda.get_device_name(index), bf16, True, visible_gpus=count, index=index)
    if (requested == "mps" or (requested == "auto" and not bitsandbytes)) and torch.backends.mps.is_available():
        return Device("mps", "Apple GPU", bf16=False, paging=False)
    if requested in ("auto", "cpu"):
        return Device("cpu", cpu_name(), bf16=False, paging=False)
    raise ConfigError(f"device={requested}: torch {torch.__version__} finds no such device here; use device=auto")


def visible_gpus() -> list[str]:
    """Return the GPUs this process may use, as named in `CUDA_VISIBLE_DEVICES`, without initializing CUDA."""
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting is not None:
        return [name for name in setting.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def take(resolved: Resolved) -> None:
    """Make the run's GPU the current one, which torch and other libraries use for `cuda` without a number."""
    if resolved.device_index is not None:
        import torch

        torch.cuda.set_device(resolved.device_index)


def places(model: Any) -> list[str]:
    """Return the devices with the model's weights: several if `model.device_map` spreads them."""
    return sorted({str(parameter.device) for parameter in model.parameters()})


def nvml_handles() -> list[Any]:
    """Return NVML's handle of each NVIDIA GPU, none without a driver. This does not initialize CUDA."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def own_nvml_handle() -> Any | None:
    """Return NVML's handle of the GPU that a run here would take; None if it cannot be told, or there is none."""
    visible, handles = visible_gpus(), nvml_handles()
    if not visible or not visible[0].isdecimal() or int(visible[0]) >= len(handles):
        return None
    return handles[int(visible[0])]


def resolve(config: Config, device: Device) -> Resolved:
    """Replace each `auto` of `config` by its value for `device`.

    On a CPU, float32 is the most precise choice; where bfloat16 is faster, only `training.tune` chooses it, because it
    changes losses by more than the order of sums does. On a GPU, the frozen base is bfloat16 (float16 on older
    GPUs) under autocast, while trainable parameters stay float32, for both LoRA and QLoRA.

    Raises:
        ConfigError: the device does not support a setting.
    """
    training, quantization = config.training, config.quantization
    if device.type == "mps" and quantization.bitsandbytes:
        raise ConfigError("quantization: bitsandbytes does not run on mps; use quanto_int4, none or device=cpu")
    if device.type != "cuda" and training.fp16 is True:
        raise ConfigError(f"training.fp16: needs a CUDA device, not {device.type}; use training.fp16=auto")
    shared = config.distributed
    if device.type != "cuda" and shared.cpu_offload:
        raise ConfigError(f"distributed.cpu_offload: needs a CUDA device, not {device.type}; use false")
    if device.type != "cuda" and (unmet := next(trainer_settings.needs_gpu(training), None)):
        raise ConfigError(f"{unmet}: it needs a CUDA device, not {device.type}; leave it out")
    mapped = config.model.device_map
    if device.type == "cuda" and isinstance(mapped, dict) and (elsewhere := _another_gpu([*mapped.values()])):
        raise ConfigError(
            f"model.device_map: puts the complete model on GPU {elsewhere}, but a run computes on the first GPU that "
            f"it sees; remove model.device_map, and set CUDA_VISIBLE_DEVICES={elsewhere}"
        )

    asked = "float16" if training.fp16 is True else "bfloat16" if training.bf16 is True else None
    half = asked or ("bfloat16" if device.bf16 else "float16")  # the base follows the precision of training
    best = half if device.type == "cuda" else "float32"
    full = config.method.peft_type is None
    bf16 = training.bf16 if training.bf16 != "auto" else best == "bfloat16" and training.fp16 is not True
    fp16 = training.fp16 if training.fp16 != "auto" else best == "float16" and not bf16
    dtype = _auto(config.model.dtype, "float32" if full else best)
    compute = _auto(quantization.bnb_4bit_compute_dtype, best) if quantization.load_in_4bit else None
    if fp16:
        _check_fp16(config, dtype)
    if fp16 and shared.shards:
        raise ConfigError(
            f"distributed={shared.engine} has no loss scaling for float16; use distributed=ddp or training.bf16=true"
        )
    optim: str = config.optimizer.optim
    fallback = None
    if optim in UNPAGED and (shared.shards or not device.paging):
        fallback = f"{f'distributed={shared.engine}' if shared.shards else device.type} has no paged memory for {optim}"
        optim = UNPAGED[optim]
    if optim in COMPILED and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError(
            f"optimizer={config.optimizer.name}: torchao compiles it, which on a CPU takes a C++ compiler: install g++ "
            "or choose another optimizer"
        )
    checkpoints = device.type == "cuda" and not config.refusal("gradient_checkpointing")
    recomputes: bool = _auto(training.gradient_checkpointing, checkpoints)
    return Resolved(
        device=device.type,
        device_index=device.index if device.type == "cuda" else None,
        visible_gpus=device.visible_gpus,
        device_name=device.name,
        dtype=dtype,
        compute_dtype=compute,
        quant_storage=dtype if shared.shards and quantization.load_in_4bit else None,
        adapter_dtype=None if full else _auto(config.method.adapter_dtype, "float32"),
        bf16=bf16,
        fp16=fp16,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        tuned=None,
        gradient_checkpointing=recomputes,
        recomputed_layers=training.recomputed_layers if recomputes else None,
        activation_offloading=training.activation_offloading,
        tiled_mlp=training.tiled_mlp,
        padding=training.padding or "batch",
        optim=optim,
        optim_fallback=fallback,
        num_processes=ranks().size,
        global_batch=ranks().size * training.per_device_train_batch_size * training.gradient_accumulation_steps,
    )


def _check_fp16(config: Config, dtype: str) -> None:
    """Check that float16 autocast goes with what is trained; `config.crosschecks` compares it with the base.

    Raises:
        ConfigError: it does not.
    """
    if config.method.peft_type is None and dtype == "float16":
        raise ConfigError(
            "model.dtype=float16: float16 autocast scales gradients, which must be float32, and method="
            f"{config.method.name} trains these weights; use model.dtype=float32"
        )


def remarks(config: Config, device: Device) -> Iterator[str]:
    """Yield a sentence for each setting that the device can compute, but slowly."""
    asked = [
        key
        for key, value in (
            ("training.bf16=true", config.training.bf16),
            ("model.dtype=bfloat16", config.model.dtype),
            ("quantization.bnb_4bit_compute_dtype=bfloat16", config.quantization.bnb_4bit_compute_dtype),
        )
        if value is True or value == "bfloat16"
    ]
    if device.type == "cuda" and not device.bf16 and asked:
        yield (
            f"{' and '.join(asked)}: {device.name} has no bfloat16 of its own and emulates it, which is slow; auto "
            "takes float16 there"
        )


def autocast(resolved: Resolved) -> Any:
    """Return an autocast context with the precision of training, for measurements."""
    import torch

    half = torch.float16 if resolved.fp16 else torch.bfloat16
    return torch.autocast(resolved.device, half, enabled=resolved.bf16 or resolved.fp16)


def computes_in(resolved: Resolved) -> Any:
    """Return the dtype of most matrix products in training."""
    import torch

    return torch.bfloat16 if resolved.bf16 else torch.float16 if resolved.fp16 else getattr(torch, resolved.dtype)


def _another_gpu(mapped: list[int | str]) -> str | None:
    """Return the index of a device map's only device, if it is a GPU but not the first."""
    only = {str(place).removeprefix("cuda:") for place in mapped}
    number = only.pop() if len(only) == 1 else ""
    return number if number.isdigit() and number != "0" else None


def _auto(value: Any, chosen: Any) -> Any:
    return chosen if value == "auto" else value


@cache
def cpu_name() -> str:
    """Return the system's name of the CPU."""
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a CPU without a model name
        return platform.processor() or platform.machine()
