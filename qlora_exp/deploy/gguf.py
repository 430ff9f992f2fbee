"""Write a model as a GGUF file for llama.cpp and Ollama, with its tokenizer and chat template.

Uses the `gguf` library. Contains what llama.cpp (github.com/ggml-org/llama.cpp; docs/gguf.md of ggml-org/ggml) expects
of the families below: names of tensors and keys, the order of rotary pairs, names of pre-tokenizers. Does not deal with
runs or adapters.
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

from qlora_exp.data.end_of_turn import end_of_turn
from qlora_exp.data.prompts import adds_bos
from qlora_exp.deploy.formats import GGUF_TYPES
from qlora_exp.utils.errors import ConfigError

_CONVERT = (
    "Use --to merged, and convert that folder with llama.cpp if it has such models: python convert_hf_to_gguf.py "
    "FOLDER --outtype bf16"
)
_EXACT = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_FAMILIES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""The library's name of the architecture, by `model_type`."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    ("GPT-2's words",): "gpt-2",
    ("digits", "GPT-2's words"): "smollm",
    (_WORDS % "{1,3}", "bytes"): "llama-bpe",
    (_WORDS % "", "bytes"): "qwen2",
}
"""llama.cpp's name of a pre-tokenizer, by how its tokenizer.json splits a text."""
_BLANKS = ({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, {"type": "Prepend", "prepend": "▁"})
"""How a tokenizer of pieces marks blanks."""


def check_family(family: str) -> None:
    """Check that models of this `model_type` can be written.

    Raises:
        ConfigError: they cannot; the message says what to do instead.
    """
    if family not in _FAMILIES:
        raise ConfigError(
            f"--to gguf: models of type {family} are not supported ({', '.join(_FAMILIES)} are). {_CONVERT}"
        )


def check_type(type_: str) -> None:
    """Check that a file with weights of this type can be written here.

    Raises:
        ConfigError: it cannot; the message says what to do instead.
    """
    if type_ not in GGUF_TYPES:
        raise ConfigError(
            f"--type {type_}: the gguf library writes only {', '.join(GGUF_TYPES)}. For others use --type bf16, "
            f"then llama.cpp: llama-quantize model.gguf model-{type_}.gguf {type_.upper()}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("--to gguf needs the package gguf: pip install 'qlora-exp[gguf]'")


def write(model: Any, tokenizer: Any, folder: Path, file: Path, type_: str, name: str) -> torch.dtype | None:
    """Write the model, one tensor at a time.

    Args:
        model: model of a supported family, on the CPU.
        tokenizer: fast tokenizer, with the chat template to keep.
        folder: folder in which the tokenizer was saved.
        file: GGUF file to write.
        type_: type of all matrices, one of GGUF_TYPES; those of the vocabulary get at least 8 bits, vectors float32.
        name: name of the model.

    Returns:
        The dtype of the weights if nothing but rounding was lost; else None.

    Raises:
        ConfigError: this kind of model or tokenizer is not supported.
    """
    import gguf

    config = model.config
    check_family(config.model_type)
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
    wanted = gguf.GGMLQuantizationType[type_.upper()]
    kinds = {
        key: _kind(tensor, wanted, key in ("token_embd.weight", "output.weight")) for key, tensor in tensors.items()
    }
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
        raise ConfigError(f"--to gguf: attention with a sliding window is not supported. {_CONVERT}")
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
    supported = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
    supported |= {"low_freq_factor", "high_freq_factor"} if kind == "llama3" else set()
    if others := sorted(key for key, value in rope.items() if key not in supported and value is not None):
        raise ConfigError(
            f"--to gguf: rotary position embeddings with {', '.join(others)} are not supported. {_CONVERT}"
        )
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind not in ("default", "llama3"):
        raise ConfigError(f"--to gguf: rotary position embeddings of rope_type {kind} are not supported. {_CONVERT}")


def _add_tokenizer(writer: Any, tokenizer: Any, folder: Path, rows: int) -> None:
    """Add tokens, merges and how a text is split. Embedding rows without a token get a placeholder token."""
    import gguf

    backend = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    bpe, splits = backend["model"], _splits(backend["pre_tokenizer"])
    pieces = bpe.get("byte_fallback") and not splits  # SentencePiece, as in Llama 2
    if why := next(_unlike_llama_cpp(tokenizer, backend, splits), None):
        raise ConfigError(
            f"--to gguf: this tokenizer is not supported: {why}, and llama.cpp would read other tokens. {_CONVERT}"
        )
    texts = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType

    def kind(token_id: int) -> Any:
        if token_id not in texts:
            return kinds.UNUSED
        if token_id in added:
            return kinds.CONTROL if added[token_id].special else kinds.USER_DEFINED
        return kinds.BYTE if pieces and re.fullmatch("<0x[0-9A-F]{2}>", texts[token_id]) else kinds.NORMAL

    writer.add_token_list([texts.get(token_id, f"[PAD{token_id}]") for token_id in range(rows)])
    writer.add_token_types([kind(token_id) for token_id in range(rows)])
    if pieces:
        # llama.cpp joins the pair with the highest score first, so earlier merges get higher scores.
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in bpe["merges"]]
        ranks = {left + right: rank for rank, (left, right) in reversed([*enumerate(pairs)])}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(ranks.get(texts.get(token_id, ""), len(pairs))) for token_id in range(rows)])
        writer.add_add_space_prefix(_begins_with_space(backend))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_PRE_TOKENIZERS[splits])
        # llama.cpp reads no such tokenizer without merges. This one never applies: its characters encode no byte.
        writer.add_token_merges(gguf.SpecialVocab(folder, load_merges=True).merges or ["\u2603 \u2603"])
    for role in ("bos", "eos", "unk", "pad"):
        if (token_id := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(token_id)
    writer.add_add_bos_token(adds_bos(tokenizer))
    if tokenizer.chat_template:
        end = end_of_turn(tokenizer, tokenizer.get_chat_template()).token
        if end not in (None, tokenizer.eos_token_id):
            writer.add_eot_token_id(end)  # llama.cpp ends an answer at it, as at EOS; the format has no place for text
        writer.add_chat_template(tokenizer.get_chat_template())


def _unlike_llama_cpp(tokenizer: Any, backend: dict[str, Any], splits: tuple[str, ...]) -> Iterator[str]:
    """Yield what a tokenizer does that the tokenizers of llama.cpp do not.

    Args:
        tokenizer: the tokenizer.
        backend: its tokenizer.json.
        splits: what it splits a text by, from `_splits`.
    """
    bpe, normalizer = backend["model"], backend["normalizer"]
    if bpe["type"] != "BPE":
        yield f"its tokens are of type {bpe['type']}"
    if any(bpe.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        yield "it marks or drops parts of words"
    changes = [part for part in (normalizer or {}).get("normalizers", [normalizer]) if part]
    if bpe.get("byte_fallback") and not splits:
        if others := [part["type"] for part in changes if part not in _BLANKS]:
            yield f"it changes texts by {', '.join(others)}"
        if not backend["pre_tokenizer"] and _BLANKS[0] not in changes:
            yield "it has no mark for blanks"
    elif splits not in _PRE_TOKENIZERS:
        yield f"it splits a text by {', '.join(splits) or 'nothing'}"
    elif others := [part["type"] for part in changes if part["type"] != "NFC" or _PRE_TOKENIZERS[splits] != "qwen2"]:
        yield f"it changes texts by {', '.join(others)}"
    added = tokenizer.added_tokens_decoder.values()
    if odd := [token.content for token in added if token.lstrip or token.rstrip or token.single_word]:
        yield f"its token {odd[0]!r} takes blanks next to it, or stands alone only"
    ids, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    begin = next((place for place in range(len(ids)) if ids[place : place + len(plain)] == plain), len(ids))
    if ids[:begin] not in ([], [tokenizer.bos_token_id]):
        yield f"it begins texts with {tokenizer.convert_ids_to_tokens(ids[:begin])}"


def _begins_with_space(backend: dict[str, Any]) -> bool:
    """Return whether the tokenizer puts a space before a text."""
    parts = [part for part in (backend["normalizer"], backend["pre_tokenizer"]) if part]
    parts += [inner for part in parts for inner in part.get("normalizers", [])]
    return any(part["type"] == "Prepend" or part.get("prepend_scheme") in ("first", "always") for part in parts)


def _splits(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """Return what a pre-tokenizer of tokenizer.json splits a text by, in order."""
    match pre_tokenizer:
        case None | {"type": "Metaspace", "replacement": "▁", "split": False}:
            return ()
        case {"type": "Sequence", "pretokenizers": parts}:
            return tuple(split for part in parts for split in _splits(part))
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return (pattern,)
        case {"type": "Digits", "individual_digits": True}:
            return ("digits",)
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return ("GPT-2's words",) if pre_tokenizer.get("use_regex", True) else ("bytes",)
    return (json.dumps(pre_tokenizer),)


def _tensors(model: Any, names: Any, permuted: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield llama.cpp's name of each tensor, and the tensor in llama.cpp's layout."""
    config = model.config
    if config.rope_parameters.get("rope_type") == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        size = 2 * len(scaled)
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size)
        yield "rope_freqs.weight", plain / scaled
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and tensor.data_ptr() == model.get_input_embeddings().weight.data_ptr():
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigError(f"--to gguf: llama.cpp has no name for the tensor {key} of this model")
        if permuted and ("q_proj" in key or "k_proj" in key):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            # The two values of a rotary pair are half a head apart in transformers, and adjacent in llama.cpp.
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        yield name, tensor


def round_weights(model: Any, type_: str) -> None:
    """Give the weights of a model the values that they have in a file of this type.

    Args:
        model: model of a supported family, on the CPU; it is changed.
        type_: type of the matrices, one of GGUF_TYPES.
    """
    import gguf

    wanted = gguf.GGMLQuantizationType[type_.upper()]
    vocabulary = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    for parameter in model.float().parameters():
        kind = _kind(parameter, wanted, id(parameter) in vocabulary)
        packed = gguf.quants.quantize(parameter.detach().numpy(), kind)
        parameter.data = torch.from_numpy(gguf.quants.dequantize(packed, kind))


def _kind(tensor: torch.Tensor, wanted: Any, of_vocabulary: bool) -> Any:
    """Return the type to store a tensor in.

    Vectors are float32; the vocabulary has at least 8 bits; rows that do not divide into blocks are float16.
    """
    import gguf

    kinds = gguf.GGMLQuantizationType
    if tensor.ndim < 2:
        return kinds.F32
    small = gguf.GGML_QUANT_SIZES[wanted][0] > 1
    if small and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        return kinds.F16
    return kinds.Q8_0 if small and of_vocabulary else wanted
