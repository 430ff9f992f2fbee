"""Quantize a frozen base, and correct what each library's layers get wrong in training.

This is the only module with code for each quantizer. It does not depend on adapters or runs.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from bitsandbytes import functional
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft.utils.integrations import dequantize_module_weight
from transformers import AwqConfig, BitsAndBytesConfig, GPTQConfig, QuantoConfig, TorchAoConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import AwqBackend

from qlora_exp.config.sections.quantization import QuantizationConfig
from qlora_exp.environment.device import Resolved
from qlora_exp.libraries.bitsandbytes import dequantize_every_width, keep_trainable
from qlora_exp.models.files import require_package, unquantized
from qlora_exp.models.layers.experts import Experts4bit, packed_experts, unpack
from qlora_exp.utils.errors import ModelError

_MOST = 0.9
"""Share of weights in few bits from which on nothing is said about the others."""
_CONVOLUTIONS = torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d
_TENSOR_CLASSES = ("torchao", "optimum.quanto")


def quantization_config(quantization: QuantizationConfig, resolved: Resolved) -> Any:
    """Return transformers' config of a quantized base; None for an unquantized one.

    Raises:
        ModelError: the package that quantizes is not installed.
    """
    require_package(quantization)
    method = quantization.quant_method
    if method == "torchao":
        return TorchAoConfig(torchao_config(quantization.weights))
    if method == "quanto":
        return QuantoConfig(weights=quantization.weights)
    if method in ("gptq", "awq"):  # other settings are in the model's files
        # On a CPU GPTQModel would choose half-precision kernels, with imprecise gradients (cosine 0.99).
        on_cpu = resolved.device == "cpu"
        if method == "gptq":
            return GPTQConfig(bits=4, backend="torch" if on_cpu else "auto_trainable")
        return AwqConfig(backend=AwqBackend.TORCH_AWQ if on_cpu else AwqBackend.AUTO_TRAINABLE)
    if quantization.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=quantization.llm_int8_threshold)
    if quantization.load_in_4bit:
        dequantize_every_width()
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=getattr(torch, resolved.compute_dtype or resolved.dtype),
            bnb_4bit_quant_storage=getattr(torch, resolved.quant_storage or "uint8"),
        )
    return None


def weights_bytes(model: Any) -> int:
    """Return the bytes of a model's weights as stored, including the constants that bitsandbytes keeps for them."""
    total: int = model.get_memory_footprint()
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        states = [state, state.state2] if state is not None and state.nested else [state] if state is not None else []
        total += sum(state.absmax.nbytes for state in states)
        if isinstance(scales := getattr(parameter, "SCB", None), torch.Tensor):
            total += scales.nbytes
    for _, experts in packed_experts(model):  # which look as if they were in 16 bits
        total += sum(part.nbytes for part in experts.parts.values()) - experts.numel() * experts.element_size()
    return total


@dataclass(frozen=True)
class Stored:
    """How many weights of a model's layers are stored in few bits; embeddings and the output layer do not count."""

    few_bits: int
    experts: int
    """Weights of fused experts, and other tensors of more than two dimensions, that stay as they are."""
    others: dict[str, int]
    """Further matrices that stay as they are: number of weights by the class of their layer."""

    @property
    def share(self) -> float:
        """Share of the weights that is stored in few bits; 0 if there are none."""
        return self.few_bits / max(self.few_bits + self.experts + sum(self.others.values()), 1)


def stored(model: Any) -> Stored:
    """Count how the weights of a model are stored; a model on the meta device needs its quantized layers in place."""
    few_bits, experts = 0, 0
    others: Counter[str] = Counter()
    for module in model.modules():
        if module is model.get_output_embeddings() or isinstance(module, torch.nn.Embedding | _CONVOLUTIONS):
            continue
        weight = getattr(module, "weight", None)
        if isinstance(module, Linear4bit | Linear8bitLt) or hasattr(module, "qweight"):
            few_bits += module.in_features * module.out_features
        elif isinstance(weight, torch.Tensor) and type(weight).__module__.startswith(_TENSOR_CLASSES):
            few_bits += weight.numel()
        else:
            for parameter in module.parameters(recurse=False):
                if isinstance(parameter, Experts4bit):
                    few_bits += parameter.numel()
                    continue
                experts += parameter.numel() if parameter.ndim > 2 else 0
                others[type(module).__name__] += parameter.numel() if parameter.ndim == 2 else 0
    return Stored(few_bits, experts, +others)


def check_stored(name: str, quantization: QuantizationConfig, found: Stored, dtype: torch.dtype) -> str | None:
    """Return a sentence about what a quantized base keeps unquantized; None if that is less than a tenth.

    Raises:
        ModelError: apart from fused experts, less than half of the weights would be stored in few bits.
    """
    left = sum(found.others.values())
    if found.few_bits <= left:
        kinds = ", ".join(sorted(found.others, key=found.others.__getitem__, reverse=True)[:3])
        raise ModelError(unquantized(name, quantization, f"{1 - found.share:.0%}", kinds or "of this model"))
    if found.share >= _MOST:
        return None
    fused = found.experts > left
    kinds = "in fused experts" if fused else f"in {', '.join(found.others)}"
    count = found.experts + left
    asked = fused and quantization.load_in_4bit and not quantization.bnb_4bit_experts
    return (
        f"quantization={quantization.name}: only {found.share:.1%} of {name}'s weights are stored in few bits; "
        f"{count:,} weights, most of them {kinds}, stay in {str(dtype).removeprefix('torch.')} and take "
        f"{count * dtype.itemsize / 1e9:,.2f} GB"
        + ("; quantization.bnb_4bit_experts=true stores them in 4 bits" if asked else "")
    )


def guard_layers(model: torch.nn.Module) -> None:
    """Correct the layers that these libraries get wrong in training; tests/unit/models/test_quantization.py shows each.

    bitsandbytes 0.50.2 on CPUs:
    4 bits: on CPUs with AVX512-BF16 the first forward in eval mode repacks the weights for inference; later training
    forwards then take a path without autograd, and the gradient through every base layer is silently lost.
    8 bits: PEFT's DoRA moves the weight to the device it is on, which loses its scales, and the next forward fails.
    8-bit floats (torchao 0.18, Quanto 0.2.7): a row of zeros becomes NaN.

    Raises:
        ModelError: a layer has NaN values.
    """
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and (values := dense(weight)) is not weight and values.isnan().any():
            raise ModelError(f"{name}: rows of zeros, which 8-bit floats turn into NaN; choose another quantization")
        keep_trainable(module)


def weight_of(layer: Any) -> torch.Tensor | None:
    """Return a layer's dequantized weights, (out_features, in_features), float32; None if it is not quantized."""
    if hasattr(layer, "dequantize_weight"):  # GPTQModel's GPTQ layers
        return layer.dequantize_weight().T.float()
    if hasattr(layer, "qzeros"):  # GPTQModel's AWQ layers
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

        return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size).T.float()
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Experts4bit):  # not of a linear layer
        return None
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        return dequantize_module_weight(layer).float()
    return dense(weight).float() if isinstance(weight, torch.Tensor) and dense(weight) is not weight else None


@torch.no_grad()
def dequantized(
    model: Any, dtype: torch.dtype, keep: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight
) -> Any:
    """Replace quantized layers and experts by ordinary ones of `dtype`, one at a time; return the model.

    Args:
        model: the model; it is changed.
        dtype: dtype of all weights.
        keep: called with each new weight of a layer, (outputs, inputs); returns the tensor to keep it in.
    """
    unpack(model, dtype)
    for name, layer in [*model.named_modules()]:
        if (weight := weight_of(layer)) is None:
            continue
        with torch.device("meta"):
            ordinary = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, dtype=dtype)
        ordinary.weight = torch.nn.Parameter(keep(weight.to(dtype)))
        if layer.bias is not None:
            ordinary.bias = torch.nn.Parameter(layer.bias.data.to(dtype))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, ordinary)
    del model.config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    return model.to(dtype)


@torch.no_grad()
def round_weights(model: Any, quantized: Any) -> None:
    """Let a model compute as bitsandbytes does: with the weights that it stores, for the layers that it replaced in
    `quantized`, and with what goes into 8-bit layers rounded too.

    Args:
        model: the model before quantization; it is changed.
        quantized: the model that bitsandbytes made of it; of its layers only the settings are read.
    """
    for name, layer in quantized.named_modules():
        if not isinstance(layer, Linear4bit | Linear8bitLt):
            continue
        plain, settings = model.get_submodule(name), cast(Any, layer.weight)
        weight = plain.weight.data.T.contiguous() if isinstance(plain, Conv1D) else plain.weight.data
        if isinstance(layer, Linear4bit):
            packed, state = functional.quantize_4bit(
                weight,
                blocksize=settings.blocksize,
                compress_statistics=settings.compress_statistics,
                quant_type=settings.quant_type,
            )
            rounded = functional.dequantize_4bit(packed, state)
        else:
            rows, scales, _ = functional.int8_vectorwise_quant(weight.half())
            rounded = functional.int8_vectorwise_dequant(rows, scales)
            plain.register_forward_pre_hook(_input_rounding(layer.state.threshold))
        rounded = rounded.to(weight.dtype)
        plain.weight.data = rounded.T.contiguous() if isinstance(plain, Conv1D) else rounded


def _input_rounding(threshold: float) -> Callable[[Any, Any], Any]:
    """Return a hook that rounds a layer's input row by row to 8 bits, but for columns with values above `threshold`."""

    def rounded(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (exact,) = inputs
        flat = exact.reshape(-1, exact.shape[-1]).half()
        rows, scales, outliers = functional.int8_vectorwise_quant(flat.clone(), threshold=threshold)
        values = functional.int8_vectorwise_dequant(rows, scales).half()
        if outliers is not None:
            values[:, outliers] = flat[:, outliers]
        return (values.reshape(exact.shape).to(exact.dtype),)

    return rounded


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a tensor of a special class (torchao, Quanto, experts in 4 bits) to an ordinary one, if it is one."""
    if isinstance(tensor, Experts4bit):
        return tensor.dense()
    return tensor.dequantize() if type(tensor).__module__.startswith(_TENSOR_CLASSES) else tensor


def torchao_config(weights: str | None) -> Any:
    """Return torchao's config for weights stored as int8 or float8, with a scale for each row."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return Int8WeightOnlyConfig() if weights == "int8" else Float8WeightOnlyConfig()
