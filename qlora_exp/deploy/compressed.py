"""Write a model in the compressed-tensors format, which vLLM and transformers load, with LLM Compressor.

The only module that writes such files. Checked with llmcompressor 0.14.0.1 and transformers 5.23 on a CPU.
"""

import importlib.util
import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from qlora_exp.deploy import gptq
from qlora_exp.libraries.patching import patched
from qlora_exp.utils.errors import ConfigError

_FP8_MOST = torch.finfo(torch.float8_e4m3fn).max


def check(form: str) -> None:
    """Check that files in the format `form` can be written here.

    Raises:
        ConfigError: they cannot; the message says what is missing.
    """
    if importlib.util.find_spec("llmcompressor") is None:
        raise ConfigError(
            f"--to {form} needs the packages llmcompressor and compressed-tensors; `nox -s compressed` installs them"
        )


def write(model: Any, tokenizer: Any, examples: list[dict[str, list[int]]], folder: Path, form: str) -> str:
    """Quantize the model and write its files.

    Args:
        model: unquantized model on the CPU.
        tokenizer: tokenizer of the model.
        examples: rows to calibrate on, from `gptq.rows`.
        folder: folder to write to.
        form: w4a16 (4-bit weights by GPTQ), w4a16_awq (by AWQ), w8a8 (8-bit weights by GPTQ, 8-bit inputs) or fp8.

    Returns:
        How the weights are stored. The weights of `model` then have the nearest values that are stored so, without
        calibration.

    Raises:
        ConfigError: no group size fits the model's layers.
    """
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    from llmcompressor import oneshot

    layers = gptq.quantized_layers(model)
    group = gptq.group_size(layers, form) if form.startswith("w4a16") else None
    rows = None if form == "fp8" else Dataset.from_list(examples)
    with tempfile.TemporaryDirectory(prefix=".merged.", dir=folder) as plain:
        model.save_pretrained(plain, max_shard_size="4GB")
        quantized = AutoModelForCausalLM.from_pretrained(plain, dtype=model.dtype)
        longest = max(len(row["input_ids"]) for row in examples)
        with _awq_on_this_device():
            oneshot(
                model=quantized,
                processor=tokenizer,
                recipe=_recipe(form, group),
                dataset=rows,
                max_seq_length=longest,
                num_calibration_samples=len(examples),
                tie_word_embeddings=quantized.config.tie_word_embeddings,
            )
        quantized.save_pretrained(folder, save_compressed=True, max_shard_size="4GB")
    for layer in layers:
        layer.weight.data = _nearest(layer.weight.data, form, group)
    return f"{form}, groups of {group}" if group else form


def _awq_on_this_device() -> AbstractContextManager[None]:
    """Let AWQ run without an accelerator: it pins memory for copies to one, which a CPU alone cannot."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        return nullcontext()
    # In docs/reference/library_patches.md: IntermediatesCache (replaced)
    return patched(IntermediatesCache, pin_memory=lambda *_: None)


def _recipe(form: str, group: int | None) -> list[Any]:
    """Return what LLM Compressor does to the layers, the output layer apart."""
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if form == "fp8":
        return [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])]
    if form == "w8a8":
        return [GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    awq = form == "w4a16_awq"
    weights = {"num_bits": gptq.BITS, "type": "int", "symmetric": not awq, "strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if awq:
        return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]


def _nearest(weight: torch.Tensor, form: str, group: int | None) -> torch.Tensor:
    """Return a matrix with the nearest values that the format can store."""
    if form == "fp8":
        scale = weight.float().abs().amax(-1, keepdim=True).clamp(min=1e-9) / _FP8_MOST
        return ((weight.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)
    if group is not None:
        return gptq.round_to_nearest(weight, group)
    return gptq.round_to_nearest(weight, weight.shape[1], bits=8)
