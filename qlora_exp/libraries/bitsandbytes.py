"""Wrap bitsandbytes' private parts. Checked on bitsandbytes 0.50.2."""

import math
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from bitsandbytes.autograd._functions import MatmulLtState
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt


def keep_trainable(module: torch.nn.Module) -> None:
    """Prevent a bitsandbytes layer from losing its gradient or its scales; leave other modules unchanged.

    4 bits (`Linear4bit.support_avx512bf16_for_cpu`): on CPUs with AVX512-BF16 the first forward in eval mode repacks
    the weights for inference; later training forwards then take a path without autograd, and the gradient through every
    base layer is silently lost.
    8 bits (`Linear8bitLt.state.SCB`): PEFT's DoRA moves the weight to the device it is on, which loses its scales, and
    the next forward fails.
    """
    if isinstance(module, Linear4bit):
        module.support_avx512bf16_for_cpu = False
    elif isinstance(module, Linear8bitLt):
        module.register_forward_pre_hook(_restore_scales)


def _restore_scales(module: Any, _arguments: Any) -> None:
    if module.weight.CB is not None and module.weight.SCB is None:
        module.weight.SCB = module.state.SCB


@cache
def dequantize_every_width() -> None:
    """Let bitsandbytes dequantize 4-bit weights on a CPU whose rows are no whole number of blocks.

    Its kernel takes other blocks' constants then: weights that were rounded by 9 % of their norm are off by 20 to 40 %.
    The same values in one long row are right. Replaces the kernel of `bitsandbytes::dequantize_4bit` for CPUs.
    """
    kernel = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")

    def dequantize(keys: Any, packed: Any, absmax: Any, block: int, kind: str, shape: Any, dtype: Any) -> Any:
        rows = [math.prod(shape)] if shape[-1] % block else shape
        return kernel.call_boxed(keys, packed, absmax, block, kind, rows, dtype).reshape(shape)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the replacement
        _KERNELS.impl("dequantize_4bit", dequantize, "CPU", with_keyset=True, allow_override=True)


_KERNELS = torch.library.Library("bitsandbytes", "IMPL")  # its kernels last as long as it


def take_scales(model: torch.nn.Module) -> None:
    """Let 8-bit layers take their scales from their weights (`Linear8bitLt.init_8bit_state`).

    A layer does so at its first forward, and the weight has none then. Another layer with the same weight would take
    its whole numbers for weights, and quantize them once more.
    """
    layers: Iterator[Any] = (module for module in model.modules() if isinstance(module, Linear8bitLt))
    for layer in layers:
        if layer.weight.CB is not None:
            layer.init_8bit_state()


def constants(owner: Any) -> Iterator[Any]:
    """Yield what a layer or its weight keeps to dequantize: tensors and `QuantState`s.

    An 8-bit layer has them in its `state`, a `bitsandbytes.autograd._functions.MatmulLtState`.
    """
    for value in vars(owner).values():
        if isinstance(value, torch.Tensor | QuantState):
            yield value
        elif isinstance(value, MatmulLtState):
            yield from (each for each in vars(value).values() if isinstance(each, torch.Tensor))
