"""A model's real code without its weights: a recording of what a step allocates, and the same step of a deeper model.

Runs on fake tensors (torch's FakeTensorMode): shapes, no values. A few layers are run; the recording of the middle one
stands for all that a deeper model has more. Knows nothing of configs or of devices.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_exp.environment.efficiency import flops_of
from qlora_exp.libraries.torch import (
    UNSAFE_VIEW,
    VALUE_OF_SCALAR,
    FakeTensorMode,
    TorchDispatchMode,
    storage_address,
    tree_leaves,
)

Group = tuple[str, int]
"""Where in a step: (`forward`, layer), (`backward`, layer), (`start`, 0), (`loss`, 0), ..."""
LAYERS = 5
"""That are run: the first, the last, and three between them that should be alike."""


@dataclass(frozen=True)
class Event:
    """A storage that appears or goes away."""

    group: Group
    storage: int
    nbytes: int
    """Negative: it goes away."""
    kind: str = ""


@dataclass
class Work:
    """Arithmetic and traffic of an operation or of many."""

    flops: float = 0.0
    nbytes: float = 0.0
    """Read and written, each operand once, with nothing kept in caches between operations."""


@dataclass
class Recording:
    """What a step allocated, freed and computed, in order."""

    events: list[Event] = field(default_factory=list)
    work: dict[Group, list[Work]] = field(default_factory=dict)
    """One for each operation."""


class Recorder(TorchDispatchMode):
    """Records storages as operations make them and as they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self.group: Group = ("start", 0)
        self.kind = "activations"
        """Of what is made from now on."""
        self._known: dict[int, int] = {}
        """Storages that are alive, by address: their number."""
        self._count = 0
        self._inside = False

    def __enter__(self) -> "Recorder":
        self._inside = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """What is freed later, as the model is, is no part of what was recorded."""
        self._inside = False
        super().__exit__(*error)

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Storages that were there before."""
        for tensor in tensors:
            self._known[storage_address(tensor)] = -1

    def add(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Note a tensor's storage if it is new."""
        storage = tensor.untyped_storage()
        address = storage_address(tensor)
        if address in self._known or not (nbytes := storage.nbytes()):
            return
        kind = kind or ("loss" if self.group[0] == "loss" else self.kind)
        number, self._count = self._count, self._count + 1
        self._known[address] = number
        self.recording.events.append(Event(self.group, number, nbytes, kind))
        weakref.finalize(storage, self._gone, address, number, nbytes)

    def _gone(self, address: int, number: int, nbytes: int) -> None:
        if self._known.pop(address, None) is not None and self._inside:
            self.recording.events.append(Event(self.group, number, -nbytes))

    def is_gradient(self, parameter: torch.Tensor) -> None:
        """Tell what kind of storage a parameter's gradient, which was just made, is."""
        assert parameter.grad is not None
        number = self._known.get(storage_address(parameter.grad))
        for place in range(len(self.recording.events) - 1, -1, -1):
            event = self.recording.events[place]
            if event.storage == number and event.nbytes > 0:
                self.recording.events[place] = Event(event.group, number, event.nbytes, "gradients")
                return

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; note what it made and what it cost."""
        kwargs = kwargs or {}
        if func is VALUE_OF_SCALAR:
            return (
                0 if getattr(args[0], "says_any", False) else 1
            )  # a choice that depends on values: all are so, and none is not
        if (within := _WITHIN.get(str(func.overloadpacket))) is not None:
            workspace = self._count = self._count + 1
            nbytes = within(*args, **kwargs)
            self.recording.events += [
                Event(self.group, -workspace, nbytes, "temporary"),
                Event(self.group, -workspace, -nbytes),
            ]
        found = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten.any:
            found.says_any = True
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        if not (func.is_view or func.namespace == "prim" or str(func.overloadpacket) in _WITHOUT_TRAFFIC):
            # Of a table only its rows are read.
            read = found if func.overloadpacket is torch.ops.aten.embedding else (args, kwargs)
            moved = [leaf for leaf in tree_leaves((read, found)) if isinstance(leaf, torch.Tensor)]
            traffic = sum(leaf.numel() * leaf.element_size() for leaf in moved)
            self.recording.work.setdefault(self.group, []).append(Work(flops_of(func, args, kwargs, found), traffic))
        return found


def _dequantized_4bit(inputs: torch.Tensor, packed: torch.Tensor, *_: Any, **__: Any) -> int:
    return packed.numel() * 2 * inputs.element_size()


_WITHOUT_TRAFFIC = {
    UNSAFE_VIEW,
    *(f"aten.{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh")),
}
_WITHIN: dict[str, Callable[..., int]] = {"bitsandbytes.gemm_4bit": _dequantized_4bit}
"""Bytes that an operation takes for its own use, where that is much."""


def materialize(model: torch.nn.Module, mode: FakeTensorMode, frozen: bool = True) -> None:
    """Put fake CPU tensors in the place of a model's parameters and buffers on the meta device; ties stay.

    Args:
        model: whose.
        mode: of the fake tensors.
        frozen: those that do not train too.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        own = module.named_parameters, module.named_buffers
        for name, tensor in [one for each in own for one in each(recurse=False, remove_duplicate=False)]:
            if frozen or tensor.requires_grad:
                if id(tensor) not in made:
                    made[id(tensor)] = _like(tensor, mode)
                setattr(module, name, made[id(tensor)])


def _like(tensor: Any, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        if hasattr(tensor, "filled"):  # a weight that bitsandbytes stores
            return tensor.filled(torch.empty)
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return torch.nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake


@contextmanager
def layers_marked(recorder: Recorder, layers: list[torch.nn.Module]) -> Iterator[None]:
    """Inside, `recorder.group` follows a forward pass into `layers`, and the backward pass out of them.

    After the last layer's forward the group is (`loss`, 0).
    """
    inside_backward = False

    def enter(place: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not inside_backward:  # recomputed activations are the backward's
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


class IrregularError(Exception):
    """The layers that were run are not alike, so that none stands for those of a deeper model."""


def deepen(recording: Recording, depth: int) -> list[Event]:
    """The events of a model of `depth` layers, from a recording of LAYERS of them.

    A storage keeps its place among those of its group: what the middle layer frees of its neighbour's, each layer that
    it stands for frees of its own neighbour's.

    Raises:
        IrregularError: neighbours of the middle layer make other storages than it does.
    """
    groups: dict[Group, list[Event]] = {}
    made: dict[Group, list[int]] = {}
    home: dict[int, tuple[Group, int]] = {}
    """Of a storage: the group that made it, and its place among that group's."""
    for event in recording.events:
        groups.setdefault(event.group, []).append(event)
        if event.nbytes > 0:
            home[event.storage] = event.group, len(made.setdefault(event.group, []))
            made[event.group].append(event.nbytes)
    middle = LAYERS // 2
    inner = range(middle, depth - (LAYERS - 1 - middle))
    for name in ("forward", "backward"):
        between = [made.get((name, layer), []) for layer in range(1, LAYERS - 1)]
        if any(one != between[0] for one in between):
            raise IrregularError(f"{name}: layers allocate {[len(one) for one in between]} storages")

    def depth_of(layer: int) -> int:
        """Where a layer at the ends of those that were run is in the deeper model."""
        return layer if layer < middle else depth - LAYERS + layer

    alive: dict[tuple[str, int, int], int] = {}
    deeper: list[Event] = []

    def play(group: Group, layer: int) -> None:
        """A group's events, as those of `layer`."""
        name, place = group
        for event in groups[group]:
            (maker, origin), at = home[event.storage]
            origins: Sequence[int] = (origin,)
            if maker in ("forward", "backward"):
                if name in ("forward", "backward"):
                    origins = (layer + origin - place,)
                else:
                    origins = inner if origin == middle else (depth_of(origin),)
            if event.nbytes > 0:
                alive[maker, origins[0], at] = number = len(deeper)
                deeper.append(Event((name, layer), number, event.nbytes, event.kind))
                continue
            for one in origins:
                if (number := alive.pop((maker, one, at), -1)) >= 0:  # what is shared by layers, the first frees
                    deeper.append(Event((name, layer), number, event.nbytes))

    for group in groups:
        name, place = group
        if name in ("forward", "backward") and place == middle:
            for layer in inner if name == "forward" else reversed(inner):
                play(group, layer)
        else:
            play(group, depth_of(place) if name in ("forward", "backward") else 0)
    return deeper
