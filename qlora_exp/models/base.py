"""Load the base model, quantized as configured, and its tokenizer: from the hub, a folder or a package, or random.

Does not depend on adapters or training.
"""

import errno
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.config.sections.quantization import QuantizationConfig
from qlora_exp.data.end_of_turn import end_of_turn
from qlora_exp.data.prompts import chat_template
from qlora_exp.environment import turns
from qlora_exp.environment.device import Resolved
from qlora_exp.libraries.transformers import quantized_on, with_bitsandbytes_layers
from qlora_exp.models import builtin, untrusted
from qlora_exp.models.files import check_files, hub_error, locate
from qlora_exp.models.layers.experts import pack_meta, packing
from qlora_exp.models.new_tokens import Parts, add_rows, add_tokens
from qlora_exp.models.quantization import check_stored, guard_layers, quantization_config, stored
from qlora_exp.models.sharing.copies import SharedBase
from qlora_exp.utils.errors import ModelError, first_line

Tokenizer = PreTrainedTokenizerBase
ALONE = DistributedConfig()
"""One process, with one device or several."""
_MOST_VALUES = 10**14
"""Most parameters of a model whose files are not on this machine."""
_POSITIONS = re.compile(r"(^|\.)wpe(\.|$)|pos(ition)?s?_|_pos(ition)?s?(\.|$)")
"""Names of position tables: wpe (GPT-2), embed_positions (OPT, GPT-J), position_embeddings, positions_embed."""


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """Load the tokenizer, with a pad token and with padding on the right.

    Raises:
        ModelError: the tokenizer cannot be found, fetched or read, or has no EOS token.
        ConfigError: one of `model.new_tokens` is a token already.
    """
    tokenizer, _ = _with_new_tokens(config)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        # The unknown token if there is one. EOS is safe too: padding is masked by position here, never by value.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{config.model_name_or_path}: its tokenizer has no EOS token, so the model could not learn to stop; "
            "choose another model"
        )
    return tokenizer


def new_tokens(config: ModelConfig) -> Parts:
    """Return the numbers of `model.new_tokens`, each with the tokens that its text consists of without it.

    Raises:
        ModelError: the tokenizer cannot be loaded.
        ConfigError: one of them is a token already.
    """
    return _with_new_tokens(config)[1] if config.new_tokens else {}


def _with_new_tokens(config: ModelConfig) -> tuple[Tokenizer, Parts]:
    tokenizer = _from_pretrained(AutoTokenizer, config)
    parts = add_tokens(tokenizer, config.new_tokens, config.model_name_or_path) if config.new_tokens else {}
    return tokenizer, parts


def model_config(config: ModelConfig) -> PretrainedConfig:
    """Return transformers' config of the model: from `model.architecture` if that describes this model, else its files.

    Raises:
        ModelError: the config cannot be loaded, or `model.architecture` is not valid.
        ConfigError: a field of `model.architecture` is misspelled.
    """
    if config.architecture and "_name_or_path" not in config.architecture:
        raise ModelError(
            "model.architecture: does not name its model; add _name_or_path, with the value of model.model_name_or_path"
        )
    if config.architecture.get("_name_or_path") != config.model_name_or_path:
        return _from_pretrained(AutoConfig, config)
    try:
        described = AutoConfig.for_model(**config.architecture)
    except (KeyError, TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        raise ModelError(f"model.architecture: {first_line(error)}") from error
    builtin.check_fields("model.architecture", described.model_type, config.architecture, only_misspelled=True)
    return described


def skeleton(config: ModelConfig) -> PreTrainedModel:
    """Return the model's modules without weights (meta device): names and shapes, before anything large is fetched."""
    model_config, folder = _from_pretrained(AutoConfig, config), Path(locate(config))
    name, most = config.model_name_or_path, untrusted.most_values(folder) if folder.is_dir() else _MOST_VALUES
    try:
        with _explained(config), untrusted.bounded(name, most), init_empty_weights():
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
            _make_room(model, config)
            return model
    except RuntimeError as error:  # without values only absurd sizes fill the memory
        raise ModelError(f"{name}: its config has sizes that no model has: {first_line(error)}") from error


def check_quantization(
    config: ModelConfig, quantization: QuantizationConfig, resolved: Resolved, skeleton: PreTrainedModel
) -> str | None:
    """Return a sentence about what bitsandbytes would leave unquantized, before the weights are loaded; None: little.

    Args:
        config: the model's config.
        quantization: the run's quantization; None is returned for other libraries than bitsandbytes.
        resolved: dtypes of the run.
        skeleton: the model without weights; its layers are replaced.

    Raises:
        ModelError: most of the model would stay as it is.
    """
    if not quantization.bitsandbytes:
        return None
    with_bitsandbytes_layers(skeleton, quantization_config(quantization, resolved))
    pack_meta(skeleton, quantization)
    return check_stored(config.model_name_or_path, quantization, stored(skeleton), getattr(torch, resolved.dtype))


def learned_positions(model: Any) -> int | None:
    """Return the longest row that a model with a table of positions can take; None if there is no such table.

    Beyond a table (learned, as in GPT-2 and OPT, or of sines, as in GPT-J) the model fails. Rotary positions have none.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    embeddings = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    tables = [name for name, buffer in model.named_buffers() if buffer.ndim == 2]
    return most if any(_POSITIONS.search(name) for name in [*embeddings, *tables]) else None


def load_model(
    config: ModelConfig, quantization: QuantizationConfig, resolved: Resolved, shared: DistributedConfig = ALONE
) -> PreTrainedModel:
    """Load the base model on its device, in its dtype, quantized as configured.

    Args:
        config: the model's config.
        quantization: the run's quantization.
        resolved: device and dtypes of the run.
        shared: how processes share the run, each with its own device. An engine that shards the model gets it on the
            CPU, where one fits that is larger than a GPU; a GPU only quantizes it, one matrix at a time. Files in the
            model's dtype stay mapped into memory, so that processes have one copy.

    Raises:
        ModelError: the model cannot be found, fetched or read, or its files are quantized in another way.
    """
    if (group := turns.current()) is None:
        return _load_model(config, quantization, resolved, shared)
    base: SharedBase = group.keep("base", lambda: SharedBase(_load_model(config, quantization, resolved, shared)))
    return base.copy()


def _load_model(
    config: ModelConfig, quantization: QuantizationConfig, resolved: Resolved, shared: DistributedConfig
) -> PreTrainedModel:
    to_shard, spread = shared.shards, config.device_map if shared.engine == "none" else None
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, resolved.dtype),
        "device_map": spread or {"": "cpu" if to_shard else resolved.device},
    }
    if config.attn_implementation:
        arguments["attn_implementation"] = config.attn_implementation
    stored = getattr(_from_pretrained(AutoConfig, config), "quantization_config", None)
    check_files(config.model_name_or_path, quantization, stored)
    if (quantizer_config := quantization_config(quantization, resolved)) is not None:
        arguments["quantization_config"] = quantizer_config
    on_gpu = quantized_on(resolved.device) if to_shard and quantization.load_in_4bit else nullcontext()
    with on_gpu, packing(quantization):
        model = _with_weights(config, **arguments)
    model.config.use_cache = False  # training does not need the cache; generation turns it on itself
    guard_layers(model)
    _make_room(model, config)
    if quantizer_config is not None and not to_shard:
        _copy_from_file(model)
    return model


@contextmanager
def keep_router_setting(model: Any, inside: bool | None = None) -> Iterator[None]:
    """Restore `output_router_logits` of a mixture-of-experts model after the context; do nothing for other models.

    TRL turns it on in the config. That would break generation from padded batches, and would be saved with the model.
    TRL's loss does not need it in the config: it asks for the router's logits in each call.

    Args:
        model: the model, with or without an adapter.
        inside: the value within the context; None: unchanged.
    """
    config = model.config.get_text_config()
    before = getattr(config, "output_router_logits", None)
    if before is not None and inside is not None:
        config.output_router_logits = inside
    try:
        yield
    finally:
        if before is not None:
            config.output_router_logits = before


def stop_at_end_of_turn(model: Any, dataset: DatasetConfig, tokenizer: Tokenizer) -> None:
    """Add the token or the text that ends an answer in this prompt format to those that end the model's generation.

    It is saved with the model, in generation_config.json. A base model often has EOS only, whatever ends the turns of
    the chat template.
    """
    end = end_of_turn(tokenizer, chat_template(dataset, tokenizer))
    tokens, texts = stop_tokens(model, tokenizer), stop_strings(model)
    if end.token is not None and end.token not in tokens:
        model.generation_config.eos_token_id = [*tokens, end.token]
    if end.stop is not None and end.stop not in texts:
        model.generation_config.stop_strings = [*texts, end.stop]


def stop_tokens(model: Any, tokenizer: Tokenizer) -> list[int]:
    """List all tokens that end an answer: the tokenizer's EOS token and those of the model's generation config."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own] if own is not None else [])})


def stop_strings(model: Any) -> list[str]:
    """List all texts that end an answer. transformers' `generate` needs the tokenizer to find them."""
    own = model.generation_config.stop_strings
    return [own] if isinstance(own, str) else list(own or [])


@contextmanager
def no_stop_strings(model: Any) -> Iterator[None]:
    """Generate inside without the texts that end an answer: transformers' `generate` needs the tokenizer for them."""
    settings = model.generation_config
    texts, settings.stop_strings = settings.stop_strings, None
    try:
        yield
    finally:
        settings.stop_strings = texts


@contextmanager
def own_settings_alone(model: Any) -> Iterator[None]:
    """Let `generate` inside use the settings that it is given, and none of the model's generation_config.json.

    transformers would take from there what they leave open: penalties, minimum lengths, forbidden tokens, beams.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's `generate` uses the base's
    before, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before


def _copy_from_file(model: PreTrainedModel) -> None:
    """Copy unquantized tensors out of the weights file: they would keep all of the file in memory.

    safetensors maps a file into memory, and on a CPU its tensors are parts of that mapping.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and type(tensor) in (torch.nn.Parameter, torch.Tensor):
            tensor.data = tensor.data.clone()


def load_unquantized(config: ModelConfig, dtype: str = "auto") -> PreTrainedModel:
    """Load the base as it was before quantization, on the CPU, in a dtype (auto: the dtype of its files)."""
    model = _with_weights(config, dtype=dtype)
    _make_room(model, config)
    return model


def _make_room(model: PreTrainedModel, config: ModelConfig) -> None:
    if config.new_tokens:
        add_rows(model, new_tokens(config))


def _with_weights(config: ModelConfig, **arguments: Any) -> PreTrainedModel:
    """Load the model with its weights; transformers would give random values to tensors that the files lack."""
    loaded: Any = _from_pretrained(AutoModelForCausalLM, config, output_loading_info=True, **arguments)
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ModelError(
            f"{config.model_name_or_path}: its files lack {len(missing)} tensors that its config describes: "
            f"{named(missing)}; fetch the model again, or correct its config.json"
        )
    return model


def named(names: Sequence[str]) -> str:
    """Name the first three."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _explained(config: ModelConfig) -> AbstractContextManager[None]:
    """Explain errors about the model's files. Those of the model's own code, if it may run, keep their traceback.

    Old models on the hub have their weights in a pickle only.
    """
    if config.trust_remote_code:
        return nullcontext()
    return untrusted.explained(config.model_name_or_path, pickles=config.from_hub)


def _from_pretrained(kind: Any, config: ModelConfig, **arguments: Any) -> Any:
    with _explained(config):
        return _from_files(kind, config, **arguments)


def _from_files(kind: Any, config: ModelConfig, **arguments: Any) -> Any:
    name, path = config.model_name_or_path, locate(config)
    if Path(path).is_dir():
        untrusted.check_folder(Path(path))
    try:
        return kind.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code, **arguments
        )
    except (GatedRepoError, LocalTokenNotFoundError) as error:
        raise ModelError(_gated(name)) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise hub_error(config, first_line(error), exists=False) from error
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, EOFError) as error:
        raise ModelError(
            f"{path}: a file of the model is damaged ({error}); delete the folder and fetch it again"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EACCES):
            raise
        if Path(path).is_dir():
            raise ModelError(f"{path}: not a complete model: {first_line(error)}") from error
        if "gated" in str(error):
            raise ModelError(_gated(name)) from error
        raise hub_error(config, first_line(error)) from error
    except (
        ImportError,
        ValueError,
    ) as error:  # an attention kernel or an architecture that is not available here
        raise ModelError(f"{name}: {first_line(error)}") from error


def _gated(name: str) -> str:
    from huggingface_hub import get_token

    if get_token():
        return (
            f"{name} is gated, and the token that was found has no access: accept its licence at "
            f"https://huggingface.co/{name} with the account of this token, and let the token read gated repositories"
        )
    return (
        f"{name} is gated: accept its licence at https://huggingface.co/{name}, then set HF_TOKEN "
        "in the environment or in a .env file"
    )
