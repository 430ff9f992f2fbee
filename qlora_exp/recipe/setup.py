"""Load the base model, attach the adapter, and build the trainer."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import set_seed

from qlora_exp.config.tables.peft_methods import FROM_ROWS
from qlora_exp.distributed import group
from qlora_exp.environment import turns
from qlora_exp.environment.device import places
from qlora_exp.libraries.transformers import attention_of
from qlora_exp.models import adapters, base, lora_init
from qlora_exp.models.layers import dropout, tiling
from qlora_exp.models.layers.experts import keep_from_ddp
from qlora_exp.models.quantization import check_stored, stored
from qlora_exp.models.sharing.copies import SharedBase
from qlora_exp.models.sharing.rows import Rows, by_turns
from qlora_exp.models.targets import summary
from qlora_exp.models.trained import described, freeze
from qlora_exp.recipe.context import RunContext
from qlora_exp.recipe.inputs import check_packing
from qlora_exp.recipe.saved import FirstAdapter, base_origin
from qlora_exp.recipe.tokens import Tokens
from qlora_exp.training import trainer
from qlora_exp.utils.errors import ConfigError

log = logging.getLogger(__name__)

_SUMMARY = {
    "adapted": (logging.INFO, "adapted layers: %s"),
    "left_out": (
        logging.WARNING,
        "method.target_modules=all-linear leaves out %s (LoRA's method.target_parameters adds some)",
    ),
    "bypassed": (
        logging.WARNING,
        "method.target_modules=all-linear leaves out %s: their block reads the weights without calling the layer, so "
        "that adapters there would be bypassed",
    ),
    "without_text": (logging.INFO, "not trained, as text does not pass through: %s"),
}


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


def build(run: RunContext, tokens: Tokens, first: FirstAdapter | None) -> Trainable:
    """Load the base model, attach the adapter and build the trainer; the seed is set before any random number is drawn.

    Args:
        run: the run in progress.
        tokens: its tokenized rows.
        first: adapter to train on from; None for a new one.

    Raises:
        ModelError: the base model cannot be loaded.
        ConfigError: the model cannot be trained as the config says.
    """
    config, resolved, name = run.config, run.resolved, run.config.model.model_name_or_path
    run.tracker.deliver_now()
    set_seed(config.seed)
    bare, peft_config = _checked(run)
    if peft_config is not None:
        run.tracker.json(peft_config.to_dict(), "peft_config.json")
        if targets := getattr(peft_config, "target_modules", None):
            run.tracker.params({"resolved.target_modules": targets if isinstance(targets, str) else sorted(targets)})
    if config.model.device_map and config.distributed.engine != "none":
        log.info(
            "model.device_map=%s has no effect with distributed=%s: each process has a device of its own",
            config.model.device_map,
            config.distributed.engine,
        )
    if (origin := base_origin(config)) is not None:
        log.info("the base model in %s is %s", name, origin)
        run.tracker.params({"resolved.base_origin": origin})
    with run.memory.phase("load"):
        model = base.load_model(config.model, config.quantization, resolved, config.distributed)
    if config.quantization.quantized:
        found = stored(model)
        run.log_metrics({"quantized_share": found.share})
        if not config.quantization.bitsandbytes and (
            why := check_stored(name, config.quantization, found, model.dtype)
        ):
            log.warning("%s", why)
    base.stop_at_end_of_turn(model, config.dataset, tokens.tokenizer)
    base_parameters = adapters.count_parameters(model)[1]
    adapted, same_start = _attach(run, tokens, model, peft_config, first)
    for what, layers in summary(adapted, bare, config.method.settings.get("target_modules")).items():
        run.tracker.params({f"resolved.{what}_layers": layers})
        log.log(_SUMMARY[what][0], _SUMMARY[what][1], layers)
    if config.training.packing or resolved.padding == "free":
        check_packing(adapted, config)
    total = adapters.count_parameters(adapted)[1]  # 4-bit weights cannot be counted in parts
    with run.memory.phase("load"):
        built = trainer.build(
            adapted,
            tokens.tokenizer,
            tokens.train,
            tokens.heldout,
            config,
            resolved,
            run.checkpoints,
            run.memory,
            tokens.heldout_sources,
        )
    if built.aux_loss_enabled:
        _log_router(run, built)
    if attention := attention_of(model):
        run.tracker.params({"resolved.attention": attention})
    if (group := turns.current()) is not None:
        _share(run, built, group)
    used = places(adapted)  # a sharded model has only now left the CPU
    run.tracker.params({"resolved.places": ", ".join(used)})
    if len(used) > 1:
        log.info("model.device_map=%s spreads the model over %s", config.model.device_map, ", ".join(used))
    trainable = adapters.count_parameters(adapted)[0]  # LoRA-FA's optimizer has frozen some
    run.log_metrics(
        {"trainable_parameters": trainable, "total_parameters": total, "trainable_share": trainable / total}
    )
    return Trainable(built, peft_config, base_parameters, same_start)


def _share(run: RunContext, built: trainer.Trainer, group: turns.Turns) -> None:
    """Let the rows of a job go through the base with those of others, if that was asked for and the base allows it."""
    base: SharedBase = group.keep("base")
    base.check()
    in_sequences = run.config.training.packing or run.resolved.padding == "free"
    why = by_turns(built.model, in_sequences) if group.rows_together else None
    if group.rows_together and why is None:
        recomputes = run.resolved.gradient_checkpointing
        built.together = group.keep("rows", lambda: Rows(group, base.copy(), recomputes))
    how = "by turns" if built.together is None else "rows in one pass"
    run.tracker.params({"resolved.fused": f"{group.at_once} jobs, {how}"})
    if built.together is not None and run.config.evaluation.generate_rows:
        why = "answers are generated by turns"
    log.info("trained with %d others on one base, %s%s", group.at_once - 1, how, f": {why}" if why else "")


def _checked(run: RunContext) -> tuple[Any, Any]:
    """Check that the model can be trained as configured, before its weights are loaded.

    Returns:
        The model without weights, and PEFT's config; None for full fine-tuning.
    """
    config = run.config
    bare = base.skeleton(config.model)
    peft_config = adapters.peft_config(config, bare)
    if run.resolved.tiled_mlp:
        tiling.check(bare)
    if why := base.check_quantization(config.model, config.quantization, run.resolved, bare):
        log.warning("%s", why)
    return bare, peft_config


def _log_router(run: RunContext, built: trainer.Trainer) -> None:
    """Log that the loss of the experts' router is trained too.

    Raises:
        ConfigError: its batches are not those that the rows come in.
    """
    if run.resolved.padding == "by_length":
        raise ConfigError(
            "training.padding=by_length: the loss of the experts' router depends on which rows make a batch; use "
            "training.padding=batch"
        )
    run.tracker.params({"resolved.router_aux_loss_coef": built.router_aux_loss_coef})
    log.info(
        "a mixture of experts: the router's loss times %g is trained too; it is logged apart (train/aux_loss)",
        built.router_aux_loss_coef,
    )


def _attach(
    run: RunContext, tokens: Tokens, model: Any, peft_config: Any, first: FirstAdapter | None = None
) -> tuple[Any, bool]:
    """Attach the adapter and initialize it as `init_lora_weights` says, or with the weights of the adapter `first`.

    Returns:
        The model with the adapter, and whether its initial weights are those of the process that started the run.
    """
    config, start = run.config, run.config.new_start
    with run.memory.phase("initialize" if start else "load"):
        batches = lora_init.batches(
            tokens.train,
            config.lora_variant.init_rows if start in FROM_ROWS else 0,
            1 if start == "corda" else config.training.per_device_train_batch_size,  # PEFT's CorDA accepts one row
            config.training.max_length,
            tokens.tokenizer.pad_token_id,
        )
        lora_init.prepare(start, model, peft_config, batches)
        for name, value in (first.ranks if first else {}).items():
            setattr(peft_config, name, value)
        adapted = adapters.attach(model, peft_config, run.resolved.adapter_dtype)
        if config.method.freezes:
            freeze(adapted, config.method)
            trained = described(adapted)
            log.info("trained are %s", trained)
            run.tracker.params({"resolved.trained": trained})
        if config.method.peft_type == "LORA":
            factors = [f"{factor:.6g}" for factor in adapters.scalings(adapted)]
            run.tracker.params({"resolved.lora_scaling": ", ".join(factors)})
        if first is not None:
            _log_first(run, tokens, first)
            adapters.load_weights(adapted, first.folder)
        lora_init.finish(start, adapted, batches, partial(base.load_unquantized, config.model))
        if config.distributed.engine == "ddp":
            keep_from_ddp(adapted)
        if run.resolved.device == "cpu":
            dropout.on_cpu(adapted)
        if config.distributed.shards and peft_config is not None:  # DDP does that by itself
            own = adapters.saved_parameters(adapted)
            group.take_from_main(parameter for name, parameter in adapted.named_parameters() if name in own)
        if run.resolved.tiled_mlp:
            tiling.tile(adapted)
        return adapted, group.call_on_main(lora_init.remember, start, adapted, run.first_adapter)


def _log_first(run: RunContext, tokens: Tokens, first: FirstAdapter) -> None:
    """Log which adapter the run trains on from, and what is otherwise than in the run that trained it."""
    where = f"run {first.run_id}" if first.run_id else str(first.folder)
    differences = [*first.differences(run.config, tokens.tokenizer)]
    log.info("training goes on from the adapter of %s (SHA-256 %s)", where, first.digest)
    for line in differences:
        log.warning("model.adapter=%s: %s", run.config.model.adapter, line)
    values = {"run": first.run_id, "sha256": first.digest, "differs": "; ".join(differences)}
    run.tracker.params({f"resolved.adapter_{name}": value for name, value in values.items() if value})
