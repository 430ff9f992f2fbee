"""Torch's private parts. Checked on torch 2.13.0."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch.utils import _python_dispatch, _pytree

from qlora_exp.libraries.patching import patched

FakeTensorMode = fake_tensor.FakeTensorMode
"""`torch._subclasses.fake_tensor.FakeTensorMode`: runs a model's code on shapes alone; has no public name."""

WANTS_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
)
"""Of `torch._subclasses.fake_tensor`: raised where code looks at values; they have no class in common."""

TorchDispatchMode = _python_dispatch.TorchDispatchMode
"""`torch.utils._python_dispatch.TorchDispatchMode`: sees every operation; documented only under this private name."""

tree_leaves: Callable[[Any], list[Any]] = _pytree.tree_leaves
"""`torch.utils._pytree.tree_leaves`: the tensors in an operation's nested arguments; has no public name."""

VALUE_OF_SCALAR = torch.ops.aten._local_scalar_dense.default
"""`aten::_local_scalar_dense`: the operation behind `Tensor.item`, by which code asks for a value."""

FUSED_ATTENTION = tuple(
    f"aten._scaled_dot_product_{kernel}"
    for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
)
"""`aten::_scaled_dot_product_*`: attention kernels whose arithmetic is counted; each has a `_backward` too."""

UNSAFE_VIEW = "aten._unsafe_view"
"""`aten::_unsafe_view`: an operation that moves no memory, though torch does not mark it as a view."""


def storage_address(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage object (`UntypedStorage._cdata`).

    `data_ptr` is no substitute: fake tensors have none.
    """
    return int(tensor.untyped_storage()._cdata)


def counts_gpus_without_cuda() -> bool:
    """Whether torch can count GPUs through NVML (`torch.cuda._device_count_nvml`); else it starts CUDA to do so.

    A process that is to be forked must not start CUDA, and `torch.cuda.device_count` does not say which way it took.
    """
    return torch.cuda._device_count_nvml() > 0


@contextmanager
def gpus_without_cuda(capability: tuple[int, int]) -> Iterator[None]:
    """Inside, questions about GPUs are answered without starting CUDA, after which no fork may use it.

    Torch counts GPUs through NVML (the documented PYTORCH_NVML_BASED_CUDA_CHECK), and
    `torch.cuda.get_device_capability` is replaced. bitsandbytes 0.50, which PEFT and TRL import, asks both at import,
    and uses the capability for nothing else than to see that there is a GPU.
    """
    variable = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with patched(torch.cuda, get_device_capability=lambda *_, **__: capability):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@contextmanager
def computing_as_on_gpu() -> Iterator[None]:
    """Inside, tensors on the CPU are computed with as a GPU would: what an operation keeps has the same size.

    Replaces `torch.nn.functional.layer_norm` (a GPU's autocast takes it to float32, also where a checkpointed layer is
    computed again), `torch.nn.functional.dropout` (a GPU keeps a byte a value) and `torch.is_autocast_enabled`
    (asked without a device, as PEFT does, it means CUDA; here it means the CPU).
    """
    functions = torch.nn.functional
    norm, dropout, is_autocast = functions.layer_norm, functions.dropout, torch.is_autocast_enabled

    def in_float32(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        if is_autocast("cpu"):
            x, weight, bias = (one if one is None else one.float() for one in (x, weight, bias))
        with torch.autocast("cpu", enabled=False):
            return norm(x, shape, weight, bias, eps)

    def fused_dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if inplace or not (training and p):
            return dropout(x, p, training, inplace)
        return torch.native_dropout(x, p, training)[0]

    with (
        patched(functions, layer_norm=in_float32, dropout=fused_dropout),
        patched(torch, is_autocast_enabled=lambda device="cpu": is_autocast(device)),
    ):
        yield
