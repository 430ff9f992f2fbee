"""Measure quantization error: on weights and on normal samples, with bits per value and the model's loss.

Quantizes as bitsandbytes does when it loads a base model. Uniform 4-bit levels and 16-bit floats are included for
comparison. Works on models, not on runs.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.quantization import OTHER_WEIGHTS
from qlora_exp.data.reading.recognize import recognized
from qlora_exp.data.rows import load_heldout
from qlora_exp.data.tokenization import IGNORED, unrelated
from qlora_exp.models.base import load_tokenizer, load_unquantized
from qlora_exp.models.files import installed
from qlora_exp.models.quantization import dense, torchao_config
from qlora_exp.models.targets import linear_layers
from qlora_exp.utils.files import write_atomically
from qlora_exp.utils.tables import markdown_table

Stored = tuple[torch.Tensor, int]
"""A matrix after quantization and dequantization, and its stored size in bytes."""
Store = Callable[[torch.Tensor, int], Stored]
"""Quantizes and dequantizes a matrix with the given block size."""


def _four_bits(weight: torch.Tensor, blocksize: int, quant_type: str, double: bool) -> Stored:
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double, quant_type=quant_type)
    constants = [state.absmax, state.state2.absmax, state.offset] if double else [state.absmax]
    stored = packed.nbytes + sum(tensor.nbytes for tensor in constants)
    return bnb.dequantize_4bit(packed, state).to(weight.dtype), stored


def uniform(weight: torch.Tensor, blocksize: int, levels: int = 16) -> Stored:
    """Quantize to evenly spaced levels from -1 to 1 times each block's largest absolute value (stored in float32)."""
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % blocksize)).view(-1, blocksize)
    scales = blocks.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    step = 2 / (levels - 1)
    nearest = ((blocks / scales + 1) / step).round() * step - 1
    restored = (nearest * scales).flatten()[: weight.numel()].view_as(weight)
    return restored, weight.numel() // 2 + scales.numel() * 4


def _int8(weight: torch.Tensor, blocksize: int) -> Stored:
    """Quantize as LLM.int8 does: one scale per row, whatever the block size."""
    values, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    return (values.to(weight.dtype) * scales[:, None].to(weight.dtype) / 127), values.nbytes + scales.nbytes


def _rounded(weight: torch.Tensor, _blocksize: int, dtype: torch.dtype) -> Stored:
    """Round each value to a 16-bit float; nothing is shared between values."""
    return weight.to(dtype).to(weight.dtype), weight.numel() * dtype.itemsize


def _as_layer(weight: torch.Tensor, _blocksize: int, quant_method: str, weights: str) -> Stored:
    """Quantize as torchao or Quanto does for a layer; these libraries choose which values share a scale."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    model = torch.nn.Sequential(layer)
    if quant_method == "torchao":
        import torchao.quantization

        torchao.quantization.quantize_(model, torchao_config(weights))
    else:
        from optimum import quanto

        quanto.quantize(model, weights=quanto.qtypes[f"q{weights}"])
        quanto.freeze(model)
    stored: Any = model[0].weight
    return dense(stored).detach().to(weight.dtype), _nbytes(stored)


def _nbytes(tensor: Any) -> int:
    """Return the bytes of a tensor; for a library's tensor subclass, those of the plain tensors in it."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


FORMATS: dict[str, Store] = {
    "bfloat16": partial(_rounded, dtype=torch.bfloat16),
    "float16": partial(_rounded, dtype=torch.float16),
    **{
        f"{kind}{'_double' if double else ''}": partial(_four_bits, quant_type=kind, double=double)
        for kind in ("nf4", "fp4")
        for double in (False, True)
    },
    "int4_uniform": uniform,
    "int8": _int8,
    **{
        f"{by}_{weights}": partial(_as_layer, quant_method=by, weights=weights)
        for by, kinds in OTHER_WEIGHTS.items()
        if installed(by)
        for weights in kinds
    },
}
"""Formats by name: (weight (rows, columns), blocksize) -> dequantized weight, stored bytes.

The names are those of `conf/quantization`, besides 16-bit floats and uniform levels. Formats of torchao and Quanto are
included if these are installed."""


@dataclass(frozen=True)
class Loss:
    """Error and size of one format."""

    rmse: float
    """Relative RMSE: root of the mean squared error divided by the root mean square of the values; 0 is exact."""
    bits: float
    """Stored bits per value, quantization constants included."""
    loss: float | None = None
    """Loss of the model with such weights on some text, in nats per token."""


def of_samples(blocksize: int = 64, count: int = 2**20, seed: int = 0) -> dict[str, Loss]:
    """Measure each format on samples of a standard normal distribution, as one matrix of 1024 columns."""
    samples = torch.randn(count // 1024, 1024, generator=torch.Generator().manual_seed(seed))
    return {name: _measure([samples], store, blocksize) for name, store in FORMATS.items()}


def _measure(weights: list[torch.Tensor], store: Store, blocksize: int) -> Loss:
    error = size = count = 0.0
    stored = 0
    for weight in weights:
        restored, nbytes = store(weight, blocksize)
        error += float((restored.double() - weight.double()).square().sum())
        size += float(weight.double().square().sum())
        count += weight.numel()
        stored += nbytes
    return Loss((error / size) ** 0.5, 8 * stored / count)


@torch.no_grad()
def text_loss(model: Any, tokens: Dataset) -> float:
    """Return the model's mean loss on rows of `input_ids` and `labels`, in nats per token that carries loss."""
    nll = count = 0.0
    for row in tokens:
        ids, labels = (torch.tensor(row[key], device=model.device) for key in ("input_ids", "labels"))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        nll += float(cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum"))
        count += int((labels[1:] != IGNORED).sum())
    return nll / count


@torch.no_grad()
def of_model(model: Any, loss_of: Callable[[Any], float], blocksize: int = 64, width: int = 32) -> dict[str, Loss]:
    """Measure each format on the weights that a quantized base would store in it.

    These are the weights of the linear layers, without the output layer. Needs twice the memory of the model's weights.

    Args:
        model: an unquantized model; its weights are restored afterwards.
        loss_of: computes the model's loss on some text.
        blocksize: number of values that share a scale.
        width: bits of a weight in the model's files.

    Returns:
        Results by format; `none` has the loss of the unquantized model.
    """
    layers = [model.get_submodule(name) for name in linear_layers(model)]
    originals = [layer.weight.data for layer in layers]
    results = {"none": Loss(0.0, width, loss_of(model))}
    for name, store in tqdm(FORMATS.items(), desc="formats", leave=False, disable=None):
        measured = _measure(originals, store, blocksize)
        try:
            for layer, original in zip(layers, originals, strict=True):
                layer.weight.data = store(original, blocksize)[0]
            results[name] = Loss(measured.rmse, measured.bits, loss_of(model))
        finally:
            for layer, original in zip(layers, originals, strict=True):
                layer.weight.data = original
    return results


def study(config: Config, blocksize: int, folder: Path) -> tuple[list[str], list[list[str]]]:
    """Measure each format on the config's model; write `quantize_error.json`, `.md` and `.svg` to `folder`.

    Returns:
        Headings and rows of a table, as text: bits per weight, relative RMSE on weights and on normal samples each with
        its ratio to NF4's, increase of the loss on the text, perplexity.
    """
    config = recognized(config)
    model = load_unquantized(config.model)
    width = model.dtype.itemsize * 8
    model = model.float().eval()
    _, tokens = unrelated(load_heldout(config.unrelated), config, load_tokenizer(config.model))
    weights = of_model(model, partial(text_loss, tokens=tokens), blocksize, width)
    samples = of_samples(blocksize)
    draw(model, folder / "quantize_error.svg", blocksize)
    losses_by_data = {"weights": weights, "normal samples": samples}
    values = {data: {name: asdict(loss) for name, loss in losses.items()} for data, losses in losses_by_data.items()}
    settings = {"model": config.model.model_name_or_path, "text": config.unrelated.path, "blocksize": blocksize}
    write_atomically(folder / "quantize_error.json", json.dumps(settings | values, indent=1))
    headings = ["format", "bits", "RMSE", "/nf4", "normal", "/nf4", "loss +", "perplexity"]
    rows = []
    for name, loss in weights.items():
        normal = samples.get(name, Loss(0.0, loss.bits))
        ratios = [own.rmse / formats["nf4"].rmse for own, formats in ((loss, weights), (normal, samples))]
        nats = float(loss.loss or 0.0)
        rows.append(
            [
                name,
                f"{loss.bits:.3f}",
                f"{loss.rmse:.4f}",
                f"{ratios[0]:.2f}",
                f"{normal.rmse:.4f}",
                f"{ratios[1]:.2f}",
                f"{nats - float(weights['none'].loss or 0.0):+.4f}",
                f"{math.exp(nats):.2f}",
            ]
        )
    write_atomically(folder / "quantize_error.md", markdown_table(headings, rows) + "\n")
    return headings, rows


def levels(quant_type: str) -> list[float]:
    """Return the values between -1 and 1 that a 4-bit type of bitsandbytes can represent."""
    return sorted(bnb.get_4bit_type(quant_type, device="cpu").tolist())


def draw(model: Any, file: Path, blocksize: int = 64) -> None:
    """Draw the levels of each 4-bit type over the histogram of the model's weights, which are scaled block by block."""
    from matplotlib.figure import Figure

    density = torch.zeros(201)
    for name in linear_layers(model):
        weight = model.get_submodule(name).weight.data.float().flatten()
        blocks = weight[: weight.numel() // blocksize * blocksize].view(-1, blocksize)
        scaled = blocks / blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
        density += torch.histc(scaled, bins=201, min=-1, max=1)
    density /= density.sum() * (2 / 201)
    kinds: Mapping[str, list[float]] = {
        "nf4": levels("nf4"),
        "fp4": levels("fp4"),
        "int4, uniform": torch.linspace(-1, 1, 16).tolist(),
    }
    figure = Figure(figsize=(8, 6), layout="constrained")
    for axes, (name, marks) in zip(figure.subplots(len(kinds), 1, sharex=True), kinds.items(), strict=True):
        axes.fill_between(torch.linspace(-1, 1, 201).tolist(), density.tolist(), step="mid", color="#56B4E9", alpha=0.6)
        axes.vlines(marks, 0, float(density.quantile(0.99)), color="#D55E00", linewidth=1)
        axes.set_ylabel(name)
        axes.set_yticks([])
    axes.set_xlabel(f"weight divided by the largest absolute weight in its block of {blocksize}")
    figure.suptitle("levels of 4-bit types and the distribution of the model's weights")
    figure.savefig(file)
