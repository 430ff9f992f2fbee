"""Shard a model over the processes of a run, with torch's FSDP2 (`fully_shard`), in the same way on CPUs and GPUs.

Each process keeps a part of every parameter, of its gradient and of its optimizer state; a layer's whole parameters
exist only while it computes. Outside of a forward or backward pass a sharded model has parts only (`DTensor`), also in
its state dictionary. Every forward pass is a collective operation: all processes must run as many.
"""

from collections import Counter
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_exp.environment.ranks import ranks
from qlora_exp.models.sharding import zero3
from qlora_exp.utils.errors import ConfigError


def is_sharded(model: Any) -> bool:
    """Return whether `shard` or `zero3.partition` was applied to a model: then each process has parts of it."""
    return isinstance(model, FSDPModule) or any(map(zero3.is_partitioned, model.parameters()))


def shard(model: Any, device: str, cpu_offload: bool = False) -> None:
    """Shard a model in place: each transformer layer by itself, the rest together with the model.

    Parameters keep their dtypes, so that the arithmetic is that of one process: autocast computes as it does there.

    Args:
        model: a model that is complete, with its adapter.
        device: type of the device that computes.
        cpu_offload: keep the parts in the CPU's memory, and the optimizer's work there.

    Raises:
        ConfigError: FSDP cannot shard this model.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    _check(model, layers)
    mesh = init_device_mesh(device, (ranks().size,))
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for module in [*reversed(layers), model]:  # inner ones first
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=offload)
    # Generation computes outside of the model's own forward pass: input embeddings, trained prompts.
    register_fsdp_forward_method(model, "generate")
    model.register_load_state_dict_pre_hook(_take_parts)
    parts = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    if not all(parts) or not all(map(is_sharded, layers)):
        raise ConfigError(f"distributed=fsdp: {parts.count(False)} of {len(parts)} parameters are not sharded")


def _check(model: Any, layers: list[Any]) -> None:
    """Check what `fully_shard` would fail on later, or in unclear words."""
    if not layers:
        raise ConfigError("distributed=fsdp: this model has no transformer layers to shard; use distributed=ddp")
    units = [{*layer.parameters()} for layer in layers]
    uses = Counter(parameter for unit in units for parameter in unit)
    if any(count > 1 for count in uses.values()):
        raise ConfigError("distributed=fsdp: this method shares parameters between layers; use distributed=ddp")
    for unit in [*units, {*model.parameters()} - {*uses}]:
        if len(dtypes := {str(parameter.dtype) for parameter in unit if parameter.requires_grad}) > 1:
            raise ConfigError(
                f"distributed=fsdp: a layer trains parameters in {' and '.join(sorted(dtypes))}, and FSDP reduces the "
                "gradients of a layer in one dtype; set method.adapter_dtype and model.dtype to the same"
            )


def whole_weights(model: Any, parameters: set[str]) -> dict[str, torch.Tensor]:
    """Return a sharded model's state dictionary with whole tensors on the CPU; all processes must call it.

    Args:
        model: the sharded model.
        parameters: names of the parameters to return.

    Returns:
        The tensors, and the model's buffers, in the main process; nothing in the others.
    """
    whole: dict[int, torch.Tensor] = {}  # tied weights once
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, DTensor) and not zero3.is_partitioned(tensor):
            state[name] = tensor.detach().cpu()
        elif name in parameters:
            if id(tensor) not in whole:
                whole[id(tensor)] = _on_main(tensor)
            state[name] = whole[id(tensor)]
    return state if ranks().is_main else {}


def _on_main(part: Any) -> torch.Tensor:
    """Return the whole tensor in the main process, on the CPU; an empty one in the others."""
    whole = zero3.whole(part) if zero3.is_partitioned(part) else part.detach().full_tensor()
    return whole.cpu() if ranks().is_main else whole.new_empty(0)


def save_whole_states(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer of a sharded model save whole states, as that of a single process does, and load them.

    All processes must then ask for its state dictionary.
    """
    optimizer.register_state_dict_post_hook(_gather_states)
    optimizer.register_load_state_dict_pre_hook(_part_states)


def _gather_states(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    states = {
        key: {name: _on_main(value) if isinstance(value, DTensor) else value for name, value in state.items()}
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def _part_states(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_key = dict(zip(keys, parameters, strict=True))
    states = {
        key: {name: _part(value, of_key[key]) for name, value in state.items()}
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def _take_parts(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace whole tensors that are loaded into a sharded model by this process's parts of them."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (value := state_dict.get(prefix + name)) is not None:
            state_dict[prefix + name] = _part(value, parameter)


def _part(value: Any, like: Any) -> Any:
    if not isinstance(value, torch.Tensor) or isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    if value.shape != like.shape:  # a step counter, or a mismatch that the caller reports
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
