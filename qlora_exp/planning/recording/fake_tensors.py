"""Record what a step of a model allocates, without its weights, and extend the recording to a deeper model.

The model's real code runs on fake tensors (torch's FakeTensorMode), which have shapes but no values. Only a few layers
run; the recording of the middle layer is repeated for the additional layers of the deeper model. This module does not
use configs or devices.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_exp.environment.efficiency import flops_of
from qlora_exp.libraries.torch import (
    UNSAFE_VIEW,
    FakeTensorMode,
    TorchDispatchMode,
    assumed,
    fake_device,
    running_node,
    storage_address,
    tree_leaves,
)
from qlora_exp.models.layers.experts import Experts4bit
from qlora_exp.planning.packed_weights import parts_of

Group = tuple[str, int]
"""Part of a step: (`start`, 0), (`forward`, layer), (`loss`, 0), then (`loss`, 1), (`backward`, layer), (`end`, 0)."""
HOST = "host"
"""Kind of what is in the machine's memory, not on the device."""
_COPIES = 1
"""CUDA stream on which tensors come back from the machine's memory."""
_LEAST_OFFLOADED = 1024
"""Smaller tensors stay on the device (bytes; TRL's `min_offload_size`)."""
LAYERS = 5
"""Number of layers that run: the first, the last, and three between them that should allocate alike."""


@dataclass(frozen=True)
class Event:
    """Allocation or release of a storage."""

    group: Group
    storage: int
    nbytes: int
    """Negative: the storage is released."""
    kind: str = ""
    stream: int = 0
    """CUDA stream that it is allocated on. Torch's allocator reuses a block only on the same stream."""


@dataclass
class Work:
    """Arithmetic and memory traffic of one or more operations."""

    flops: float = 0.0
    nbytes: float = 0.0
    """Bytes read and written, each operand once, assuming that nothing stays in caches between operations."""


@dataclass
class Recording:
    """Allocations, releases and operations of a step, in order."""

    events: list[Event] = field(default_factory=list)
    work: dict[Group, list[Work]] = field(default_factory=dict)
    """One entry for each operation."""


class Recorder(TorchDispatchMode):
    """Dispatch mode that records storages when operations create them and when they are freed."""

    def __init__(self, on_gpu: bool = False) -> None:
        super().__init__()
        self.recording = Recording()
        self._workspaces = _WORKSPACES_OF_GPU if on_gpu else _WORKSPACES
        self.group: Group = ("start", 0)
        self.kind = "activations"
        """Kind of the storages that are created from now on."""
        self.stream = 0
        """CUDA stream that they are created on."""
        self._numbers: dict[int, int] = {}
        """Number of each storage that is alive, by address; -1 for storages that are not recorded."""
        self._ignored: list[Any] = []
        self._count = 0
        self._inside = False

    def __enter__(self) -> "Recorder":
        self._inside = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop recording: releases after this point, such as the model's own, are not part of the step."""
        self._inside = False
        super().__exit__(*error)

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Mark storages that existed before the step, so that they are not recorded.

        They are kept alive: if a layer replaces one, as bitsandbytes does with biases, the next storage could have its
        address.
        """
        for part in (part for tensor in tensors for part in parts_of(tensor)):
            self._ignored.append(part.untyped_storage())
            self._numbers[storage_address(part)] = -1

    def add(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Record a tensor's storage if it is new."""
        storage = tensor.untyped_storage()
        address = storage_address(tensor)
        if address in self._numbers or not (nbytes := storage.nbytes()):
            return
        kind = kind or ("loss" if self.group[0] == "loss" else self.kind)
        number, self._count = self._count, self._count + 1
        self._numbers[address] = number
        self.recording.events.append(Event(self.group, number, nbytes, kind, self.stream))
        weakref.finalize(storage, self._gone, address, number, nbytes)

    def _gone(self, address: int, number: int, nbytes: int) -> None:
        if self._numbers.pop(address, None) is not None and self._inside:
            self.recording.events.append(Event(self.group, number, -nbytes))

    def on_host(self, nbytes: int) -> int:
        """Record memory of the machine, pinned by torch's allocator for it in powers of two; return its number."""
        number, self._count = self._count, self._count + 1
        self.recording.events.append(Event(self.group, number, 1 << (nbytes - 1).bit_length(), HOST))
        return number

    def off_host(self, number: int, nbytes: int) -> None:
        """Record that memory of the machine is free again."""
        self.recording.events.append(Event(self.group, number, -(1 << (nbytes - 1).bit_length()), HOST))

    def existed(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor's storage existed before the step."""
        return self._numbers.get(storage_address(tensor)) == -1

    def is_gradient(self, parameter: torch.Tensor) -> None:
        """Mark the storage of a parameter's newly created gradient as kind `gradients`."""
        assert parameter.grad is not None
        number = self._numbers.get(storage_address(parameter.grad))
        for place in range(len(self.recording.events) - 1, -1, -1):
            event = self.recording.events[place]
            if event.storage == number and event.nbytes > 0:
                self.recording.events[place] = Event(event.group, number, event.nbytes, "gradients")
                return

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; record the storages it creates and its work."""
        if any(issubclass(kind, Experts4bit) for kind in types):
            return NotImplemented  # it comes again with what the experts are dequantized to
        if (device := fake_device(func, args)) is not None:
            return device
        kwargs = kwargs or {}
        if (workspace_bytes := self._workspaces.get(str(func.overloadpacket))) is not None:
            workspace = self._count = self._count + 1
            nbytes = workspace_bytes(*args, **kwargs)
            self.recording.events += [
                Event(self.group, -workspace, nbytes, "temporary"),
                Event(self.group, -workspace, -nbytes),
            ]
        answer = assumed(func, args, kwargs)
        if isinstance(answer, int):
            return answer
        output = func(*args, **kwargs) if answer is None else answer
        if func.overloadpacket is torch.ops.aten.any:
            output.says_any = True
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        if not (func.is_view or func.namespace == "prim" or str(func.overloadpacket) in _WITHOUT_TRAFFIC):
            # An embedding reads only the rows that it returns, not the complete table.
            read = output if func.overloadpacket is torch.ops.aten.embedding else (args, kwargs)
            moved = [leaf for leaf in tree_leaves((read, output)) if isinstance(leaf, torch.Tensor)]
            traffic = sum(leaf.numel() * leaf.element_size() for leaf in moved)
            self.recording.work.setdefault(self.group, []).append(Work(flops_of(func, args, kwargs, output), traffic))
        return output


class Offloading(torch.autograd.graph.saved_tensors_hooks):
    """Context of a forward pass whose saved tensors go to the machine's memory, recorded as a GPU would do it.

    It allocates what TRL's `OffloadActivations` allocates there, of whose copies one is under way at a time: a tensor
    stays on the device until the next one is saved, and when it is back until the backward pass has used the next one.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._leaving: tuple[int, torch.Tensor] | None = None
        self._back: dict[int, torch.Tensor] = {}
        self._node: Any = None
        super().__init__(self._save, self._load)

    def _save(self, tensor: torch.Tensor) -> Any:
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes < _LEAST_OFFLOADED or isinstance(tensor, torch.nn.Parameter) or self._recorder.existed(tensor):
            return tensor
        if self._leaving and _place(self._leaving[1]) == _place(tensor):
            return tensor
        if not tensor.is_contiguous() or tensor.storage_offset():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        number = self._recorder.on_host(nbytes)
        self._leaving = number, tensor.detach()
        return number, tensor.shape, tensor.dtype

    def _load(self, saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        number, shape, dtype = saved
        node, before = running_node(), []
        if node is not self._node:
            self._node, before = node, [*self._back]
        if self._leaving and self._leaving[0] == number:
            tensor = self._leaving[1]
        else:
            self._recorder.stream = _COPIES
            tensor = self._back[number] = torch.empty(shape, dtype=dtype)
            self._recorder.stream = 0
        self._recorder.off_host(number, tensor.numel() * tensor.element_size())

        def free(*_: Any) -> None:
            self._leaving = None
            for used in before:
                self._back.pop(used, None)

        node.register_hook(free)
        return tensor

    def close(self) -> None:
        """Free what a backward pass leaves."""
        self._leaving = self._node = None
        self._back.clear()


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return storage_address(tensor), int(tensor.storage_offset())


def _dequantized_4bit(inputs: torch.Tensor, packed: torch.Tensor, *_: Any, **__: Any) -> int:
    return packed.numel() * 2 * inputs.element_size()


def _attention_gradients(_grad: Any, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    """Return the bytes of sums of the queries' gradients in float32, and of those of keys and values for all heads.

    Source: `mha_bwd` in flash_api.cpp of FlashAttention 2, and of torch.
    """
    expanded = 2 * query.numel() * query.element_size() if query.shape[1] != key.shape[1] else 0
    return 4 * query.numel() + expanded


_WITHOUT_TRAFFIC = {
    UNSAFE_VIEW,
    *(f"aten.{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh")),
}
_WORKSPACES: dict[str, Callable[..., int]] = {"bitsandbytes.gemm_4bit": _dequantized_4bit}
"""Operations that allocate large workspaces internally, with a function that returns the bytes of the workspace."""
_WORKSPACES_OF_GPU: dict[str, Callable[..., int]] = _WORKSPACES | {
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_gradients
}
"""The same where operations stand for those of a GPU."""


def materialize(model: torch.nn.Module, mode: FakeTensorMode, frozen: bool = True) -> None:
    """Replace a model's parameters and buffers on the meta device with fake CPU tensors; tied weights stay tied.

    Args:
        model: the model to change.
        mode: the mode that creates the fake tensors.
        frozen: whether to replace frozen tensors too.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        own = module.named_parameters, module.named_buffers
        for name, tensor in [pair for named in own for pair in named(recurse=False, remove_duplicate=False)]:
            if frozen or tensor.requires_grad:
                if id(tensor) not in made:
                    made[id(tensor)] = _like(tensor, mode)
                setattr(module, name, made[id(tensor)])


def _like(tensor: Any, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        if hasattr(tensor, "filled"):  # a weight in the format of bitsandbytes
            return tensor.filled(torch.empty)
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return torch.nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake


@contextmanager
def layers_marked(recorder: Recorder, layers: list[torch.nn.Module]) -> Iterator[None]:
    """Set `recorder.group` to the layer that runs, in forward and backward passes within the context.

    After the last layer's forward pass the group is (`loss`, 0).
    """
    inside_backward = False

    def enter(place: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not inside_backward:  # activations that are recomputed belong to the backward pass
                recorder.group = ("forward", place)

        return hook

    def leave(place: int) -> Callable[..., None]:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            if inside_backward:
                return
            hidden = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
            if hidden is not None and hidden.requires_grad:
                hidden.register_hook(begin(place))
            if place == len(layers) - 1:
                recorder.group = ("loss", 0)

        return hook

    def begin(place: int) -> Callable[[torch.Tensor], None]:
        def hook(_gradient: torch.Tensor) -> None:
            nonlocal inside_backward
            inside_backward = True
            recorder.group, recorder.kind = ("backward", place), "temporary"

        return hook

    handles = [layer.register_forward_pre_hook(enter(place)) for place, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(leave(place)) for place, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
