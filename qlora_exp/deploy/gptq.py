"""Quantize a model to 4 bits with GPTQ or AWQ, which choose values so that outputs on given rows change least.

The only module that writes such files; it uses GPTQModel. Checked with GPTQModel 7.6.0 and GPTQ on a CPU. AWQ needs a
GPU and was never run.
"""

import importlib.util
import io
import logging
import os
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from qlora_exp.config.schema import Config
from qlora_exp.data import tokenization
from qlora_exp.data.rows import load_rows
from qlora_exp.utils.errors import ConfigError

log = logging.getLogger(__name__)

BITS = 4
ROWS = 128
"""Number of the run's training rows to use. More rows change little (Frantar et al. 2022,
https://arxiv.org/abs/2210.17323, use 128)."""
_SHORTEST = 10
_GROUPS = (128, 64, 32)


def check(form: str) -> None:
    """Check that files in the format `form` can be written here.

    Raises:
        ConfigError: they cannot; the message says what is missing.
    """
    if importlib.util.find_spec("gptqmodel") is None:
        raise ConfigError(f"--to {form} needs the packages GPTQModel and optimum; `nox -s gptq` installs them")
    if form == "awq" and not torch.cuda.is_available():
        raise ConfigError("--to awq: GPTQModel writes AWQ files on a GPU only; --to gptq also works on a CPU")


def rows(config: Config, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Return the rows that GPTQ and AWQ calibrate on: the first training rows of the run, truncated as in training.

    Raises:
        ConfigError: no row has ten tokens or more.
        DataError: the rows cannot be read on this machine.
    """
    loaded = load_rows(config.dataset, config.unrelated)
    tokens = loaded.epoch(tokenization.tokenize(loaded.train, config, tokenizer))
    truncated = [row["input_ids"][: config.training.max_length] for row in tokens.select(range(min(ROWS, len(tokens))))]
    if not (long := [ids for ids in truncated if len(ids) >= _SHORTEST]):
        raise ConfigError(
            f"{config.dataset.name}: no training row has {_SHORTEST} tokens or more, which GPTQ and AWQ need; "
            "choose other rows or raise training.max_length"
        )
    return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in long]


def write(model: Any, tokenizer: Any, examples: list[dict[str, list[int]]], folder: Path, form: str) -> str:
    """Quantize the model and write its files.

    Args:
        model: unquantized model on the CPU.
        tokenizer: tokenizer of the model.
        examples: rows to calibrate on, from `rows`.
        folder: folder to write to.
        form: gptq or awq.

    Returns:
        How the weights are stored: the format and the size of a group. The weights of `model` then have the nearest
        values that such groups can store, without calibration.

    Raises:
        ConfigError: no group size fits the model's layers.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 1)))  # 7.6 needs at least two
    from gptqmodel import GPTQModel, QuantizeConfig

    layers = quantized_layers(model)
    group = group_size(layers, form)
    settings = {"quant_method": "awq", "format": "gemm"} if form == "awq" else {}
    log.info("%s: quantizing with %d rows; this takes several minutes or longer", form, len(examples))
    # GPTQModel prints hundreds of lines about the layers: hide them.
    with tempfile.TemporaryDirectory(prefix=".merged.", dir=folder) as plain, redirect_stdout(io.StringIO()):
        model.save_pretrained(plain, max_shard_size="4GB")
        tokenizer.save_pretrained(plain)
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        quantized = GPTQModel.load(plain, QuantizeConfig(bits=BITS, group_size=group, **settings), device=device)
        quantized.quantize(examples, batch_size=1)
        quantized.save(str(folder))
    (folder / "quant_log.csv").unlink(missing_ok=True)
    for layer in layers:
        layer.weight.data = round_to_nearest(layer.weight.data, group)
    return f"{form}, groups of {group}"


def quantized_layers(model: Any) -> list[torch.nn.Linear]:
    """Return the layers that are quantized: all linear ones but the output layer."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]


def group_size(layers: list[torch.nn.Linear], form: str) -> int:
    """Return the largest usual number of weights with a common scale that all layers divide into.

    Raises:
        ConfigError: there is none.
    """
    for size in _GROUPS:
        if all(layer.in_features % size == 0 for layer in layers):
            return size
    raise ConfigError(
        f"--to {form}: the model's layers do not divide into groups of {', '.join(map(str, _GROUPS))} weights"
    )


def round_to_nearest(weight: torch.Tensor, group: int, bits: int = BITS) -> torch.Tensor:
    """Return a matrix in which each group of a row has 2^bits - 1 values, evenly spaced up to its largest magnitude."""
    most = 2 ** (bits - 1) - 1
    groups = weight.float().reshape(len(weight), -1, group)
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-9) / most
    return ((groups / scales).round() * scales).reshape(weight.shape).to(weight.dtype)
