"""Find keys that change nothing in a run, so that a key that the user sets for nothing is refused.

What option files set is not checked: they may set more than a run needs. Values that contradict each other are checked
in the sections and in `crosschecks`. Must not import torch.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.dataset import REASONING_GYM, DatasetConfig, UnrelatedConfig, looks_local
from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.config.tables import optimizers, peft_methods

log = logging.getLogger(__name__)

ALWAYS = {
    "unrelated.drop_leaks": "unrelated text is not trained on",
    "unrelated.leak_threshold": "unrelated text is not trained on",
    "unrelated.validation_size": "unrelated text is not trained on",
    "unrelated.evaluate_on": "unrelated text is not trained on",
}
"""Keys that a section inherits, and that change nothing in any run."""
SINGLE_RUN = "it is for sweeps, and this is a single run: add -m"
SWEEP_ONLY = ("sweep", "search", "tuning")
"""Sections that act in a sweep only."""
_OF_ANSWERS = tuple(f"evaluation.{key}" for key in ("max_new_tokens", "generation_batch_size", "metrics"))
_ADAM = ("adam_beta1", "adam_beta2")


def problems(configs: Sequence[Config], words: Sequence[str], sweeping: bool = False) -> Iterator[str]:
    """Yield a message for each key that the user set to another value than its default, and that changes nothing.

    Keys of generated answers are only logged: `evaluation.generate_rows=0` is the usual way to shorten any run.

    Args:
        configs: the config of the run, or those of all jobs of a sweep: a key may act in one of them only.
        words: the user's overrides, such as `training.packing=true`.
        sweeping: whether they are the overrides of a sweep.
    """
    keys = dict.fromkeys(word.partition("=")[0].lstrip("+") for word in words if not word.startswith("~"))
    reasons = [dict(idle(config, sweeping)) for config in configs]
    for key in keys:
        parts = key.split(".")
        names = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        why = [next((reason for name, reason in idle_keys.items() if name in names), "") for idle_keys in reasons]
        values = [value for config in configs if (value := _set_to(config, key)) is not None]
        if all(why) and values:
            if key in _OF_ANSWERS:
                log.warning("%s=%s changes nothing: %s", key, values[0], why[0])
            else:
                yield f"{key}={values[0]} would change nothing: {why[0]}"


def _set_to(config: Config, key: str) -> str | None:
    """Return the value of a key as text; None if it is the default or null, which asks for nothing."""
    node: Any = config
    default: Any = None
    for name in key.split("."):
        if isinstance(node, BaseModel):
            field = type(node).model_fields.get(name)
            default = field.default if field else None
            node = getattr(node, name, None)
        elif isinstance(node, dict):
            node, default = node.get(name), None
    if node in (default, None):
        return None
    return str(node).lower() if isinstance(node, bool) else str(node)


def idle(config: Config, sweeping: bool = False) -> Iterator[tuple[str, str]]:
    """Yield each key that changes nothing in a run of this config, whatever its value, with the reason."""
    yield from ALWAYS.items()
    yield from _model(config)
    yield from _adapter(config)
    yield from _storage_and_optimizer(config)
    yield from _dataset(config)
    if config.unrelated.path == "none":
        others = (key for key in UnrelatedConfig.model_fields if key != "path")
        yield from ((f"unrelated.{key}", "unrelated.path=none measures no forgetting") for key in others)
    else:
        yield from _rows("unrelated", config.unrelated, config.dataset.replay is not None)
    yield from _training(config)
    yield from _measuring(config)
    yield from _distributed(config)
    if not sweeping:
        sections = ((name, type(getattr(config, name)).model_fields) for name in SWEEP_ONLY)
        keys = (f"{name}.{key}" for name, fields in sections for key in fields)
        yield from ((key, SINGLE_RUN) for key in keys if key != "sweep.dry_run")
    if config.sweep.unfit == "run" and config.sweep.fuse != "auto":
        yield "sweep.vram", "sweep.unfit=run asks no job whether it fits: set sweep.unfit=skip or refuse"
    if not config.search.prune:
        yield "search.pruner", "no trial is stopped early: set search.prune=true"
    if config.sweep.fuse == "off":
        yield "sweep.fused_rows", "jobs are not trained together: set sweep.fuse=auto"


def _model(config: Config) -> Iterator[tuple[str, str]]:
    model = config.model
    if not model.from_hub:
        yield "model.revision", "only models of the hub have revisions"
    if model.model_name_or_path.startswith(("embedded:", "random:")):
        yield "model.trust_remote_code", "a built-in model comes without code"
    if (described := model.architecture.get("_name_or_path", model.model_name_or_path)) != model.model_name_or_path:
        yield "model.architecture", f"it describes {described}, not model.model_name_or_path={model.model_name_or_path}"


def _adapter(config: Config) -> Iterator[tuple[str, str]]:
    method, start = config.method, config.lora_start
    if config.model.adapter:
        yield "lora_variant.init_rows", "model.adapter is initialized already"
    if method.peft_type is None:
        yield "method.adapter_dtype", "full fine-tuning has no adapter: set model.dtype"
        return
    for section in ("method", "lora_variant"):
        for name, why in peft_methods.idle(method.peft_type, config.peft_settings):
            yield f"{section}.{name}", why
    if start not in peft_methods.FROM_ROWS:
        yield "lora_variant.init_rows", f"init_lora_weights is none of {', '.join(peft_methods.FROM_ROWS)}"


def _storage_and_optimizer(config: Config) -> Iterator[tuple[str, str]]:
    quantization, optimizer = config.quantization, config.optimizer
    if not quantization.load_in_4bit:
        for key in ("quant_type", "use_double_quant", "compute_dtype", "experts"):
            yield f"quantization.bnb_4bit_{key}", "bitsandbytes does not store this base in 4 bits"
    if not quantization.load_in_8bit:
        yield "quantization.llm_int8_threshold", "bitsandbytes does not store this base in 8 bits"
    if "adam" not in optimizer.optim and optimizer.optim != "muon":
        unused = ("adam_epsilon",) if "lion" in optimizer.optim else (*_ADAM, "adam_epsilon")
        yield from ((f"optimizer.{key}", f"optim={optimizer.optim} does not use it") for key in unused)
    if optimizer.optim not in optimizers.PROJECTED:
        yield "optimizer.optim_target_modules", f"optim={optimizer.optim} works on all trained parameters"
    for lora_optimizer, key in (("loraplus", "loraplus_lr_ratio"), ("riemannian", "riemannian_reg")):
        if optimizer.lora_optimizer != lora_optimizer:
            yield f"optimizer.{key}", f"it is for optimizer={lora_optimizer}"


def _dataset(config: Config) -> Iterator[tuple[str, str]]:
    """Yield idle keys of the section, and of its sources. A key of the section is idle if it acts in no source."""
    data = config.dataset
    if data.weights is None and data.mixing_temperature is None:
        yield "dataset.stopping", "every row is trained on once in an epoch: give sources weights or a temperature"
    if not data.sources:
        yield "dataset.mixing_temperature", "there are no dataset.sources to mix"
        yield from _rows("dataset", data)
        return
    of_parts = {name: dict(_rows("dataset", part)) for name, part in data.parts.items()}
    for name, idle_keys in of_parts.items():
        yield from ((key.replace("dataset", f"dataset.sources.{name}", 1), why) for key, why in idle_keys.items())
    yield from ((f"dataset.{key}", "no source takes it from the section") for key in sorted(data.not_taken))
    first, *others = of_parts.values()
    yield from ((key, why) for key, why in first.items() if all(key in idle_keys for idle_keys in others))


def _rows(section: str, data: DatasetConfig, replayed: bool = False) -> Iterator[tuple[str, str]]:
    if not data.hub_paths:
        for key in ("subset", "revision", *(() if data.has_splits else ("split",))):
            yield f"{section}.{key}", f"it is for datasets of the hub, not {data.path}, which is read as a whole"
    if not any(path in data.hub_paths or looks_local(path) for path in data.paths):
        yield f"{section}.streaming", f"it is for files and datasets of the hub, not {data.path}"
    if not any(path.startswith(REASONING_GYM) for path in data.paths):
        for key in ("reasoning_gym_size", "reasoning_gym_config"):
            yield f"{section}.{key}", f"{section}.path={data.path} is no reasoning_gym:TASK"
    if (data.eval_path or data.eval_split) and not data.streaming:
        source = "eval_path" if data.eval_path else "eval_split"
        yield f"{section}.eval_size", f"{section}.{source} has the held-out rows: use {section}.max_eval_rows"
    columns = ("prompt_column", "input_column", "completion_column")
    if data.prompt_template:
        yield from ((f"{section}.{key}", "prompt_template names the columns") for key in columns[:2])
    if data.format == "text" or data.messages_column:
        why = f"{section}.format=text reads text_column" if data.format == "text" else "messages_column has it all"
        yield from ((f"{section}.{key}", why) for key in columns)
    if data.format not in ("text", "auto"):
        yield f"{section}.text_column", f"it is for format=text, not format={data.format}"
    if isinstance(data, UnrelatedConfig) and not data.streaming and not replayed:
        yield f"{section}.max_train_rows", "unrelated text is not trained on: use unrelated.max_eval_rows"


def _training(config: Config) -> Iterator[tuple[str, str]]:
    training = config.training
    if training.max_steps > 0:
        yield (
            "training.num_train_epochs",
            f"training.max_steps={training.max_steps} overrides it: set training.max_steps=-1",
        )
    if (optim := config.optimizer.optim) == "schedule_free_radam":
        yield "training.warmup_steps", f"optim={optim} needs no warmup"
    elif training.lr_scheduler_type == "constant" and optim not in optimizers.SCHEDULE_FREE:
        yield "training.warmup_steps", "lr_scheduler_type=constant has no warmup: use constant_with_warmup"
    together, batches = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if training.packing:
        yield "training.padding", "sequences of packed rows (training.packing=true) are not padded"
    elif training.tune is None and together == 1:
        yield "training.padding", "batches of one row (training.per_device_train_batch_size=1) are not padded"
    elif training.padding == "by_length" and training.tune is None and batches == 1:
        yield "training.padding", "a step is one batch (training.gradient_accumulation_steps=1)"
    if training.gradient_checkpointing is not True:
        yield "training.recomputed_layers", "it needs training.gradient_checkpointing=true"
    if not training.packing:
        yield "training.packing_strategy", "it needs training.packing=true"
    if training.eval_strategy != "steps":
        yield "training.eval_steps", f"it needs training.eval_strategy=steps, not {training.eval_strategy}"
    if training.save_strategy != "steps":
        yield "training.save_steps", f"it needs training.save_strategy=steps, not {training.save_strategy}"
    if training.save_strategy == "no":
        yield "training.save_total_limit", "training.save_strategy=no saves no checkpoint"
    if training.early_stopping_patience is None:
        yield "training.early_stopping_threshold", "it needs training.early_stopping_patience"


def _distributed(config: Config) -> Iterator[tuple[str, str]]:
    if config.distributed.engine == "none":
        for key in DistributedConfig.model_fields.keys() - {"engine"}:
            yield (
                f"distributed.{key}",
                "distributed=none is a single process: choose distributed=ddp, fsdp or deepspeed_zero3",
            )
        return
    if config.distributed.num_machines == 1:
        yield "distributed.main_process_ip", "all processes are on this machine"
    if not config.distributed.shards:
        yield "distributed.cpu_offload", "only distributed=fsdp and deepspeed_zero3 can offload"


def _measuring(config: Config) -> Iterator[tuple[str, str]]:
    evaluation = config.evaluation
    if not evaluation.generate_rows:
        yield from ((key, "evaluation.generate_rows=0 generates no answers") for key in _OF_ANSWERS)
    if not evaluation.lm_eval_tasks:
        for key in ("include_path", "num_fewshot", "limit"):
            yield f"evaluation.lm_eval_{key}", "it needs evaluation.lm_eval_tasks"
    if config.method.peft_type is not None:
        yield "tracking.log_full_model", f"method={config.method.name} trains an adapter: use tracking.log_adapter"
