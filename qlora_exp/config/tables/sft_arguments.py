"""Check `training.sft_config`: the arguments of TRL's SFTConfig that a run takes, and why it does not take the others.

SFTConfig has all arguments of transformers' TrainingArguments. `sft_arguments.json` lists them with their types, since
importing TRL takes seconds; `nox -s library-settings` writes it. Each argument is in exactly one of four tables here:
`ACCEPTED`, `OWN_KEYS`, `DECIDED` and `NO_EFFECT`. `config.trainer_settings` checks how accepted ones go together with
the rest of a config.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, TypeAdapter

from qlora_exp.config.tables import declared_types
from qlora_exp.utils.errors import did_you_mean

FILE = Path(__file__).with_suffix(".json")

_MANY = 1000
ACCEPTED: dict[str, Any] = {
    "data_seed": Annotated[int, Field(ge=0, lt=2**32)],
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"],
    "dataloader_persistent_workers": None,
    "dataloader_pin_memory": None,
    "dataloader_prefetch_factor": Annotated[int, Field(ge=1, le=_MANY)],
    "ddp_broadcast_buffers": bool,
    "ddp_bucket_cap_mb": Annotated[int, Field(ge=1, le=100 * _MANY)],
    "eval_delay": Annotated[float, Field(ge=0)],
    "gradient_checkpointing_kwargs": dict[str, Any],
    "label_smoothing_factor": Annotated[float, Field(ge=0, lt=1)],
    "pad_to_multiple_of": PositiveInt,
    "router_aux_loss_coef": Annotated[float, Field(ge=0)],
    "tf32": bool,
    "torch_compile_backend": Literal["inductor", "eager", "aot_eager", "cudagraphs"],
    "torch_compile_mode": Literal["default", "reduce-overhead", "max-autotune"],
    "torch_empty_cache_steps": PositiveInt,
}
"""Arguments that are handed to TRL, with a type that is narrower than the library's; None: as the library declares.

With each, null means that it is not given."""

MEANINGS = {
    "data_seed": "Random seed of the order of training rows. Default: the run's seed.",
    "dataloader_multiprocessing_context": "How the processes that load training rows are started.",
    "dataloader_persistent_workers": "Keep the processes that load training rows from one epoch to the next.",
    "dataloader_pin_memory": "Put loaded rows into pinned memory, from which they are copied to the GPU faster.",
    "dataloader_prefetch_factor": "Batches that each loading process prepares ahead.",
    "ddp_broadcast_buffers": "DDP: copy the model's buffers from the first process to the others in each forward pass.",
    "ddp_bucket_cap_mb": "DDP: size in MB of the parts in which gradients are exchanged.",
    "eval_delay": "Steps or epochs (as eval_strategy counts) before the first evaluation during training.",
    "gradient_checkpointing_kwargs": "Which layers are recomputed: every_n_layers, and offload to the CPU's memory.",
    "label_smoothing_factor": "Share of the probability that is spread evenly over all tokens as the target. 0: none.",
    "pad_to_multiple_of": "Pad each batch to a length that is a multiple of this number of tokens.",
    "router_aux_loss_coef": "Mixtures of experts: weight of the router's loss in the training loss. 0: none.",
    "tf32": "Multiply float32 matrices in TensorFloat-32 on NVIDIA GPUs: faster, with 10 bits of precision.",
    "torch_compile_backend": "Backend of torch.compile, with training.torch_compile=true.",
    "torch_compile_mode": "Mode of torch.compile, with training.torch_compile=true.",
    "torch_empty_cache_steps": "Steps after which torch's cache of GPU memory is emptied.",
}
"""What each accepted argument means."""

_OF_TRAINING = (
    "activation_offloading",
    "assistant_only_loss",
    "bf16",
    "completion_only_loss",
    "dataloader_num_workers",
    "eval_steps",
    "eval_strategy",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "learning_rate",
    "load_best_model_at_end",
    "logging_first_step",
    "logging_steps",
    "loss_type",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_length",
    "max_steps",
    "neftune_noise_alpha",
    "num_train_epochs",
    "packing",
    "packing_strategy",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "resume_from_checkpoint",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "torch_compile",
    "train_sampling_strategy",
    "warmup_steps",
    "weight_decay",
)
"""Arguments for which section `training` has a key of the same name.

`training.arguments` hands them to TRL as they are set, but for those in its `_NOT_AS_SET`."""
OWN_KEYS = {name: f"training.{name}" for name in _OF_TRAINING} | {
    "activation_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing_kwargs": "training.sft_config.gradient_checkpointing_kwargs",
    "adam_beta1": "optimizer.adam_beta1",
    "adam_beta2": "optimizer.adam_beta2",
    "adam_epsilon": "optimizer.adam_epsilon",
    "chat_template_path": "dataset.chat_template",
    "dataset_text_field": "dataset.text_column",
    "ddp_timeout": "distributed.ddp_timeout",
    "eval_on_start": "evaluation.before",
    "logging_strategy": "training.logging_steps",
    "optim": "optimizer.optim",
    "optim_args": "optimizer.optim_args",
    "optim_target_modules": "optimizer.optim_target_modules",
    "output_dir": "hydra.run.dir",
    "padding_free": "training.padding",
    "run_name": "tracking.run_name",
    "seed": "seed",
    "trust_remote_code": "model.trust_remote_code",
    "use_cpu": "device",
}
"""Arguments for which there is a key, by which they must be set."""

_MODEL = "the run loads the model itself: set the keys of model and quantization"
_ENGINE = "the run starts and joins its processes itself: choose distributed=ddp, fsdp or deepspeed_zero3"
_TRACKED = "the run keeps its own journal and sends it to MLflow: set the keys of tracking"
_HUB = "a run uploads nothing: `qlora-exp register --push` uploads a model that was trained"
_LOGGED = "the run writes its own log"
_BEST = "the best checkpoint is the one with the lowest held-out loss (training.load_best_model_at_end)"
_RESUMABLE = "a run that is cut off must go on exactly where it was"
_TOKENIZED = "the run tokenizes rows itself, and TRL only truncates and packs them"
_TOKENS = "the tokens are those of the model's own tokenizer"
_ALL_ROWS = "a run trains each row once in an epoch, however many processes share them"
DECIDED = {
    "accelerator_config": _ALL_ROWS,
    "auto_find_batch_size": "a run keeps its batch size; `qlora-exp advise` finds the largest that fits",
    "average_tokens_across_devices": "several processes train as one does: each token counts the same",
    "bf16_full_eval": "it would leave the trained weights in bfloat16; for autocast, set training.bf16",
    "dataloader_drop_last": _ALL_ROWS,
    "dataloader_in_order": "the same seed gives the same order of rows",
    "dataset_kwargs": _TOKENIZED,
    "dataset_num_proc": _TOKENIZED,
    "ddp_backend": _ENGINE,
    "ddp_find_unused_parameters": "the method decides it",
    "ddp_static_graph": "a method may use other parameters in each step, which DDP would then get wrong",
    "debug": "a run stops by itself when a loss is not finite",
    "deepspeed": _ENGINE,
    "disable_tqdm": "the run shows its own progress",
    "enable_jit_checkpoint": "the run handles signals itself; training.save_strategy=steps keeps checkpoints",
    "eos_token": _TOKENS,
    "eval_packing": "the held-out loss is that of single rows",
    "fp16_full_eval": "it would leave the trained weights in float16; for autocast, set training.fp16",
    "fsdp": _ENGINE,
    "fsdp_config": _ENGINE,
    "full_determinism": (
        "the trainer would ask for it after cuBLAS has started, when torch refuses it; on a CPU the same seed gives "
        "the same losses without it"
    ),
    "greater_is_better": _BEST,
    "hub_always_push": _HUB,
    "hub_model_id": _HUB,
    "hub_private_repo": _HUB,
    "hub_revision": _HUB,
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "ignore_data_skip": _RESUMABLE,
    "include_num_input_tokens_seen": "the run counts tokens itself, with and without those that carry loss",
    "liger_kernel_config": "Liger's kernels are not supported",
    "local_rank": _ENGINE,
    "log_level": _LOGGED,
    "log_level_replica": _LOGGED,
    "log_on_each_node": "one run has one log",
    "logging_nan_inf_filter": "it would hide a divergence",
    "metric_for_best_model": _BEST,
    "model_init_kwargs": _MODEL,
    "pad_token": _TOKENS,
    "parallelism_config": _ENGINE,
    "project": _TRACKED,
    "push_to_hub": _HUB,
    "report_to": _TRACKED,
    "restore_callback_states_from_checkpoint": _RESUMABLE,
    "save_on_each_node": "one run has one folder",
    "save_only_model": _RESUMABLE,
    "shuffle_dataset": "rows are shuffled in each epoch (training.train_sampling_strategy=random)",
    "skip_memory_metrics": "the run measures memory itself",
    "trackio_bucket_id": _TRACKED,
    "trackio_space_id": _TRACKED,
    "trackio_static_space_id": _TRACKED,
    "truncation_mode": "a row that is too long loses its end, as the label audit and the held-out rows have it",
    "use_cache": "training needs no cache of keys and values, and generation has one",
    "use_liger_kernel": "Liger's kernels are not supported",
}
"""Arguments that the run decides, with the reason and, if there is one, what to use instead."""

_LOSS_ONLY = "evaluation during training only measures the loss"
_COLUMNS = "TRL gets two columns only, input_ids and labels"
_COMMAND = "no part of the trainer reads it; scripts of transformers do"
NO_EFFECT = {
    "batch_eval_metrics": _LOSS_ONLY,
    "do_eval": _COMMAND,
    "do_predict": _COMMAND,
    "do_train": _COMMAND,
    "eval_accumulation_steps": _LOSS_ONLY,
    "eval_do_concat_batches": _LOSS_ONLY,
    "eval_use_gather_object": _LOSS_ONLY,
    "include_for_metrics": _LOSS_ONLY,
    "label_names": _COLUMNS,
    "length_column_name": _COLUMNS,
    "prediction_loss_only": _LOSS_ONLY,
    "remove_unused_columns": _COLUMNS,
}
"""Arguments that would change nothing in a run, with the reason."""

GPU_ONLY = (
    "dataloader_pin_memory",
    "tf32",
    "torch_empty_cache_steps",
)
"""Accepted arguments that fail or change nothing without a GPU."""
UNPLANNED = (
    "ddp_bucket_cap_mb",
    "gradient_checkpointing_kwargs",
    "label_smoothing_factor",
    "torch_empty_cache_steps",
)
"""Accepted arguments that change the memory of a run, and which plans do not know."""
CHECKPOINTING: dict[str, Any] = {"every_n_layers": PositiveInt, "offload": bool}
"""What `gradient_checkpointing_kwargs` may have."""


@cache
def _table() -> dict[str, Any]:
    return json.loads(FILE.read_text("utf-8"))


@cache
def declared() -> dict[str, Any]:
    """Return all arguments of SFTConfig, with their types as the libraries declare them."""
    return {name: declared_types.python_type(kind) for name, kind in _table()["settings"].items()}


@cache
def accepted() -> dict[str, Any]:
    """Return the arguments that `training.sft_config` may have, with their types."""
    return {name: declared()[name] if kind is None else kind for name, kind in ACCEPTED.items()}


@cache
def _validator(name: str) -> TypeAdapter[Any]:
    return declared_types.validator(accepted()[name])


def refusal(name: str) -> str | None:
    """Return why a run does not take an argument; None if it does."""
    if name in ACCEPTED:
        return None
    if (key := OWN_KEYS.get(name)) is not None:
        return f"set {key} instead"
    if (why := NO_EFFECT.get(name)) is not None:
        return f"it would change nothing: {why}"
    if (why := DECIDED.get(name)) is not None:
        return f"not an argument of a run here: {why}"
    versions = declared_types.other_version({library: _table()[library] for library in ("trl", "transformers")})
    return f"TRL's SFTConfig has no such argument{did_you_mean(name, ACCEPTED)}{versions}"


def check(given: dict[str, Any]) -> Iterator[str]:
    """Yield a message for each argument that is not accepted, or whose value has another type or is out of range.

    Args:
        given: `training.sft_config`.
    """
    for name, value in given.items():
        where = f"training.sft_config.{name}"
        why = refusal(name)
        if why is None and value is None:
            continue
        if why := why or declared_types.misfit(_validator(name), value):
            yield f"{where}: {why}"
        elif name == "gradient_checkpointing_kwargs":
            yield from (f"{where}{problem}" for problem in _checkpointing(value))


def _checkpointing(given: dict[str, Any]) -> Iterator[str]:
    for name, value in given.items():
        if name not in CHECKPOINTING:
            yield (
                f".{name}: a run takes {' and '.join(CHECKPOINTING)} only, recomputes without re-entering autograd, "
                f"and all of a layer{did_you_mean(name, CHECKPOINTING)}"
            )
        elif why := declared_types.misfit(declared_types.validator(CHECKPOINTING[name]), value):
            yield f".{name}: {why}"
