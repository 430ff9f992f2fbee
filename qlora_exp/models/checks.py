"""Check that a model, its tokenizer and an adapter fit together, before weights are loaded and a run is begun.

The model's modules are built on the meta device, without values; the adapter is attached to them, and one batch without
values goes through. So what PEFT cannot adapt is refused by name, in architectures that nobody tested too.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftType
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from transformers import PreTrainedModel

from qlora_exp.config import crosschecks
from qlora_exp.config.schema import Config
from qlora_exp.config.tables import compatibility
from qlora_exp.config.tables.peft_methods import FROM_ROWS
from qlora_exp.data.columns import lengths, lists
from qlora_exp.environment.device import Resolved
from qlora_exp.models import files
from qlora_exp.models.adapters import attach, lacks_values, peft_config, trainable_set
from qlora_exp.models.base import Tokenizer, check_quantization, learned_positions, load_tokenizer, skeleton
from qlora_exp.models.layers.experts import check_use
from qlora_exp.models.targets import (
    adapted_names,
    count_kinds,
    is_within,
    misunderstood,
    parts_without_text,
    unquantizable_layers,
)
from qlora_exp.models.trained import check_tables, check_trained, recompute_first
from qlora_exp.utils.errors import ConfigError, DataError, ModelError, first_line

log = logging.getLogger(__name__)


def check_model(config: Config, resolved: Resolved, tokenize: Callable[[Tokenizer], dict[str, Dataset]]) -> None:
    """Check the model's tokenizer, positions and quantization, and the adapter of the run.

    Args:
        config: the run's config.
        resolved: dtypes of the run.
        tokenize: function that returns the tokenized parts of the data (`input_ids`) by name. It is called only if the
            tokenizer has more tokens than the model, or the model has a table of positions.

    Raises:
        ModelError: the model or its tokenizer cannot be loaded or used, or most of the model would stay unquantized.
        DataError: a row has a token for which the model has no embedding.
        ConfigError: a row is longer than the model's table of positions, or the adapter does not fit the model.
    """
    tokenizer, model = load_tokenizer(config.model), skeleton(config.model)
    # `files.check` has seen local files; those of the hub are here only now.
    name, stored = config.model.model_name_or_path, getattr(model.config, "quantization_config", None)
    files.check_files(name, config.quantization, stored)
    coefficient, described = config.training.sft_config.get("router_aux_loss_coef"), model.config.get_text_config()
    if coefficient is not None and not hasattr(described, "output_router_logits"):
        raise ConfigError(
            f"training.sft_config.router_aux_loss_coef: {name} is no mixture of experts that has a router's loss"
        )
    _check_tokens(name, tokenizer, _embeddings(model), tokenize)
    if (positions := learned_positions(model)) is not None:
        _check_lengths(config, positions, tokenize(tokenizer))
    if config.quantization.quantized and (read := unquantizable_layers(model)):
        raise ConfigError(
            f"quantization={config.quantization.name}: the blocks of {name} read the weights of "
            f"{', '.join(count_kinds(read))} without calling these layers, so that the weights cannot be stored in few "
            "bits: use quantization=none with method=lora"
        )
    if config.quantization.bitsandbytes:
        quantized = skeleton(config.model)
        check_quantization(config.model, config.quantization, resolved, quantized)
        check_use(quantized, config.distributed, config.training.torch_compile)
    if not compatibility.is_ignored():
        check_adapter(config, model)


def _check_tokens(
    name: str, tokenizer: Tokenizer, embeddings: int, tokenize: Callable[[Tokenizer], dict[str, Dataset]]
) -> None:
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"{name}: its tokenizer ({type(tokenizer).__name__}) is not one of the tokenizers library, which is needed "
            "here; save it as a fast tokenizer (tokenizer.json), or choose another model"
        )
    if max([tokenizer.vocab_size - 1, *tokenizer.added_tokens_decoder]) < embeddings:
        return
    remedy = (
        f"the model has {embeddings} embeddings (0 to {embeddings - 1}), fewer than its tokenizer has tokens: enlarge "
        "them (`resize_token_embeddings` in transformers) and save the model, or use the tokenizer that belongs to it"
    )
    for role in ("eos", "pad", "bos"):
        if (token := getattr(tokenizer, f"{role}_token_id")) is not None and token >= embeddings:
            raise ModelError(
                f"{name}: its {role} token {tokenizer.convert_ids_to_tokens(token)!r} is {token}; {remedy}"
            )
    for part, rows in tokenize(tokenizer).items():
        first = 0
        for (ids,) in lists(rows, "input_ids"):
            if (unknown := ids.rows()[ids.values >= embeddings]).size:
                place = unknown[0]
                token = int(ids.values[ids.rows() == place].max())
                text = tokenizer.convert_ids_to_tokens(token)
                raise DataError(f"{part} row {first + place} has the token {text!r} ({token}) of {name}; {remedy}")
            first += len(ids.ends)


def _check_lengths(config: Config, positions: int, parts: dict[str, Dataset]) -> None:
    prefix = config.peft_settings.get("num_virtual_tokens", 0)
    longest = max((int(lengths(rows).max(initial=0)) for rows in parts.values()), default=0)
    longest = min(longest, config.training.max_length)
    if longest + prefix > positions:
        raise ConfigError(
            f"training.max_length={config.training.max_length}: the longest row has {longest} tokens"
            + (f" and the prefix {prefix}" if prefix else "")
            + f", but {config.model.model_name_or_path} has {positions} positions: "
            f"use training.max_length={positions - prefix}"
        )


def check_adapter(config: Config, model: PreTrainedModel) -> None:
    """Check that the method can adapt the model.

    Args:
        config: the run's config.
        model: the base model on the meta device; it is changed.

    Raises:
        ConfigError: it cannot; the message says why and what to do.
    """
    settings = peft_config(config, model)
    check_trained(model, config.method, config.optimizer)
    if config.training.recomputed_layers:
        recompute_first(model, config.training.recomputed_layers)
    if config.model.new_tokens and config.method.freezes:
        check_tables(model)
    if settings is None or config.quantization.quant_method in ("gptq", "awq"):
        return  # the layers of these quantizers are built by their own packages only
    modules, apart = [name for name, _ in model.named_modules()], parts_without_text(model)
    if too_large := [token for token in _chosen_tokens(settings) if not 0 <= token < _embeddings(model)]:
        raise ConfigError(
            f"{config.cannot_train}: it has no tokens {', '.join(map(str, too_large))}; they go from 0 to "
            f"{_embeddings(model) - 1} (method.token_indices, method.trainable_token_indices)"
        )
    trial: Any = copy.deepcopy(settings)
    if config.lora_start in FROM_ROWS:
        trial.init_lora_weights = True  # there are no rows here
    with torch.device("meta"):
        try:
            adapted = attach(model, trial, None)
        except ConfigError as error:
            raise ConfigError(f"{config.cannot_train}: {error}") from error
        except RuntimeError as error:
            if lacks_values(error):
                return  # this method starts from values of the weights
            raise
    for problem in _problems(adapted, settings, modules, apart):
        raise ConfigError(f"{config.cannot_train}: {problem}")
    _report_ends_trained_apart(adapted, settings)
    _report_biases(adapted, settings)
    failure = _try(adapted)
    if failure is not None and not lacks_values(failure) and _try(skeleton(config.model)) is None:
        raise ConfigError(f"{config.cannot_train}: {first_line(failure)}") from failure


def _report_ends_trained_apart(adapted: Any, settings: PeftConfig) -> None:
    """Say that a model whose embedding and output layer are one matrix will have two."""
    base = adapted.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    trained = any(isinstance(end, BaseTunerLayer | ModulesToSaveWrapper) for end in ends)
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    if trained and tied and getattr(settings, "ensure_weight_tying", None) is not True:
        remedy = "; method.ensure_weight_tying=true trains one for both" if settings.peft_type == PeftType.LORA else ""
        log.warning(
            "embedding and output layer are trained apart, though they are one matrix in this model "
            "(tie_word_embeddings): exported models have both, and are larger%s",
            remedy,
        )


def _report_biases(adapted: Any, settings: Any) -> None:
    """Say that an adapter with biases cannot be merged into layers without."""
    if not getattr(settings, "lora_bias", False):
        return
    layers: Any = (module for module in adapted.modules() if isinstance(module, BaseTunerLayer))
    if any(getattr(layer.get_base_layer(), "bias", None) is None for layer in layers):
        log.warning(
            "method.lora_bias: adapted layers of this model have no bias that the adapter's could be added to, so that "
            "it works in PEFT only (generate, chat), and cannot be merged, exported or served; leave method.lora_bias "
            "out for that"
        )


def _embeddings(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return len(embedding.weight)


def _chosen_tokens(settings: Any) -> list[int]:
    """Return the tokens whose embeddings are trained; PEFT also takes lists by the name of an embedding."""
    chosen = getattr(settings, "trainable_token_indices", None) or getattr(settings, "token_indices", None) or []
    return [token for tokens in chosen.values() for token in tokens] if isinstance(chosen, dict) else chosen


def _try(model: Any) -> Exception | None:
    """Run a batch without values through the model; return the error, if there is one."""
    ids = torch.zeros(2, 4, dtype=torch.long, device="meta")  # no attention mask: its values would be read
    try:
        model(input_ids=ids, labels=ids)
    except Exception as error:  # the caller checks whether the base has it too
        return error
    return None


def _problems(adapted: Any, settings: PeftConfig, modules: list[str], apart: list[str]) -> Iterator[str]:
    """Yield what is wrong with an adapter that PEFT attached.

    Args:
        adapted: the base model with the adapter.
        settings: PEFT's config, as the user gave it.
        modules: the names of the base model's modules.
        apart: the names of its parts that text does not pass through.
    """
    if not (trained := trainable_set(adapted)):
        yield "it adapts none of its layers, which are of a type that the method does not support"
    yield from misunderstood(settings, modules, adapted_names(adapted))
    head = adapted.get_base_model().get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and getattr(head.original_module, "bias", None) is not None:
        yield "its output layer has biases, which PEFT leaves out where it trains single rows: train no single tokens"
    elif isinstance(head, TrainableTokensLayer):
        yield (
            "its output layer shares the embedding's weights (tie_word_embeddings), and training reads them directly, "
            "without the trained tokens: train no single tokens, or use a model whose weights are not tied"
        )
    elif isinstance(head, BaseTunerLayer):
        yield crosschecks.OUTPUT_LAYER
    prefix = "base_model.model."
    if useless := sorted({name for name in trained if is_within(name.removeprefix(prefix), apart)}):
        yield (
            f"text does not pass through {', '.join(apart)}, so {len(useless)} trained tensors there "
            f"({useless[0].removeprefix(prefix)}, ...) would not learn: name other layers in method.target_modules and "
            "method.modules_to_save"
        )
