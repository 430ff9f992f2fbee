"""Wrap torch's private parts. Checked on torch 2.13.0."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch.utils import _python_dispatch, _pytree

from qlora_exp.libraries.patching import patched

FakeTensorMode = fake_tensor.FakeTensorMode
"""`torch._subclasses.fake_tensor.FakeTensorMode`: runs a model's code with shapes only; has no public name."""

WANTS_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
)
"""Errors of `torch._subclasses.fake_tensor`, raised when code reads values; they have no common class."""

TorchDispatchMode = _python_dispatch.TorchDispatchMode
"""`torch.utils._python_dispatch.TorchDispatchMode`: intercepts operations; documented only under this private name."""

tree_leaves: Callable[[Any], list[Any]] = _pytree.tree_leaves
"""`torch.utils._pytree.tree_leaves`: the tensors in an operation's nested arguments; has no public name."""

VALUE_OF_SCALAR = torch.ops.aten._local_scalar_dense.default
"""`aten::_local_scalar_dense`: the operation of `Tensor.item`, which reads a value."""

FUSED_ATTENTION = tuple(
    f"aten._scaled_dot_product_{kernel}"
    for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
)
"""`aten::_scaled_dot_product_*`: attention kernels whose operations are counted; each also has a `_backward`."""

UNSAFE_VIEW = "aten._unsafe_view"
"""`aten::_unsafe_view`: an operation that moves no memory, though torch does not mark it as a view."""


def storage_address(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's storage object (`UntypedStorage._cdata`).

    `data_ptr` cannot replace it: fake tensors have none.
    """
    return int(tensor.untyped_storage()._cdata)


def counts_gpus_without_cuda() -> bool:
    """Return whether torch can count GPUs through NVML (`torch.cuda._device_count_nvml`), without initializing CUDA.

    A process that will fork must not initialize CUDA. `torch.cuda.device_count` falls back to CUDA without saying so.
    """
    return torch.cuda._device_count_nvml() > 0


@contextmanager
def gpus_without_cuda(capability: tuple[int, int]) -> Iterator[None]:
    """Answer queries about GPUs without initializing CUDA within the context; forks cannot use CUDA afterwards.

    Torch counts GPUs through NVML (the documented PYTORCH_NVML_BASED_CUDA_CHECK), and
    `torch.cuda.get_device_capability` is replaced. bitsandbytes 0.50, which PEFT and TRL import, makes both queries at
    import, and uses the capability only to check that there is a GPU.

    Args:
        capability: returned as the GPU's compute capability.
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
    """Compute on the CPU as a GPU would, within the context: an operation stores tensors of the same sizes.

    Replaces `torch.nn.functional.layer_norm` (a GPU's autocast computes it in float32, also when a checkpointed layer
    is recomputed), `torch.nn.functional.dropout` (a GPU stores one byte per value) and `torch.is_autocast_enabled`
    (without a device, as PEFT calls it, it means CUDA; here it means the CPU).
    """
    functions = torch.nn.functional
    norm, dropout, is_autocast = functions.layer_norm, functions.dropout, torch.is_autocast_enabled

    def in_float32(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        if is_autocast("cpu"):
            x, weight, bias = (tensor if tensor is None else tensor.float() for tensor in (x, weight, bias))
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
