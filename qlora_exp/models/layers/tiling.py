"""Compute what acts on each token alone in tiles of tokens, so that a long row needs the memory of one tile there.

Of a decoder layer that is its MLP and its norms. A tile is checkpointed (`torch.utils.checkpoint`, also inside a layer
that is): the backward pass computes it again when it needs it, and gradients are those of the whole row up to rounding.
Source: Arctic Long Sequence Training (Bekman et al. 2025, https://arxiv.org/abs/2506.13996).
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from qlora_exp.models.trained import layers_of
from qlora_exp.utils.errors import ConfigError

TILES = 16
"""Most tiles of a row. More of them would save little: the rest of a layer needs more memory than one."""
LEAST = 1024
"""Tokens of the smallest tile, of all rows together: products of fewer are slower."""
_MLP = re.compile(r"(?:.*_)?(?:mlp|ffn?|feed_?forward)(?:_block)?")
_NORM = re.compile(r"\w*(?:RMS|Layer)Norm\w*")


def check(model: Any) -> None:
    """Check that tiles of tokens can be computed in this model; its weights are not used.

    Raises:
        ConfigError: a layer has no MLP that acts on each token alone.
    """
    kind = model.config.model_type
    for place, layer in enumerate(layers_of(model)):
        if not (blocks := _mlps(layer)):
            raise ConfigError(
                f"training.tiled_mlp: layer {place} of this model ({kind}) has no MLP of its own; use "
                "training.tiled_mlp=false"
            )
        if any("expert" in name for block in blocks for name, _ in block.named_modules()):
            raise ConfigError(
                f"training.tiled_mlp: layer {place} of this model ({kind}) is a mixture of experts, whose router has a "
                "loss over all tokens; use training.tiled_mlp=false"
            )


def tile(model: Any) -> None:
    """Let the model compute MLPs and norms of longer rows in tiles, in training and in evaluation.

    Args:
        model: the model, with or without an adapter; `check` accepts it.

    Raises:
        ConfigError: see `check`.
    """
    check(model)
    layers = layers_of(model)
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and layers[0] in [*module]]
    decoder = next(module for module in model.modules() if lists[0] in [*module.children()])
    norms = (module for module in decoder.modules() if _NORM.fullmatch(type(module).__name__))
    for module in dict.fromkeys([*(block for layer in layers for block in _mlps(layer)), *norms]):
        module.forward = _in_tiles(module.forward)


def _mlps(layer: torch.nn.Module) -> list[torch.nn.Module]:
    return [child for name, child in layer.named_children() if _MLP.fullmatch(name) and [*child.parameters()]]


def _in_tiles(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function that computes the same in tiles of tokens, each with those of all rows.

    Args:
        compute: function of tensors of shape (rows, length, ...), and of settings.
    """

    def on_part(*parts: torch.Tensor, **settings: Any) -> torch.Tensor:
        return compute(*(part.contiguous() for part in parts), **settings)  # GPT-2's layers take no other

    def computed(*inputs: torch.Tensor, **settings: Any) -> torch.Tensor:
        rows, length = inputs[0].shape[:2]
        part = max(-(-length // TILES), -(-LEAST // rows))
        if inputs[0].ndim < 3 or length <= part:
            return compute(*inputs, **settings)
        tiles = zip(*(tensor.split(part, dim=1) for tensor in inputs), strict=True)
        return torch.cat([_recomputed(on_part, *tile, **settings) for tile in tiles], dim=1)

    return computed


def _recomputed(compute: Callable[..., torch.Tensor], *inputs: torch.Tensor, **settings: Any) -> torch.Tensor:
    output: torch.Tensor = checkpoint(compute, *inputs, use_reentrant=False, **settings)
    return output
