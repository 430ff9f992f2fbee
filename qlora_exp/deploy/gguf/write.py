"""Write a model of a family that llama.cpp has as a GGUF file, and read the file back.

Uses the `gguf` library. `families` and `tokenizers` contain what llama.cpp (github.com/ggml-org/llama.cpp; the format:
ggml-org/ggml/docs/gguf.md) expects. Does not deal with runs or adapters.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from qlora_exp.deploy.formats import GGUF_TYPES
from qlora_exp.deploy.gguf import families, tokenizers
from qlora_exp.utils.errors import ConfigError

_EXACT = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def check(config: Any, tokenizer: Any, type_: str) -> None:
    """Check that a model can be written, before it is loaded.

    Args:
        config: config of the model.
        tokenizer: its tokenizer.
        type_: type of the matrices.

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
    families.check_config(config)
    tokenizers.check_tokenizer(tokenizer)


def write(model: Any, tokenizer: Any, file: Path, type_: str, name: str) -> torch.dtype | None:
    """Write the model, one tensor at a time.

    Args:
        model: model of a supported family, on the CPU.
        tokenizer: fast tokenizer, with the chat template to keep.
        file: GGUF file to write.
        type_: type of all matrices, one of GGUF_TYPES; those of the vocabulary get at least 8 bits, vectors float32.
        name: name of the model.

    Returns:
        The dtype of the weights if nothing but rounding was lost; else None.

    Raises:
        ConfigError: this kind of model or tokenizer is not supported.
    """
    check(model.config, tokenizer, type_)
    import gguf

    logging.getLogger("gguf").setLevel(logging.WARNING)  # it logs that the file is little-endian
    architecture = gguf.MODEL_ARCH[families.FAMILIES[model.config.model_type].architecture]
    tensors = [*families.tensors(model)]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(tokenizers.model_name(name, tokenizer))
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if type_ == "f32" else f"MOSTLY_{type_.upper()}"])
    if type_ not in _EXACT:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    families.describe(writer, model.config)
    tokenizers.add_tokenizer(writer, tokenizer, model.get_input_embeddings().weight.shape[0])
    kinds = [_kind(tensor, type_) for tensor in tensors]
    for tensor, kind in zip(tensors, kinds, strict=True):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = tuple(tensor.stored().shape)
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(np.float32), tensor.value.numel() // block * size, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    bar = tqdm([*zip(tensors, kinds, strict=True)], desc="writing", unit="tensor", leave=False, disable=None)
    for tensor, kind in bar:
        writer.write_tensor_data(gguf.quants.quantize(tensor.stored().float().numpy(), kind))
    writer.close()
    return _EXACT.get(type_)


@torch.no_grad()
def round_weights(model: Any, type_: str) -> None:
    """Give the weights of a model the values that they have in a file of this type.

    Args:
        model: model of a supported family, on the CPU; it is changed.
        type_: type of the matrices, one of GGUF_TYPES.
    """
    import gguf

    for tensor in families.tensors(model.float()):
        if tensor.key is not None:
            kind = _kind(tensor, type_)
            packed = gguf.quants.quantize(tensor.stored().numpy(), kind)
            tensor.value.copy_(tensor.restored(torch.from_numpy(gguf.quants.dequantize(packed, kind))))


@torch.no_grad()
def read(config: Any, file: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the class of the model in a GGUF file, and its weights, float32, by their names in the model.

    transformers reads fewer families from GGUF files than are written here, and of some not all settings.

    Args:
        config: config of the model.
        file: file that `write` wrote.

    Raises:
        KeyError: the file lacks a tensor.
    """
    import gguf

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    skeleton.tie_weights()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    return type(skeleton), {
        tensor.key: tensor.restored(_values(stored[tensor.name]))
        for tensor in families.tensors(skeleton)
        if tensor.key is not None
    }


def _values(tensor: Any) -> torch.Tensor:
    """Return the values of a tensor of `gguf.GGUFReader`."""
    import gguf

    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


def _kind(tensor: families.Tensor, type_: str) -> Any:
    """Return the type to store a tensor in.

    Vectors are float32; the vocabulary has at least 8 bits; rows that do not divide into blocks are float16. llama.cpp
    adds learned positions as they are, so they are float32.
    """
    import gguf

    kinds = gguf.GGMLQuantizationType
    wanted = kinds[type_.upper()]
    if tensor.value.ndim < 2 or tensor.name == "position_embd.weight":
        return kinds.F32
    small = gguf.GGML_QUANT_SIZES[wanted][0] > 1
    if small and tensor.stored().shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        return kinds.F16
    return kinds.Q8_0 if small and tensor.name in ("token_embd.weight", "output.weight") else wanted
