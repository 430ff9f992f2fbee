"""A model as a GGUF file for llama.cpp and Ollama, with its tokenizer and chat template, by the `gguf` library.

Knows what llama.cpp (github.com/ggml-org/llama.cpp; docs/gguf.md of ggml-org/ggml) expects of the families below:
names of tensors and keys, the order of rotary pairs, names of pre-tokenizers. Knows nothing of runs or adapters.
"""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_exp.data.prompts import adds_bos
from qlora_exp.deploy.formats import GGUF_TYPES
from qlora_exp.utils.errors import ConfigError

_EXACT = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_FAMILIES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""By `model_type`: the library's name of the architecture."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_WORDS % "{1,3}", "ByteLevel"): "llama-bpe",
    (_WORDS % "", "ByteLevel"): "qwen2",
}
"""By what splits a text in tokenizer.json: llama.cpp's name of it."""


def check_type(type_: str) -> None:
    """That a file with such weights can be written here.

    Raises:
        ConfigError: it cannot; what can be done instead.
    """
    if type_ not in GGUF_TYPES:
        raise ConfigError(
            f"--type {type_}: the gguf library writes {', '.join(GGUF_TYPES)}. Of --type bf16 llama.cpp makes others: "
            f"llama-quantize model.gguf model-{type_}.gguf {type_.upper()}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("--to gguf needs a package: pip install 'qlora-exp[gguf]'")


def write(model: Any, tokenizer: Any, folder: Path, file: Path, type_: str, name: str) -> torch.dtype | None:
    """Write the model, a tensor at a time.

    Args:
        model: of one of the families that are known here, on the CPU.
        tokenizer: a fast one, with the chat template to keep.
        folder: where the tokenizer was saved.
        file: what to write.
        type_: of GGUF_TYPES, of all matrices; those of the vocabulary have 8 bits at least, vectors are float32.
        name: the model's.

    Returns:
        The dtype, if nothing but rounding was lost; else None.

    Raises:
        ConfigError: llama.cpp's form of such a model or tokenizer is not known here.
    """
    import gguf

    config = model.config
    if config.model_type not in _FAMILIES:
        raise ConfigError(
            f"--to gguf: models of type {config.model_type} are not known here ({', '.join(_FAMILIES)} are). Write "
            "--to merged and convert that folder with llama.cpp: python convert_hf_to_gguf.py FOLDER --outtype bf16"
        )
    architecture = gguf.MODEL_ARCH[_FAMILIES[config.model_type]]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if type_ == "f32" else f"MOSTLY_{type_.upper()}"])
    if type_ not in _EXACT:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_architecture(writer, config)
    _add_tokenizer(writer, tokenizer, folder, model.get_input_embeddings().weight.shape[0])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = dict(_tensors(model, names, permuted=architecture == gguf.MODEL_ARCH.LLAMA))
    kinds = {key: _kind(key, tensor, gguf.GGMLQuantizationType[type_.upper()]) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[kinds[key]]
        writer.add_tensor_info(
            key, tensor.shape, np.dtype(np.float32), tensor.numel() // block * size, raw_dtype=kinds[key]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, tensor in tqdm(tensors.items(), desc="writing", unit="tensor", leave=False, disable=None):
        writer.write_tensor_data(gguf.quants.quantize(tensor.float().numpy(), kinds[key]))
    writer.close()
    return _EXACT.get(type_)


def _add_architecture(writer: Any, config: Any) -> None:
    import gguf

    rope = config.rope_parameters
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise ConfigError("--to gguf: attention with a sliding window is not known here")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
    known |= {"low_freq_factor", "high_freq_factor"} if kind == "llama3" else set()
    if others := sorted(key for key, value in rope.items() if key not in known and value is not None):
        raise ConfigError(f"--to gguf: positions with {', '.join(others)} are not known here")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind not in ("default", "llama3"):
        raise ConfigError(f"--to gguf: positions of rope_type {kind} are not known here")


def _add_tokenizer(writer: Any, tokenizer: Any, folder: Path, rows: int) -> None:
    """Tokens, merges and how a text is split; rows of the embedding beyond the tokens are filled up."""
    import gguf

    backend = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    bpe, splits = backend["model"], _splits(backend["pre_tokenizer"] or {})
    pieces = bpe.get("byte_fallback") and splits in (("None",), ("Metaspace",))  # SentencePiece's, as Llama 2 has it
    if bpe["type"] != "BPE" or not (pieces or splits in _PRE_TOKENIZERS):
        raise ConfigError(
            f"--to gguf: llama.cpp's name of this tokenizer is not known here ({bpe['type']}, split by "
            f"{splits}). Write --to merged and convert that folder: python convert_hf_to_gguf.py FOLDER --outtype bf16"
        )
    texts = {place: text for text, place in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType

    def kind(place: int) -> Any:
        if place not in texts:
            return kinds.UNUSED
        if place in added:
            return kinds.CONTROL if added[place].special else kinds.USER_DEFINED
        return kinds.BYTE if pieces and re.fullmatch("<0x[0-9A-F]{2}>", texts[place]) else kinds.NORMAL

    writer.add_token_list([texts.get(place, f"[PAD{place}]") for place in range(rows)])
    writer.add_token_types([kind(place) for place in range(rows)])
    if pieces:
        # llama.cpp joins first what has the highest score: what is merged first.
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in bpe["merges"]]
        made = {left + right: rank for rank, (left, right) in reversed([*enumerate(pairs)])}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(made.get(texts.get(place, ""), len(pairs))) for place in range(rows)])
        writer.add_add_space_prefix(_begins_with_space(backend))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_PRE_TOKENIZERS[splits])
        # llama.cpp reads no such tokenizer without merges: one of characters that stand for no byte never applies.
        writer.add_token_merges(gguf.SpecialVocab(folder, load_merges=True).merges or ["\u2603 \u2603"])
    for role in ("bos", "eos", "unk", "pad"):
        if (place := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(place)
    writer.add_add_bos_token(adds_bos(tokenizer))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())


def _begins_with_space(backend: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    parts = [one for one in (backend["normalizer"], backend["pre_tokenizer"]) if one]
    parts += [inner for one in parts for inner in one.get("normalizers", [])]
    return any(one["type"] == "Prepend" or one.get("prepend_scheme") in ("first", "always") for one in parts)


def _splits(pre_tokenizer: dict[str, Any]) -> tuple[str, ...]:
    """By what a pre-tokenizer of tokenizer.json splits a text, in order."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": parts}:
            return tuple(part for one in parts for part in _splits(one))
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}:
            return (pattern,)
        case {"type": "Digits", "individual_digits": True}:
            return ("Digits",)
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return ("ByteLevel",)
    return (str(pre_tokenizer.get("type")),)


def _tensors(model: Any, names: Any, permuted: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """llama.cpp's name of each tensor, and the tensor as it wants it."""
    config = model.config
    if config.rope_parameters.get("rope_type") == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        size = 2 * len(scaled)
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size)
        yield "rope_freqs.weight", plain / scaled
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigError(f"--to gguf: llama.cpp knows no tensor {key} of such a model")
        if permuted and ("q_proj" in key or "k_proj" in key):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            # Halves of rotary pairs stand apart in transformers, and side by side in llama.cpp.
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        yield name, tensor


def _kind(name: str, tensor: torch.Tensor, wanted: Any) -> Any:
    """What a tensor is stored as: vectors whole, the vocabulary in 8 bits at least, rows that no block fits in 16."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if tensor.ndim < 2:
        return kinds.F32
    small = gguf.GGML_QUANT_SIZES[wanted][0] > 1
    if small and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        return kinds.F16
    return kinds.Q8_0 if small and name in ("token_embd.weight", "output.weight") else wanted
