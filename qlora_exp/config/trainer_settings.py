"""Check that arguments of TRL's SFTConfig, most in `training.sft_config`, go together with the rest of a config.

Must not import torch.

Names, types and ranges are checked in `config.tables.sft_arguments`.
"""

from collections.abc import Iterator
from typing import Any

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.training import TrainingConfig
from qlora_exp.config.tables import sft_arguments

_WITH_TRAINED_PROMPT = ("P_TUNING", "PROMPT_TUNING")
"""Methods whose logits begin with those of trained tokens."""
_OF_WORKERS = ("dataloader_multiprocessing_context", "dataloader_persistent_workers", "dataloader_prefetch_factor")


def problems(config: Config) -> Iterator[str]:
    """Yield a message for each argument that would fail or change nothing with the rest of the config."""
    if config.device in ("cpu", "mps"):
        yield from (f"{key}: it needs a CUDA device, not device={config.device}" for key in needs_gpu(config.training))
    for name, why in _reasons(config, config.training.sft_config):
        yield f"training.sft_config.{name}: {why}"
    yield from _long_rows(config)


def needs_gpu(training: TrainingConfig) -> Iterator[str]:
    """Yield the keys that fail or change nothing without a GPU."""
    given = training.sft_config
    if training.activation_offloading:
        yield "training.activation_offloading"
    yield from (f"training.sft_config.{name}" for name in sft_arguments.GPU_ONLY if given.get(name) is not None)
    if (given.get("gradient_checkpointing_kwargs") or {}).get("offload"):
        yield "training.sft_config.gradient_checkpointing_kwargs.offload"


def unplanned(given: dict[str, Any]) -> Iterator[str]:
    """Yield the arguments that change a run's memory, and which plans do not know."""
    yield from (name for name in sft_arguments.UNPLANNED if given.get(name))


def _reasons(config: Config, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    training = config.training
    for name in _OF_WORKERS:
        if given.get(name) and not training.dataloader_num_workers:
            yield name, "it needs training.dataloader_num_workers, processes that load rows"
    for name in ("torch_compile_backend", "torch_compile_mode"):
        if given.get(name) and not training.torch_compile:
            yield name, "it needs training.torch_compile=true"
    if given.get("torch_compile_mode") and (backend := given.get("torch_compile_backend")) not in (None, "inductor"):
        yield "torch_compile_mode", f"torch_compile_backend={backend} has no modes"
    for name in ("ddp_broadcast_buffers", "ddp_bucket_cap_mb"):
        if given.get(name) is not None and config.distributed.engine != "ddp":
            yield name, f"it needs distributed=ddp, not distributed={config.distributed.engine}"
    if given.get("data_seed") is not None and training.train_sampling_strategy == "sequential":
        yield "data_seed", "training.train_sampling_strategy=sequential draws no order"
    yield from _evaluation(config, given)
    yield from _loss(config, given)
    yield from _batches(config, given)
    yield from _activations(config, given)


def _evaluation(config: Config, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    training, delay = config.training, given.get("eval_delay")
    if not delay:
        return
    if training.eval_strategy == "no":
        yield "eval_delay", "it needs training.eval_strategy=steps or epoch"
    elif training.eval_strategy == "steps" and 0 < training.max_steps < delay:
        yield "eval_delay", f"{delay:g} steps are more than training.max_steps={training.max_steps}"
    elif training.eval_strategy == "epoch" and training.max_steps < 0 and training.num_train_epochs < delay:
        yield "eval_delay", f"{delay:g} are more than training.num_train_epochs={training.num_train_epochs:g}"


def _loss(config: Config, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    name = "label_smoothing_factor"
    if not given.get(name):
        return
    if config.training.loss_type != "nll":
        yield name, f"training.loss_type={config.training.loss_type} is not smoothed"
    if config.method.peft_type in _WITH_TRAINED_PROMPT:
        yield name, f"method={config.method.name} puts trained tokens before a row, with which labels would not match"
    if config.distributed.shards:
        yield name, f"it was never tested with distributed={config.distributed.engine}: use distributed=ddp or none"


def _batches(config: Config, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    name, training = "pad_to_multiple_of", config.training
    if (multiple := given.get(name)) is None:
        return
    if training.packing:
        yield name, "sequences of packed rows (training.packing=true) are not padded"
    if training.padding == "free":
        yield name, "training.padding=free has no padding"
    if multiple > training.max_length:
        yield name, f"{multiple} is more than training.max_length={training.max_length}"


def _activations(config: Config, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    recomputing = given.get("gradient_checkpointing_kwargs")
    if recomputing and config.training.gradient_checkpointing is not True:
        yield "gradient_checkpointing_kwargs", "it needs training.gradient_checkpointing=true"
    name, engine = "gradient_checkpointing_kwargs.offload", config.distributed.engine
    if not (recomputing or {}).get("offload"):
        return
    if config.training.activation_offloading:
        yield name, "training.activation_offloading=true offloads activations too: set one of them"
    if config.distributed.shards:
        yield name, f"it was never tested with distributed={engine}"


def _long_rows(config: Config) -> Iterator[str]:
    """Check what saves the memory of long rows."""
    for key in ("activation_offloading", "tiled_mlp"):
        if getattr(config.training, key) and config.distributed.shards:
            yield f"training.{key} was never tested with distributed={config.distributed.engine}: use {key}=false"
    if config.training.tiled_mlp:
        yield from untiled(config)


def untiled(config: Config) -> Iterator[str]:
    """Yield why MLPs cannot be computed in parts (`training.tiled_mlp`), as far as the config tells."""
    method = config.method.name
    if config.depends_on_batch:
        yield f"training.tiled_mlp: method={method} depends on all tokens of a batch: use training.tiled_mlp=false"
    elif why := config.refusal("gradient_checkpointing"):
        yield f"training.tiled_mlp: method={method} cannot compute activations again ({why}): use tiled_mlp=false"
    if config.training.torch_compile:
        yield "training.tiled_mlp was never tested with training.torch_compile: set one of them"
