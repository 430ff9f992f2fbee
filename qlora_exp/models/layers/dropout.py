"""Dropout whose random numbers cost a CPU little.

Torch draws a number of 32 bits for each element, one after another. Here eight elements share a number of 64 bits:
forward and backward pass take a third of the time.
"""

from typing import Any

import numpy as np
import torch

from qlora_exp.libraries.torch import is_fake

_BYTE = 256


def keep_mask(shape: torch.Size, p: float) -> torch.Tensor:
    """Draw which elements are kept: each with probability `1 - p`, independently of all others.

    An element has a random byte. Where it is above `256 * p` the element is kept, below it is dropped; where it is the
    byte that `256 * p` falls into, one in 256, a further random number decides. So the probability is exactly that of
    torch's dropout, to 32 bits. All numbers come from torch's random state of the CPU.

    Args:
        shape: shape of the tensor.
        p: probability of being dropped, in (0, 1).

    Returns:
        Boolean tensor of that shape, on the CPU.
    """
    count = shape.numel()
    drawn = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None)
    values = drawn.view(torch.uint8)[:count].numpy()
    whole, part = divmod(_BYTE * p, 1.0)
    keep = values >= np.uint8(whole)
    if part:
        undecided = np.flatnonzero(values == np.uint8(whole))
        keep[undecided] = torch.rand(len(undecided)).numpy() >= part
    return torch.from_numpy(keep).view(shape)


class _Dropped(torch.autograd.Function):
    """`x * keep / (1 - p)`, which keeps one byte for each element until the backward pass, as a GPU's dropout does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        keep = torch.empty(x.shape, dtype=torch.bool) if is_fake(x) else keep_mask(x.shape, p)
        ctx.save_for_backward(keep)
        ctx.p = p
        return _scaled(x, keep, p)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _scaled(gradient, keep, ctx.p), None


def _scaled(x: torch.Tensor, keep: torch.Tensor, p: float) -> torch.Tensor:
    """Multiply as torch's dropout does, with the same rounding."""
    return keep.view(torch.uint8).to(x.dtype).div_(1 - p).mul_(x)


class CpuDropout(torch.nn.Dropout):
    """Dropout with the distribution of `torch.nn.Dropout`, but other random numbers; on a CPU several times as fast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the input with elements dropped, in training."""
        if not self.training or not 0 < self.p < 1 or self.inplace or input.device.type != "cpu":
            return super().forward(input)
        return _Dropped.apply(input, self.p)


def on_cpu(model: torch.nn.Module) -> None:
    """Replace all `torch.nn.Dropout` layers of a model that is trained on a CPU, the base model's and the adapter's."""
    for module in [*model.modules()]:
        for name, layer in module.named_children():
            if type(layer) is torch.nn.Dropout:
                setattr(module, name, CpuDropout(layer.p, layer.inplace).train(layer.training))
