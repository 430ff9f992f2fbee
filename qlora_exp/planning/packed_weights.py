"""Quantized weights without values, for plans: shapes and sizes as bitsandbytes stores them."""

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
from qlora_exp.models.quantization import BLOCK, quantization_config
from qlora_exp.utils.errors import ConfigError


def quantize_meta(model: Any, quantization: QuantizationConfig, resolved: Resolved) -> None:
    """Make a model on the meta device what it would be stored as, for working out what it takes.

    Raises:
        ConfigError: this is not known for the quantization.
    """
    if not quantization.quantized:
        return
    if not quantization.bitsandbytes:
        raise ConfigError(f"quantization={quantization.name} cannot be planned yet: choose nf4_double or int8")
    with_bitsandbytes_layers(model, quantization_config(quantization, resolved))
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.weight = Params4bit(module.weight, getattr(torch, resolved.dtype), quantization)
            keep_trainable(module)
            # DoRA asks for the values in a way that PEFT has for layers with a `W_q` (HQQ's), whatever their weight is.
            module.W_q, module.dequantize = module.weight, partial(_empty_values, module.weight)
        elif type(module).__name__ == "Linear8bitLt":
            module.weight = Int8Params(module.weight)
            module.state.threshold = 0.0  # how many outliers there are is known when there are values
    model.is_quantized = True
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantization.load_in_4bit, quantization.load_in_8bit


def _empty_values(weight: Any) -> torch.Tensor:
    return torch.empty(weight.shape_of_values, dtype=weight.dtype_of_values)


class _Packed(torch.nn.Parameter):
    """A weight as bitsandbytes stores it, without values."""

    shape_of_values: torch.Size
    dtype_of_values: torch.dtype
    quant_type: str
    compress_statistics: bool
    bnb_quantized: bool
    CB: torch.Tensor
    SCB: torch.Tensor


class Params4bit(_Packed):
    """A packed weight without values, where bitsandbytes' own would quantize some; PEFT knows it by its name."""

    def __new__(cls, weight: torch.Tensor, dtype: torch.dtype, quantization: QuantizationConfig) -> "Params4bit":
        """Of the unpacked weight's shape and device, and of its dtype when it was quantized."""
        packed = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8, device=weight.device)
        parameter = packed.as_subclass(cls)
        parameter.shape_of_values, parameter.dtype_of_values = weight.shape, dtype
        parameter.quant_type = quantization.bnb_4bit_quant_type
        parameter.compress_statistics = quantization.bnb_4bit_use_double_quant
        parameter.bnb_quantized = True
        return parameter

    def __deepcopy__(self, _memo: Any) -> "Params4bit":  # PEFT's DoRA copies layers
        found = self.data.clone().as_subclass(Params4bit)
        vars(found).update(vars(self))
        return found

    def filled(self, empty: Callable[..., torch.Tensor]) -> torch.nn.Parameter:
        """As it is after loading, of tensors that `empty(*shape, dtype=...)` makes."""
        count = math.prod(self.shape_of_values)
        blocks = -(-count // BLOCK)
        found: Any = torch.nn.Parameter(empty(*self.shape, dtype=torch.uint8), False)
        vars(found).update(vars(self))
        state = {"shape": self.shape_of_values, "blocksize": BLOCK, "quant_type": self.quant_type}
        constants: dict[str, Any] = {"absmax": empty(blocks, dtype=torch.float32)}
        if self.compress_statistics:
            inner = QuantState(empty(-(-blocks // 256), dtype=torch.float32), blocksize=256, code=empty(256))
            inner.dtype = torch.float32
            constants = {"absmax": empty(blocks, dtype=torch.uint8), "offset": empty(()), "state2": inner}
        found.quant_state = QuantState(**constants, **state, code=empty(16), dtype=self.dtype_of_values)
        return found


class Int8Params(_Packed):
    """An int8 weight without values; PEFT knows it by its name."""

    def __new__(cls, weight: torch.Tensor) -> "Int8Params":
        """Of the unquantized weight's shape and device."""
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        parameter = values.as_subclass(cls)
        parameter.CB = values
        parameter.SCB = torch.empty(weight.shape[0], device=weight.device)
        return parameter

    def filled(self, empty: Callable[..., torch.Tensor]) -> torch.nn.Parameter:
        """As it is after loading, of tensors that `empty(*shape, dtype=...)` makes."""
        found: Any = torch.nn.Parameter(empty(*self.shape, dtype=torch.int8), False)
        found.CB, found.SCB = found.data, empty(self.shape[0], dtype=torch.float32)
        return found


def stored_bytes(parameter: torch.Tensor) -> list[int] | None:
    """Of a weight as bitsandbytes stores it: its values, then each kind of constants; None for a common tensor."""
    if isinstance(parameter, Params4bit):
        blocks = -(-math.prod(parameter.shape_of_values) // BLOCK)
        return [
            parameter.numel(),
            *([blocks, 4 * -(-blocks // 256)] if parameter.compress_statistics else [4 * blocks]),
        ]
    if isinstance(parameter, Int8Params):
        return [parameter.numel(), 4 * parameter.shape[0]]
    return None
