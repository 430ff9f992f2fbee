"""Copy a model without its weights: a job that adapts its copy leaves the others alone."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_exp.libraries.bitsandbytes import constants, take_scales
from qlora_exp.libraries.torch import times_changed
from qlora_exp.utils.errors import ConfigError


class SharedBase:
    """Base model whose weights several jobs share, each in a copy of its modules and configs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.requires_grad_(False)
        take_scales(model)
        self._before = self._versions()

    def copy(self) -> PreTrainedModel:
        """Return a model with modules and configs of its own, and with the parameters and buffers of this one."""
        shared = {id(thing): thing for thing in _weights(self._model)}
        return copy.deepcopy(self._model, shared)

    def check(self) -> None:
        """Check that no job has changed a weight, or trains one.

        Raises:
            ConfigError: one has.
        """
        if self._versions() != self._before:
            raise ConfigError(
                "a job changes weights of the base model that it shares with others; run it with sweep.fuse=off"
            )

    def _versions(self) -> list[tuple[int, int, bool]]:
        """Return where each parameter is, how often it was changed in place, and whether it is trained."""
        return [(each.data_ptr(), times_changed(each), each.requires_grad) for each in self._model.parameters()]


def _weights(model: torch.nn.Module) -> Iterator[Any]:
    """Yield every tensor of a model, and the constants that bitsandbytes keeps beside its tensors."""
    yield from (*model.parameters(), *model.buffers())
    for owner in (*model.parameters(), *model.modules()):
        yield from constants(owner)
