"""Wrap torch's private parts. Checked on torch 2.13.0."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch._subclasses import fake_tensor
from torch.utils import _python_dispatch, _pytree, _triton

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

tree_map: Callable[[Callable[[Any], Any], Any], Any] = _pytree.tree_map
"""`torch.utils._pytree.tree_map`: an operation's nested arguments, each replaced; has no public name."""

AS_PLAIN_TENSOR: Any = torch._C._disabled_torch_function_impl
"""`torch._C._disabled_torch_function_impl`: `__torch_function__` of a class of tensors that makes ordinary results."""

VALUE_OF_SCALAR = torch.ops.aten._local_scalar_dense.default
"""`aten::_local_scalar_dense`: the operation of `Tensor.item`, which reads a value."""

FUSED_ATTENTION = tuple(
    f"aten._scaled_dot_product_{kernel}"
    for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
)
"""`aten::_scaled_dot_product_*`: attention kernels whose operations are counted; each also has a `_backward`."""

UNSAFE_VIEW = "aten._unsafe_view"
"""`aten::_unsafe_view`: an operation that moves no memory, though torch does not mark it as a view."""


def is_fake(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is one of `FakeTensorMode`, which has no values."""
    return isinstance(tensor, fake_tensor.FakeTensor)


TO_COPY = torch.ops.aten._to_copy
"""`aten::_to_copy`: the operation of `Tensor.to`, which changes dtype or device."""


def changed_by(func: Any, args: Any) -> list[Any]:
    """Return the arguments that an operation writes into, by its schema (`OpOverload._schema`)."""
    infos = (argument.alias_info for argument in func._schema.arguments)
    return [value for value, info in zip(args, infos, strict=False) if info is not None and info.is_write]


class Wrapper(torch.Tensor):
    """Tensor without a storage, whose class says what operations do (`torch.Tensor._make_wrapper_subclass`)."""

    @classmethod
    def wrapping(cls, sizes: list[int], strides: list[int], dtype: torch.dtype, device: torch.device) -> Any:
        """Create one that looks like a tensor of these sizes, strides (in values), dtype and device."""
        make: Any = torch.Tensor._make_wrapper_subclass
        return make(cls, sizes, strides=strides, dtype=dtype, device=device)


class AssumedValues(TorchDispatchMode):
    """Dispatch mode that answers what code asks about values which tensors on the meta device do not have.

    See `assumed`. What is copied to the CPU stays on the meta device.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or answer it."""
        kwargs = kwargs or {}
        if func.overloadpacket is torch.ops.aten._to_copy and args[0].is_meta:
            return func(*args, **kwargs | {"device": torch.device("meta")})
        answer = assumed(func, args, kwargs)
        output = func(*args, **kwargs) if answer is None else answer
        if func.overloadpacket is torch.ops.aten.any:
            output.says_any = True
        return output


def assumed(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of an operation that depends on values, for tensors without values; None for all others.

    A scalar is 1 (0 if it comes from `any`), and every element of a mask is true.
    """
    aten: Any = torch.ops.aten
    tensor: Any = args[0] if args else None
    if not isinstance(tensor, torch.Tensor) or not (tensor.is_meta or isinstance(tensor, fake_tensor.FakeTensor)):
        return None
    match func.overloadpacket:
        case aten._local_scalar_dense:
            return 0 if getattr(tensor, "says_any", False) else 1
        case aten.bincount:
            length = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            return torch.empty(length, dtype=torch.long, device=tensor.device)
        case aten.nonzero:
            return torch.empty(tensor.numel(), tensor.ndim, dtype=torch.long, device=tensor.device)
        case aten.index | aten.index_put | aten.index_put_ if any(_is_mask(index) for index in args[1]):
            places = [place for index in args[1] for place in (_places(index) if _is_mask(index) else [index])]
            return func(tensor, places, *args[2:], **kwargs)
    return None


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype == torch.bool


def _places(mask: torch.Tensor) -> list[torch.Tensor]:
    return [torch.empty(mask.numel(), dtype=torch.long, device=mask.device) for _ in range(mask.ndim)]


@contextmanager
def fp32_precision_kept() -> Iterator[None]:
    """Restore `torch.backends.fp32_precision` after the context; the trainer's `tf32` sets it for the whole process."""
    backends: Any = torch.backends  # its stubs lack the attribute
    before = backends.fp32_precision
    try:
        yield
    finally:
        backends.fp32_precision = before


def running_node() -> Any:
    """Return the node of the graph that a backward pass runs at this moment (`torch._C._current_autograd_node`).

    It has a public `register_hook`. A saved tensor has no public way to learn which node asks for it.
    """
    return torch._C._current_autograd_node()


def fake_device(func: Any, args: Any) -> torch.device | None:
    """Return the device of a fake tensor if an operation asks for it (`prim::device`); None for all other operations.

    Most operations of fake tensors are this one, and their mode takes long to answer it.
    """
    if func is not torch.ops.prim.device.default or not isinstance(args[0], fake_tensor.FakeTensor):
        return None
    if args[0].fake_mode.in_kernel_invocation:  # the kernel runs on the meta device
        return None
    return args[0].fake_device


def ignored_by_ddp(model: torch.nn.Module, names: list[str]) -> None:
    """Let DDP neither send nor check these parameters of a model that it will wrap.

    This is `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model`, which has no public name.
    """
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


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
    import, and uses the capability only to check that there is a GPU. torchao 0.18, which PEFT imports if it is
    installed, asks `torch.utils._triton.has_triton` at import, which reads a GPU's properties from CUDA: it is replaced
    too, and answers the same from the capability.

    Args:
        capability: returned as the GPU's compute capability.
    """

    def has_triton() -> bool:
        return _triton.has_triton_package() and tuple(capability) >= (7, 0)

    variable = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        answers = patched(torch.cuda, get_device_capability=lambda *_, **__: capability)
        with answers, patched(_triton, has_triton=has_triton):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@contextmanager
def factors_as_on_cpu() -> Iterator[None]:
    """Return singular vectors in the memory layout of a CPU within the context (replaces `torch.linalg.svd`).

    LAPACK stores the right vectors by columns, so that a slice of them is copied where it must be contiguous. CUDA, and
    the meta device with it, stores them by rows: there the slice is a view, which keeps all of them in memory.
    """
    svd = torch.linalg.svd

    def by_columns(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        left, values, right = svd(*args, **kwargs)
        return left, values, right.mT.contiguous().mT

    with patched(torch.linalg, svd=by_columns):
        yield


@contextmanager
def computing_as_on_gpu(flash: bool = False) -> Iterator[None]:
    """Compute on the CPU as a GPU would, within the context: an operation stores tensors of the same sizes.

    Replaces `torch.nn.functional.layer_norm` (a GPU's autocast computes it in float32, also when a checkpointed layer
    is recomputed), `torch.nn.functional.dropout` (a GPU stores one byte per value), `scaled_dot_product_attention` (a
    GPU's fused kernels have dropout and keep no mask of it; a CPU's have none, and whole score matrices would be kept)
    and `torch.is_autocast_enabled` (without a device, as PEFT calls it, it means CUDA; here it means the CPU).

    Args:
        flash: whether the model runs FlashAttention, which accepts fewer heads of keys and values than of queries.
            Torch's own fused kernels do not, unless they are asked for that, and fall back to whole score matrices.
    """
    functions = torch.nn.functional
    norm, dropout, is_autocast = functions.layer_norm, functions.dropout, torch.is_autocast_enabled
    attention = functions.scaled_dot_product_attention

    def in_float32(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        if is_autocast("cpu"):
            x, weight, bias = (tensor if tensor is None else tensor.float() for tensor in (x, weight, bias))
        with torch.autocast("cpu", enabled=False):
            return norm(x, shape, weight, bias, eps)

    def fused_dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if inplace or not (training and p):
            return dropout(x, p, training, inplace)
        return torch.native_dropout(x, p, training)[0]

    def fused_attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any
    ) -> Any:
        if flash and key.shape[1] == 1:
            key, value = (tensor.expand(-1, query.shape[1], -1, -1) for tensor in (key, value))
        return attention(query, key, value, attn_mask, 0.0, *args, **kwargs)

    with (
        patched(functions, layer_norm=in_float32, dropout=fused_dropout, scaled_dot_product_attention=fused_attention),
        patched(torch, is_autocast_enabled=lambda device="cpu": is_autocast(device)),
    ):
        yield


@contextmanager
def without_pickles(error: Exception) -> Iterator[None]:
    """Raise `error` inside in the place of `torch.load`, which opens pickles, whoever calls it.

    transformers and PEFT call it for files that a config or an index of a model names.
    """

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise error

    with patched(torch, load=refuse):
        yield


def times_changed(tensor: torch.Tensor) -> int:
    """Return how often a tensor was changed in place (`Tensor._version`)."""
    return tensor._version
