"""Load the base model, attach the adapter, and build the trainer."""

import logging
import warnings
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import set_seed

from qlora_exp.config.schema import Config
from qlora_exp.environment.device import Resolved, places
from qlora_exp.models import adapters, base, lora_init
from qlora_exp.models.quantization import check_stored, stored
from qlora_exp.recipe.context import RunContext
from qlora_exp.recipe.tokens import Tokens
from qlora_exp.training import trainer
from qlora_exp.training.evaluation import isolates_packed_rows
from qlora_exp.utils.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainable:
    """Model that is ready to train."""

    trainer: trainer.Trainer
    """Trainer; its `model` is the base model with the adapter attached."""
    peft_config: Any
    """Config of the adapter; None for a full fine-tune."""
    base_parameters: int
    """Number of parameters of the base model, without the adapter."""
    same_start: bool
    """Whether the adapter has the same initial weights as in the process that started this run."""


def check(config: Config, resolved: Resolved) -> None:
    """Check on the model without weights that it can be quantized and adapted as the config says, before a run begins.

    Raises:
        ModelError: the model cannot be found, or would stay unquantized.
        ConfigError: the method does not apply to the model.
    """
    skeleton = base.skeleton(config.model)
    peft_config = adapters.peft_config(config, skeleton)
    if stored(skeleton).experts and getattr(peft_config, "lora_dropout", 0):
        _check_dropout(config, peft_config)
    base.check_quantization(config.model, config.quantization, resolved, skeleton)


def build(run: RunContext, tokens: Tokens) -> Trainable:
    """Load the base model, attach the adapter and build the trainer; the seed is set before any random number is drawn.

    Raises:
        ModelError: the base model cannot be loaded.
        ConfigError: the model cannot be trained as the config says.
    """
    config, resolved, name = run.config, run.resolved, run.config.model.model_name_or_path
    set_seed(config.seed)
    skeleton = base.skeleton(config.model)
    _check_lengths(run, tokens, base.learned_positions(skeleton))
    peft_config = adapters.peft_config(config, skeleton)
    experts = stored(skeleton).experts
    if why := base.check_quantization(config.model, config.quantization, resolved, skeleton):
        log.warning("%s", why)
    if peft_config is not None:
        run.tracker.json(peft_config.to_dict(), "peft_config.json")
        if targets := getattr(peft_config, "target_modules", None):
            run.tracker.params({"resolved.target_modules": targets if isinstance(targets, str) else sorted(targets)})
    with run.memory.phase("load"):
        model = base.load_model(config.model, config.quantization, resolved)
    if config.quantization.quantized:
        found = stored(model)
        run.log_metrics({"quantized_share": found.share})
        if not config.quantization.bitsandbytes and (
            why := check_stored(name, config.quantization, found, model.dtype)
        ):
            log.warning("%s", why)
    base.stop_at_end_of_turn(model, config.dataset, tokens.tokenizer)
    used = places(model)
    run.tracker.params({"resolved.places": ", ".join(used)})
    if len(used) > 1:
        log.info("model.device_map=%s spreads the model over %s", config.model.device_map, ", ".join(used))
    base_parameters = adapters.count_parameters(model)[1]
    adapted, same_start = _attach(run, tokens, model, peft_config)
    if experts and peft_config is not None:
        adapts = any(type(module).__name__ == "ParamWrapper" for module in adapted.modules())
        log.info(
            "the adapter %s the model's experts (%s weights)", "includes" if adapts else "leaves out", f"{experts:,}"
        )
    if config.training.packing and not isolates_packed_rows(adapted):
        raise ConfigError(
            f"training.packing: {config.model.model_name_or_path} does not keep packed rows apart, so the result "
            "would differ from training on single rows; use training.packing=false"
        )
    built = trainer.build(
        adapted, tokens.tokenizer, tokens.train, tokens.heldout, config, resolved, run.checkpoints, run.memory
    )
    trainable, total = adapters.count_parameters(adapted)
    run.log_metrics(
        {"trainable_parameters": trainable, "total_parameters": total, "trainable_share": trainable / total}
    )
    return Trainable(built, peft_config, base_parameters, same_start)


def _check_lengths(run: RunContext, tokens: Tokens, most: int | None) -> None:
    """Check that each row fits a model that has a table of positions.

    Raises:
        ConfigError: a row is longer.
    """
    if most is None:
        return
    prefix = run.config.peft_settings.get("num_virtual_tokens", 0)
    parts = [part for part in (tokens.train, tokens.heldout, tokens.unrelated) if part is not None]
    longest = min(max(max(map(len, part["input_ids"])) for part in parts), run.config.training.max_length)
    if longest + prefix > most:
        raise ConfigError(
            f"training.max_length={run.config.training.max_length}: the longest row has {longest} tokens"
            + (f" and the prefix {prefix}" if prefix else "")
            + f", but {run.config.model.model_name_or_path} has {most} positions: "
            f"use training.max_length={most - prefix}"
        )


def _check_dropout(config: Config, peft_config: Any) -> None:
    """Check on a model without weights that PEFT can adapt the experts: it cannot with dropout.

    Raises:
        ConfigError: it cannot.
    """
    plain = copy(peft_config)
    plain.init_lora_weights = True  # other starts need weights
    try:
        adapters.attach(base.skeleton(config.model), plain, None)
    except ConfigError as error:
        if "lora_dropout" not in str(error):
            raise
        raise ConfigError(
            f"method.lora_dropout={peft_config.lora_dropout}: PEFT cannot adapt the experts of "
            f"{config.model.model_name_or_path} with dropout: use method.lora_dropout=0, or leave the experts out "
            "with method.target_modules=attention"
        ) from error


def _attach(run: RunContext, tokens: Tokens, model: Any, peft_config: Any) -> tuple[Any, bool]:
    """Attach the adapter and initialize it as `init_lora_weights` says.

    Returns:
        The model with the adapter, and whether its initial weights are those of the process that started the run.
    """
    config, start = run.config, run.config.lora_start
    with run.memory.phase("initialize" if start else "load"):
        batches = lora_init.batches(
            tokens.train,
            config.lora_variant.init_rows if start in lora_init.FROM_ROWS else 0,
            1 if start == "corda" else config.training.per_device_train_batch_size,  # PEFT's CorDA accepts one row
            config.training.max_length,
            tokens.tokenizer.pad_token_id,
        )
        lora_init.prepare(start, model, peft_config, batches)
        with warnings.catch_warnings():
            # PEFT's own patterns for fused experts; it applies them, and then says of its layers alone that none fits.
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys .*(gate_up|down)_proj")
            adapted = adapters.attach(model, peft_config, run.resolved.adapter_dtype)
        lora_init.finish(start, adapted, batches, partial(base.load_unquantized, config.model))
        return adapted, lora_init.remember(start, adapted, run.first_adapter)
