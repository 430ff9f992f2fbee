"""Build optimizers that transformers does not have, or builds without some of the run's settings.

Transformers passes neither weight decay nor betas to GaLore and APOLLO, and gives schedule-free optimizers a share of
all steps (`warmup_steps=0.1`) as a number of steps, which multiplies the first learning rate by ten.

Plans run the same optimizers on fake tensors. Of the config this module needs only the section `optimizer`.
"""

import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from transformers import Trainer

from qlora_exp.config.sections.optimizer import OptimizerConfig
from qlora_exp.config.tables.optimizers import OWN, PROJECTED
from qlora_exp.models.trained import adam_mini_blocks, inner_matrices, projected_weights

log = logging.getLogger(__name__)

Groups = list[dict[str, Any]]


def build(
    model: Any,
    config: OptimizerConfig,
    learning_rate: float,
    weight_decay: float,
    foreach: bool | None = None,
) -> torch.optim.Optimizer | None:
    """Build the optimizer that the config names; None leaves it to transformers.

    Args:
        model: the model whose trainable parameters it updates.
        config: the section `optimizer`.
        learning_rate: learning rate before the schedule changes it.
        weight_decay: weight decay; biases and norms have none.
        foreach: update all parameters in one operation, where AdamW lets the device decide; None: it decides.

    Raises:
        ConfigError: the optimizer has no matrix to work on.
    """
    if config.optim not in OWN:
        return None
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decaying = {*Trainer.get_decay_parameter_names(None, model)}  # type: ignore[arg-type]  # it needs no trainer

    def groups(names: Collection[str], **settings: Any) -> Groups:
        kinds = [[trained[name] for name in names if (name in decaying) is decays] for decays in (True, False)]
        decays = weight_decay, 0.0
        return [
            {"params": params, "weight_decay": decay, **settings}
            for params, decay in zip(kinds, decays, strict=True)
            if params
        ]

    optimizer: torch.optim.Optimizer
    adam: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    settings: Any = config.optim_args
    if config.optim in PROJECTED:
        targets = projected_weights(model, config)
        rest = groups([name for name in trained if name not in targets])
        chosen = _DEFAULTS[config.optim] | settings
        if small := [name for name in targets if min(trained[name].shape) <= chosen["rank"]]:
            message = "optimizer.optim_args.rank=%d saves nothing in %d of %d matrices, which are no larger (%s, ...)"
            log.warning(message, chosen["rank"], len(small), len(targets), small[0])
        rest += groups(targets, **chosen)
        return _projecting(config.optim)(rest, lr=learning_rate, **adam)
    if config.optim == "muon":
        matrices = inner_matrices(model)
        rest = groups([name for name in trained if name not in matrices])
        muon = torch.optim.Muon(groups(matrices), lr=learning_rate, **settings)
        return MuonAndAdamW(muon, torch.optim.AdamW(rest, lr=learning_rate, foreach=foreach, **adam) if rest else None)
    if config.optim == "adam_mini":
        optimizer = _adam_mini(model, lr=learning_rate, **adam)
        for name, group in zip(trained, optimizer.param_groups, strict=True):
            group["weight_decay"] = weight_decay if name in decaying else 0.0
        return optimizer
    if config.optim == "schedule_free_sgd":
        adam = {}
    optimizer = _imported(config.optim)(groups(trained), lr=learning_rate, **adam, **settings)
    return optimizer


_PROJECTION = {"rank": 128, "update_proj_gap": 200, "proj_type": "std"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "galore_adamw": {**_PROJECTION, "scale": 0.25},
    "apollo_adamw": {**_PROJECTION, "scale": 1.0, "proj": "random", "scale_type": "channel"},
}
"""Transformers' settings of projections, which the optimizers need all."""


def _projecting(optim: str) -> Any:
    """Return GaLore's or APOLLO's class, or a function that makes one; checkpoints may have their projectors."""
    if optim == "galore_adamw":
        from qlora_exp.training.galore import galore_adamw

        return galore_adamw
    from apollo_torch import APOLLOAdamW
    from apollo_torch.random_projector import GradientProjector
    from apollo_torch.svd_projector import GaLoreProjector

    torch.serialization.add_safe_globals([GradientProjector, GaLoreProjector])
    return APOLLOAdamW


def _adam_mini(model: Any, **settings: Any) -> torch.optim.Optimizer:
    """Return Adam-mini with the blocks that `adam_mini_blocks` chooses, one group for each trained parameter.

    Its package chooses blocks by parts of parameters' names, and takes names that it does not know for one block. So it
    gets a name of each kind in the place of those of the model.
    """
    from qlora_exp.libraries.adam_mini import optimizer_class

    blocks, head = adam_mini_blocks(model)
    names = {"head": "query", "row": "mlp", "whole": "norm", "value": "bias"}
    parameters = dict(model.named_parameters())
    named = [(names[kind], parameters[name]) for name, kind in blocks.items()]
    optimizer: Any = optimizer_class()(named, verbose=False, **settings)
    optimizer.head_numel = head  # its own assumes heads that make up the hidden size
    optimizer.check_block_name = False
    optimizer.world_size = 1  # it takes all GPUs of a machine for processes that share parameters
    return optimizer


def _imported(optim: str) -> Any:
    match optim:
        case "adamw_torch_8bit":
            from torchao.optim import AdamW8bit as Kind
        case "adamw_torch_4bit":
            from torchao.optim import AdamW4bit as Kind
        case "schedule_free_adamw":
            from schedulefree import AdamWScheduleFree as Kind
        case "schedule_free_radam":
            from schedulefree import RAdamScheduleFree as Kind
        case "schedule_free_sgd":
            from schedulefree import SGDScheduleFree as Kind
        case _:
            from optimi import StableAdamW as Kind
    return Kind


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer for schedules and checkpoints."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW | None) -> None:
        self._parts = [muon, adamw] if adamw is not None else [muon]
        self._counts = [len(part.param_groups) for part in self._parts]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both parts use this optimizer's groups and states."""
        start = 0
        for part, count in zip(self._parts, self._counts, strict=True):
            part.param_groups, part.state = self.param_groups[start : start + count], self.state
            start += count

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def step(self, closure: Any = None) -> Any:
        """Update all parameters."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes that an optimizer's states take on this process's device, each storage once."""
    seen: dict[int, int] = {}
    for tensor in _tensors(list(optimizer.state.values())):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors inside nested values: a state may be a projector, or a tensor made of several."""
    if isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        yield from _tensors([getattr(value, name) for name in names])
    elif isinstance(value, torch.Tensor):
        yield getattr(value, "_local_tensor", value)
    elif hasattr(value, "ortho_matrix"):
        yield from _tensors(value.ortho_matrix)
