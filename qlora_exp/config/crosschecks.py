"""Check that the sections of a config fit together. Must not import torch.

Single keys and sections are checked in `config.sections`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_exp.config import trainer_settings
from qlora_exp.config.schema import Config
from qlora_exp.config.tables import compatibility, optimizers, peft_methods
from qlora_exp.config.values import flatten

OUTPUT_LAYER = (
    "an adapter on the output layer would not learn, because training reads its weights directly: leave it out "
    "of method.target_modules; to train it as a whole: method.modules_to_save=[lm_head]"
)
"""Said of adapters on the output layer, which has another name than lm_head in some models."""


_LARGEST = 2**32 - 1
"""Largest integer of a config: the largest seed. Numbers of 64 bits and more make libraries fail in their own ways."""


def problems(config: Config) -> Iterator[str]:
    """Yield a message for each problem, with what to do about it."""
    for key, number in _integers(flatten(config)):
        if abs(number) > _LARGEST:
            bound = f"too large: at most {_LARGEST}" if number > 0 else f"too small: at least -{_LARGEST}"
            yield f"{key}={str(number)[:40]} is {bound}"
    lora = [*_lora(config)]
    yield from lora
    explained = lora and config.method.peft_type == "LORA"
    yield from _method_and_base(config, None if explained else config.refusal("trains"))
    targets = config.peft_settings.get("target_modules")
    named = [targets] if isinstance(targets, str) else targets or []
    if not compatibility.is_ignored() and any(f".{name}".endswith(".lm_head") for name in named):
        yield f"method.target_modules: {OUTPUT_LAYER}"
    if config.model.adapter:
        yield from _trained_on(config)
    if config.model.new_tokens:
        yield from _new_tokens(config)
    yield from _optimizer(config)
    yield from _trainer(config)
    yield from trainer_settings.problems(config)
    yield from _device(config)
    yield from _distributed(config)
    if config.distributed.shards:
        yield from _sharded(config)
    if not config.model.model_name_or_path.startswith("random:") and config.model.random_config:
        yield "model.random_config needs model.model_name_or_path=random:FAMILY"
    for section, data in config.sections_of_rows.items():
        if data.eval_split and data.paths and not data.has_splits:
            yield (
                f"{section}.eval_split={data.eval_split}: only datasets of the hub have splits; use "
                f"{section}.eval_path, "
                f"or {section}.eval_size to split rows off {data.path}"
            )
    yield from _chosen_by(config)
    if config.dataset.replay and not config.unrelated.paths:
        yield (
            f"dataset.replay={config.dataset.replay} takes rows of the unrelated text, and there is none: choose "
            "unrelated=python_docs or wikitext, or set unrelated.path"
        )
    if config.search.prune and config.training.eval_strategy == "no":
        yield "search.prune needs a held-out loss during training: set training.eval_strategy=steps"
    elif config.search.prune and 0 < config.training.max_steps <= (config.training.eval_steps or 0):
        yield "search.prune needs a held-out loss before the last step: set training.eval_steps < max_steps"


def _integers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the integers of a config, those in lists and mappings too, with their keys."""
    for key, value in values.items():
        if isinstance(value, int):
            yield key, value
        elif isinstance(value, Mapping):
            yield from _integers({f"{key}.{name}": part for name, part in value.items()})
        elif isinstance(value, list | tuple):
            yield from _integers({f"{key}[{place}]": part for place, part in enumerate(value)})


def _chosen_by(config: Config) -> Iterator[str]:
    """Check that runs measure the metrics of packages by which a search or a tuned comparison chooses."""
    evaluation = config.evaluation
    for key, metrics in (("search.metrics", config.search.metrics), ("tuning.metric", [config.tuning.metric])):
        for metric in metrics:
            if (match := re.fullmatch(r"(?:(before|after)/)?metric/(.*)", metric)) is None:
                continue
            moment, name = match.groups()
            if moment is None:
                yield f"{key}: {metric} is measured before and after training: use after/{metric}"
            if name not in evaluation.metrics:
                names = ",".join([*evaluation.metrics, name])
                yield f"{key}: {metric} is not measured: add evaluation.metrics=[{names}]"
            elif not evaluation.generate_rows:
                yield f"{key}: {metric} needs answers: set evaluation.generate_rows to more than 0"
            if moment == "before" and not evaluation.before:
                yield f"{key}: {metric} needs evaluation.before=true"


def _method_and_base(config: Config, why: str | None) -> Iterator[str]:
    """Check that the method can train the base.

    Args:
        why: what failed when it was tested; None if nothing did, or if another message already explains it.
    """
    method, quantization = config.method, config.quantization
    if method.quantized_base is True and not quantization.quantized:
        yield (
            f"method={method.name} needs a quantized base: choose quantization=nf4_double, nf4, fp4, fp4_double or "
            "int8, or method=lora for an unquantized one"
        )
    if quantization.quantized and (why or method.quantized_base is False):
        yield (
            f"method={method.name} cannot train a base stored as {quantization.name}{f' ({why})' if why else ''}: "
            "choose quantization=none, or method=qlora"
        )
    elif why:
        yield f"method={method.name} cannot train: {why}"


def _lora(config: Config) -> Iterator[str]:
    method, variant, optimizer = config.method, config.lora_variant, config.optimizer
    settings, start = config.peft_settings, config.lora_start
    if method.peft_type != "LORA":
        if variant != type(variant)():
            yield f"lora_variant={variant.name} needs a LoRA method, not method={method.name}"
        if optimizer.lora_optimizer:
            yield f"optimizer={optimizer.name} needs a LoRA method, not method={method.name}"
        return
    if twice := method.settings.keys() & variant.settings.keys():
        yield f"set in both method and lora_variant: {', '.join(sorted(twice))}"
    if config.quantization.quantized and (name := peft_methods.needs_unquantized_base(settings)):
        yield (
            f"{name}={settings[name]} needs the base's own weights, which a base stored as {config.quantization.name} "
            "does not have any more: choose quantization=none, or another lora_variant (loftq, eva, dora, rslora, lora)"
        )
    if start == "loftq" and (stored := config.quantization.quant_method) in ("gptq", "awq"):
        yield f"init_lora_weights=loftq needs the base's own weights, which {stored} files have lost"
    elif start == "loftq" and not config.quantization.quantized:
        yield "init_lora_weights=loftq makes up for a quantized base: choose quantization=nf4_double"
    if peft_methods.moves_base_weights(start):
        uneven = settings.get("rank_pattern") or settings.get("alpha_pattern")
        for name, setting in (
            ("use_dora=true", settings.get("use_dora")),
            ("modules_to_save", settings.get("modules_to_save")),
            ("trained biases", settings.get("bias", "none") != "none"),
            ("use_rslora with rank_pattern or alpha_pattern", settings.get("use_rslora") and uneven),
        ):
            if setting:
                yield f"init_lora_weights={start} is saved as its difference from the start, with no place for {name}"
    if settings.get("use_qalora") and config.quantization.quant_method != "gptq":
        yield "use_qalora: PEFT has QA-LoRA for GPTQ layers only: choose quantization=gptq and a model with GPTQ files"
    others = [name for name in ("use_dora", "kasa_config", "monteclora_config", "lora_bias") if settings.get(name)]
    if optimizer.lora_optimizer == "lorafa" and (others or start == "mica"):
        yield f"lora_optimizer=lorafa trains LoRA's B only, not {', '.join(others) or 'mica'}"


def _new_tokens(config: Config) -> Iterator[str]:
    """Check that the method can train the embeddings of new tokens."""
    method, settings = config.method, config.peft_settings
    if method.peft_type not in (None, "LORA"):
        yield f"model.new_tokens: method={method.name} cannot train their embeddings: use method=lora, qlora or full"
        return
    if settings.get("trainable_token_indices"):
        yield "model.new_tokens sets method.trainable_token_indices: leave that out"
    if config.quantization.quantized and not config.quantization.bitsandbytes:
        yield (
            f"model.new_tokens on a base stored as {config.quantization.name} were never tested: choose "
            "quantization=nf4_double, int8 or none"
        )
    if method.peft_type and config.distributed.shards:
        yield (
            f"model.new_tokens: distributed={config.distributed.engine} cannot shard an embedding of which single rows "
            f"are trained: use method=full, {_WHOLE_COPY}"
        )
    if config.lora_start == "eva":
        yield "model.new_tokens: PEFT's EVA does not run with trained rows of embeddings: choose another lora_variant"
    if peft_methods.moves_base_weights(config.lora_start):
        yield (
            f"model.new_tokens: init_lora_weights={config.lora_start} is saved as its difference from the start, with "
            "no place for their embeddings: choose another lora_variant"
        )


def _trained_on(config: Config) -> Iterator[str]:
    """Check that the run can train on from `model.adapter`."""
    name, adapter = config.method.name, config.model.adapter
    merge = f"merge it (`qlora-exp merge {adapter} --out FOLDER`) and use model.model_name_or_path=FOLDER"
    if config.method.peft_type is None:
        yield f"model.adapter={adapter}: method={name} trains the model's own weights, not an adapter: {merge}"
    elif why := peft_methods.cannot_train_on(config.method.peft_type, config.peft_settings):
        instead = merge if not config.refusal("merge") else "train a new adapter (model.adapter=null)"
        yield f"model.adapter={adapter}: method={name} cannot train on from an adapter ({why}): {instead}"
    if config.training.resume_from_checkpoint:
        yield (
            "model.adapter and training.resume_from_checkpoint both say where training begins: use "
            "model.adapter=null to go on from the checkpoint, or training.resume_from_checkpoint=null"
        )


def _optimizer(config: Config) -> Iterator[str]:
    optimizer, training, method = config.optimizer, config.training, config.method
    if optimizer.optim in optimizers.WHOLE and method.peft_type is not None:
        works = "projects gradients" if optimizer.optim in optimizers.PROJECTED else "has learning rates for rows"
        yield (
            f"optimizer={optimizer.name} {works} of whole weight matrices, and method={method.name} trains an adapter: "
            "use method=full, or optimizer=adamw_torch"
        )
    if method.kind == "LISA":
        yield from _lisa(config)
    if optimizer.optim not in optimizers.SCHEDULE_FREE:
        return
    if training.lr_scheduler_type != "constant":
        yield (
            f"optimizer={optimizer.name} takes the place of a schedule: use training.lr_scheduler_type=constant "
            "(training.warmup_steps stays; it is the optimizer's warmup)"
        )
    if optimizer.adam_beta1 == 0 and optimizer.optim != "schedule_free_sgd":
        yield f"optimizer={optimizer.name} averages by adam_beta1, which must be above 0"


def _lisa(config: Config) -> Iterator[str]:
    training, interval = config.training, config.method.lisa_interval_steps or 0
    if config.optimizer.optim not in _DROPS_STATES:
        yield (
            f"method=lisa drops the states of layers, which optimizer={config.optimizer.name} does not allow for: use "
            f"optimizer={', '.join(_DROPS_STATES)}"
        )
    if training.torch_compile:
        yield "method=lisa with training.torch_compile was never tested: use training.torch_compile=false"
    if 0 < training.max_steps <= interval:
        yield (
            f"method.lisa_interval_steps={interval} draws layers once in training.max_steps={training.max_steps}, so "
            "that the others never learn: use a smaller number, or method=freeze"
        )


def _trainer(config: Config) -> Iterator[str]:
    training = config.training
    requested = {
        "gradient_checkpointing": training.gradient_checkpointing is True,
        "packing": training.packing,
        "load_best_model_at_end": training.load_best_model_at_end,
        "resume": training.resume_from_checkpoint is not None,
    }
    is_chat = config.dataset.format in ("chat", "auto")
    if training.assistant_only_loss and not (is_chat and training.completion_only_loss):
        yield "training.assistant_only_loss needs dataset.format=chat and training.completion_only_loss=true"
    if training.padding == "free" and (why := config.refusal("packing")):
        yield f"method={config.method.name} does not work with rows in one sequence ({why}): use training.padding=batch"
    if training.padding in ("by_length", "free") and training.neftune_noise_alpha:
        yield (
            f"training.padding={training.padding}: NEFTune's noise depends on the longest row of a batch, so that more "
            "than rounding would change: use training.padding=batch"
        )
    if training.padding == "by_length" and config.depends_on_batch:
        yield (
            f"training.padding=by_length: method={config.method.name} depends on which rows make a batch: use "
            "training.padding=batch"
        )
    for aspect, wanted in requested.items():
        if wanted and (why := config.refusal(aspect)):
            key = "resume_from_checkpoint=null" if aspect == "resume" else f"{aspect}=false"
            yield f"method={config.method.name} does not work with {aspect} ({why}): use training.{key}"


def _distributed(config: Config) -> Iterator[str]:
    engine = config.distributed.engine
    if engine != "none" and config.model.device_map not in (None, "auto"):
        yield (
            f"model.device_map places one model on several devices, and distributed={engine} puts one on each: use "
            "model.device_map=null, or distributed=none"
        )
    if engine != "none" and config.device == "mps":
        yield f"distributed={engine} needs GPUs of NVIDIA, or device=cpu; this machine's mps is a single device"
    if config.distributed.cpu_offload and config.device == "cpu":
        yield "distributed.cpu_offload=true needs GPUs, not device=cpu: use false"
    if engine != "none" and config.method.kind == "LISA":
        yield (
            f"distributed={engine} cannot train method={config.method.name} (the processes do not follow a change of "
            "trained layers): choose another method, or distributed=none"
        )
        return
    if engine == "none" or compatibility.is_ignored():
        return
    if engine == "ddp" and config.quantization.quant_method == "torchao":
        yield (
            f"distributed=ddp cannot send a base stored as {config.quantization.name} to the other processes, because "
            "torchao's tensors cannot be flattened: choose quantization=int8, nf4_double or none, or distributed=none"
        )
    shards = config.distributed.shards  # deepspeed_zero3 refuses what fsdp does
    if shards and (problems := [*_adapter_in_parts(config)]):
        yield from problems
    elif why := config.refusal("fsdp" if shards else engine):
        why = _NOT_SHARDED.get(config.method.peft_type or "", why) if shards else why
        instead = _WHOLE_COPY if shards and not config.refusal("ddp") else "or distributed=none"
        yield f"distributed={engine} cannot train {_described(config)} ({why}): choose another method, {instead}"


def _device(config: Config) -> Iterator[str]:
    optim = config.optimizer.optim
    compiled = optim in optimizers.COMPILED
    if config.device == "mps" and compiled:
        yield f"optimizer={config.optimizer.name} was never tested on mps: choose another, or device=cpu"
    elif config.device == "mps" and (config.quantization.bitsandbytes or "bnb" in optim or "8bit" in optim):
        yield (
            "bitsandbytes (quantized bases, 8-bit optimizers) does not run on mps: choose another quantization and "
            "optimizer, or device=cpu"
        )
    if config.device == "cpu" and config.training.fp16 is True:
        yield "training.fp16 needs a GPU: use training.fp16=auto, or training.bf16=true"
    products = config.quantization.bnb_4bit_compute_dtype if config.quantization.load_in_4bit else "auto"
    for key, value in (("model.dtype", config.model.dtype), ("quantization.bnb_4bit_compute_dtype", products)):
        for precision, other in (("fp16", "bfloat16"), ("bf16", "float16")):
            if getattr(config.training, precision) is True and value == other:
                yield (
                    f"training.{precision} and {key}={value} do not go together, each rounds what the other keeps: set "
                    f"{key}=auto, which follows, or the same precision for both"
                )


def _sharded(config: Config) -> Iterator[str]:
    """Check what an engine cannot shard, or would train otherwise than one process does."""
    engine, instead = f"distributed={config.distributed.engine}", _WHOLE_COPY
    method, quantization, optimizer, training = config.method, config.quantization, config.optimizer, config.training
    if quantization.quantized and not quantization.load_in_4bit:
        yield (
            f"{engine} cannot shard a base stored as {quantization.name}: choose quantization=nf4_double or "
            f"none{'' if quantization.quant_method == 'torchao' else f', {instead}'}"
        )
    if optimizer.optim not in _SHARDED_OPTIMIZERS:
        yield (
            f"{engine}: the states of optimizer.optim={optimizer.optim} cannot be sharded as the parameters "
            f"are: use optimizer=adamw_torch, {instead}"
        )
    if optimizer.lora_optimizer in ("lorafa", "riemannian"):
        yield (
            f"{engine}: optimizer={optimizer.name} computes with whole matrices, of which each process has a "
            f"part: use optimizer=adamw_torch or loraplus, {instead}"
        )
    key = "model.dtype" if method.peft_type is None else "method.adapter_dtype"
    trained = config.model.dtype if method.peft_type is None else method.adapter_dtype
    if config.distributed.engine == "deepspeed_zero3" and trained in ("bfloat16", "float16"):
        yield f"{engine} trains float32 copies of parameters in {trained}: use {key}=float32, or distributed=fsdp"
    if training.torch_compile:
        yield f"{engine} with training.torch_compile was never tested: use training.torch_compile=false"
    if training.fp16 is True:
        yield f"{engine} has no loss scaling for training.fp16: use training.bf16=true"


def _adapter_in_parts(config: Config) -> Iterator[str]:
    """Check settings of LoRA that need whole weights; any variant may have them."""
    engine = f"distributed={config.distributed.engine}"
    if peft_methods.moves_base_weights(config.lora_start):
        yield (
            f"{engine} cannot save init_lora_weights={config.lora_start}, whose difference from the start "
            f"needs whole weights: choose another lora_variant, {_WHOLE_COPY}"
        )
    for name in ("kasa_config", "monteclora_config"):
        if config.peft_settings.get(name):
            yield (
                f"{engine} cannot train with {name}, whose own loss needs whole weights: choose another "
                f"lora_variant, {_WHOLE_COPY}"
            )


def _described(config: Config) -> str:
    variant = "" if config.lora_variant.name == "lora" else f" lora_variant={config.lora_variant.name}"
    return f"method={config.method.name}{variant}"


_WHOLE_COPY = "or distributed=ddp, where each process has a whole copy"
_NOT_SHARDED = {
    "ADALORA": "it computes with all matrices outside of a layer's forward pass",
    "OSF": "its changes of gradients get lost",
    **dict.fromkeys(
        ("CARTRIDGE", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"), "its prompt is read outside of a forward pass"
    ),
    **dict.fromkeys(("TINYLORA", "UNILORA", "VBLORA"), "it shares parameters between layers"),
}
"""Why FSDP cannot train PEFT types that failed when they were tested, in clearer words than the libraries'."""
_DROPS_STATES = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit")
"""Optimizers that make new states for a parameter that has none; tested with LISA."""
_SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "sgd", "rmsprop")
"""Optimizers with states like the parameters, made in the first step. paged_adamw_32bit runs as adamw_torch."""
