"""Represent quantized weights without values, for plans: shapes and sizes as bitsandbytes stores them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import QuantState

from qlora_exp.config.sections.quantization import QuantizationConfig
from qlora_exp.environment.device import Resolved
from qlora_exp.libraries.bitsandbytes import keep_trainable
from qlora_exp.libraries.transformers import with_bitsandbytes_layers
from qlora_exp.models.layers.experts import BLOCK, Experts4bit, pack_meta
from qlora_exp.models.quantization import check_stored, quantization_config, stored
from qlora_exp.utils.errors import ConfigError


def quantize_meta(model: Any, quantization: QuantizationConfig, resolved: Resolved) -> None:
    """Give a model on the meta device the shapes and dtypes of its quantized weights, to compute its memory.

    Raises:
        ConfigError: this quantization cannot be planned.
        ModelError: it would leave most of the model as it is.
    """
    if not quantization.quantized:
        return
    if not quantization.bitsandbytes:
        raise ConfigError(f"quantization={quantization.name} cannot be planned yet: choose nf4_double or int8")
    with_bitsandbytes_layers(model, quantization_config(quantization, resolved))
    pack_meta(model, quantization)
    check_stored(model.config.name_or_path, quantization, stored(model), getattr(torch, resolved.dtype))
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.weight = Params4bit(module.weight, getattr(torch, resolved.dtype), quantization)
            keep_trainable(module)
            # DoRA needs the layer's values. PEFT calls `dequantize` of any layer with a `W_q` (meant for HQQ layers).
            module.W_q, module.dequantize = module.weight, partial(_empty_values, module.weight)
        elif type(module).__name__ == "Linear8bitLt":
            module.weight = Int8Params(module.weight)
            module.state.threshold = 0.0  # the number of outliers depends on values, which a plan does not have
    model.is_quantized = True
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantization.load_in_4bit, quantization.load_in_8bit


def _empty_values(weight: Any) -> torch.Tensor:
    return torch.empty(weight.shape_of_values, dtype=weight.dtype_of_values)


class _Packed(torch.nn.Parameter):
    """Weight as bitsandbytes stores it, without values."""

    shape_of_values: torch.Size
    dtype_of_values: torch.dtype
    quant_type: str
    compress_statistics: bool
    bnb_quantized: bool
    CB: torch.Tensor
    SCB: torch.Tensor


class Params4bit(_Packed):
    """Packed 4-bit weight without values; bitsandbytes' own class would quantize values. PEFT checks the class name."""

    def __new__(cls, weight: torch.Tensor, dtype: torch.dtype, quantization: QuantizationConfig) -> "Params4bit":
        """Create a weight with the unpacked weight's shape and device, and the dtype it had before quantization."""
        packed = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8, device=weight.device)
        parameter = packed.as_subclass(cls)
        parameter.shape_of_values, parameter.dtype_of_values = weight.shape, dtype
        parameter.quant_type = quantization.bnb_4bit_quant_type
        parameter.compress_statistics = quantization.bnb_4bit_use_double_quant
        parameter.bnb_quantized = True
        return parameter

    def __deepcopy__(self, _memo: Any) -> "Params4bit":  # PEFT's DoRA copies layers
        copy = self.data.clone().as_subclass(Params4bit)
        vars(copy).update(vars(self))
        return copy

    def filled(self, empty: Callable[..., torch.Tensor]) -> torch.nn.Parameter:
        """Return the weight as it is after loading, with tensors made by `empty(*shape, dtype=...)`."""
        count = math.prod(self.shape_of_values)
        blocks = -(-count // BLOCK)
        weight: Any = torch.nn.Parameter(empty(*self.shape, dtype=torch.uint8), False)
        vars(weight).update(vars(self))
        state = {"shape": self.shape_of_values, "blocksize": BLOCK, "quant_type": self.quant_type}
        constants: dict[str, Any] = {"absmax": empty(blocks, dtype=torch.float32)}
        if self.compress_statistics:
            inner = QuantState(empty(-(-blocks // 256), dtype=torch.float32), blocksize=256, code=empty(256))
            inner.dtype = torch.float32
            constants = {"absmax": empty(blocks, dtype=torch.uint8), "offset": empty(()), "state2": inner}
        weight.quant_state = QuantState(**constants, **state, code=empty(16), dtype=self.dtype_of_values)
        return weight


class Int8Params(_Packed):
    """Int8 weight without values. PEFT checks the class name."""

    def __new__(cls, weight: torch.Tensor) -> "Int8Params":
        """Create a weight with the unquantized weight's shape and device."""
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        parameter = values.as_subclass(cls)
        parameter.CB = values
        parameter.SCB = torch.empty(weight.shape[0], device=weight.device)
        return parameter

    def filled(self, empty: Callable[..., torch.Tensor]) -> torch.nn.Parameter:
        """Return the weight as it is after loading, with tensors made by `empty(*shape, dtype=...)`."""
        weight: Any = torch.nn.Parameter(empty(*self.shape, dtype=torch.int8), False)
        weight.CB, weight.SCB = weight.data, empty(self.shape[0], dtype=torch.float32)
        return weight


class _FirstOfAll(Experts4bit):
    """The first of experts in 4 bits, for which all are dequantized."""

    alone = False


def first_product(tokens: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Return the product of tokens, (tokens, rows), with the first of experts, (experts, rows, columns).

    It allocates what the grouped product of all experts does, also in the backward pass.
    """
    if not isinstance(experts, Experts4bit):
        return tokens @ experts[0]
    stored = experts.parts, experts.whole, experts.stored_dtype, experts.quant_type
    return tokens @ _FirstOfAll(*stored, expert=0, transposed=experts.transposed, dtype=experts.dtype)


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors with storages that a tensor consists of: itself, or what experts in 4 bits are stored as."""
    return [*tensor.parts.values()] if isinstance(tensor, Experts4bit) else [tensor]


def stored_bytes(parameter: torch.Tensor) -> list[int] | None:
    """Return the bytes of a bitsandbytes weight: its values, then each kind of constants; None for other tensors."""
    if isinstance(parameter, Experts4bit):
        return [part.nbytes for part in parts_of(parameter)]
    if isinstance(parameter, Params4bit):
        blocks = -(-math.prod(parameter.shape_of_values) // BLOCK)
        return [
            parameter.numel(),
            *([blocks, 4 * -(-blocks // 256)] if parameter.compress_statistics else [4 * blocks]),
        ]
    if isinstance(parameter, Int8Params):
        return [parameter.numel(), 4 * parameter.shape[0]]
    return None
