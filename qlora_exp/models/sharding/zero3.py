"""Divide a model over the processes of a run, with DeepSpeed's ZeRO-3. Needs the extra `deepspeed`.

Each process keeps a part of every parameter, of its gradient and of its optimizer state; whole parameters exist only
while their layer computes. Outside of that a parameter is empty.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch.optim import Optimizer

from qlora_exp.environment.ranks import ranks
from qlora_exp.libraries.deepspeed import library

_BUCKET = 16_000_000
"""Values that are gathered ahead of their layer, and values of gradients that are reduced together."""


def is_partitioned(parameter: Any) -> bool:
    """Return whether `partition` was applied to a parameter."""
    return hasattr(parameter, "ds_id")


def partition(model: Any, optimizer: Optimizer, device: str, max_grad_norm: float, cpu_offload: bool = False) -> Any:
    """Divide a model in place.

    Parameters keep their dtypes, so that the arithmetic is that of one process. The optimizer stays the same object,
    and saves and loads whole states as that of a single process does: all processes must then ask for its state
    dictionary. It steps in `step`; its own `step` does nothing.

    Args:
        model: a model that is complete, with its adapter.
        optimizer: a new optimizer of its trainable parameters.
        device: type of the device that computes.
        max_grad_norm: norm to clip gradients to; 0: no clipping.
        cpu_offload: keep the parts in the CPU's memory, and the optimizer's work there.

    Returns:
        DeepSpeed's engine: the model to call in training.
    """
    groups = [*optimizer.param_groups]
    members = [[*group["params"]] for group in groups]
    trained = [parameter for parameters in members for parameter in parameters]
    offload = {"device": "cpu", "pin_memory": device == "cuda"}
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's messages only
        "managed_gradient_accumulation": False,  # the trainer calls `step` when a batch is complete
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would have to be compiled
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,  # DeepSpeed gathers small ones of several dtypes wrongly
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": _BUCKET,
            "reduce_bucket_size": min(_BUCKET, sum(parameter.numel() for parameter in trained)),
            **({"offload_param": offload, "offload_optimizer": offload} if cpu_offload else {}),
        },
    }
    for parameter in model.parameters():
        if (constants := getattr(parameter, "quant_state", None)) is not None:  # bitsandbytes' own are not divided
            constants.to(device)
    deepspeed = library(device)
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)  # else the GPU would first get the whole model
    for buffer in model.buffers():
        buffer.data = buffer.to(device)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    # DeepSpeed drops groups without parameters, which the optimizer of a single process saves too.
    kept = [number for number, parameters in enumerate(members) if parameters]
    zero = engine.optimizer
    zero.sub_group_to_group_id = {part: kept[group] for part, group in zero.sub_group_to_group_id.items()}
    optimizer.param_groups[:] = groups
    _States(optimizer, zero, trained, [len(parameters) for parameters in members])
    model.register_load_state_dict_pre_hook(_take_parts)
    return engine


def step(engine: Any) -> float:
    """Clip the gradients and update the parameters; return the gradients' norm before."""
    engine.step()
    zero = engine.optimizer
    norm = math.nan if zero.overflow else float(engine.get_global_grad_norm())
    # DeepSpeed would use them again for a parameter that gets no gradient in the next step.
    zero.grad_partitions_flat_buffer.zero_()
    for flat in zero.fp32_partitioned_groups_flat:
        if flat.grad is not None:  # with cpu_offload
            flat.grad.zero_()
            zero.norm_for_param_grads.clear()
    return norm


def whole(parameter: Any) -> torch.Tensor:
    """Return a copy of a whole parameter; all processes must call it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _take_parts(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the parts of whole tensors that are loaded into a partitioned model."""
    from deepspeed.utils import safe_set_local_fp32_param

    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = state_dict.get(prefix + name)
        if value is not None and value.shape == parameter.ds_shape:  # else a mismatch, which torch reports
            parameter.ds_tensor.data.copy_(_part(value, parameter))
            if parameter.requires_grad:
                safe_set_local_fp32_param(parameter, _part(value, parameter))
            state_dict[prefix + name] = parameter.detach()


def _part(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Return this process's part of a whole value, padded as DeepSpeed pads the last one."""
    size = parameter.ds_tensor.numel()
    begin = ranks().rank * size
    part = value.flatten()[begin : begin + size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))


class _States:
    """Hooks that gather the states of an optimizer when it is saved, and divide them when it is loaded.

    DeepSpeed's optimizer has one flat parameter for many of the model, and between steps none at all.
    """

    def __init__(self, optimizer: Optimizer, zero: Any, trained: list[Any], sizes: list[int]) -> None:
        self._zero, self._sizes = zero, sizes
        self._numbers = {id(parameter): number for number, parameter in enumerate(trained)}
        self._loaded: dict[int, dict[str, Any]] = {}
        optimizer.register_state_dict_pre_hook(self._before_saving)
        optimizer.register_state_dict_post_hook(self._gather)
        optimizer.register_load_state_dict_pre_hook(self._before_loading)
        optimizer.register_load_state_dict_post_hook(self._divide)

    def _flat(self) -> Iterator[tuple[int, torch.Tensor, list[Any]]]:
        """Yield each flat parameter with the number of its group and the parameters of the model in it."""
        for number, (flat, parameters) in enumerate(
            zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True)
        ):
            yield self._zero.sub_group_to_group_id[number], flat, parameters

    def _before_saving(self, optimizer: Optimizer) -> None:
        for group, flat, _ in self._flat():
            optimizer.param_groups[group]["params"].append(flat)

    def _gather(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        states: dict[int, dict[str, Any]] = {}
        for group in optimizer.param_groups:
            group["params"] = []
        for _, flat, parameters in self._flat():
            for parameter in parameters:
                state = dict(optimizer.state.get(flat, {}))
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and value.shape == flat.shape:
                        full = safe_get_full_optimizer_state(parameter, name)
                        state[name] = full.cpu().clone() if ranks().is_main else full.new_empty(0)
                    else:  # each parameter counts its own steps
                        state[name] = deepcopy(value)
                if state:
                    states[self._numbers[id(parameter)]] = state
        numbers = iter(range(sum(self._sizes)))
        groups = [
            {**group, "params": [next(numbers) for _ in range(size)]}
            for group, size in zip(state_dict["param_groups"], self._sizes, strict=True)
        ]
        return {**state_dict, "state": dict(sorted(states.items())), "param_groups": groups}

    def _before_loading(self, _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if [len(group["params"]) for group in state_dict["param_groups"]] != self._sizes:
            raise ValueError("loaded state dict has other groups of parameters than this optimizer")
        self._loaded = state_dict["state"]
        return {"state": {}, "param_groups": [{**group, "params": []} for group in state_dict["param_groups"]]}

    def _divide(self, optimizer: Optimizer) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        for _, flat, parameters in self._flat():
            for parameter in parameters:
                for name, value in self._loaded.get(self._numbers[id(parameter)], {}).items():
                    if isinstance(value, torch.Tensor) and value.shape == parameter.ds_shape:
                        optimizer.state[flat].setdefault(name, torch.zeros_like(flat, requires_grad=False))
                        safe_set_local_optimizer_state(parameter, _part(value.to(flat.device), parameter), name)
                    else:
                        optimizer.state[flat][name] = deepcopy(value)
        self._loaded = {}
