"""Spread a plan over several devices: what each one stores, gathers and sends with torch's DDP and FSDP2.

FSDP2 is planned from its source (torch 2.13, torch/distributed/fsdp/_fully_shard): `fully_shard` of each layer and of
the model with the rest, resharded after the forward pass. Nothing is communicated here.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_exp.models.trained import layers_of
from qlora_exp.planning.packed_weights import stored_bytes
from qlora_exp.planning.recording.fake_tensors import Event, Group
from qlora_exp.planning.step import Step
from qlora_exp.utils.units import MIB

_BUCKETS = (MIB, 25 * MIB)
"""Bytes at which DDP closes its first bucket of gradients, and each other one."""
_GATHERS, _REDUCES = 1, 2
"""Streams of FSDP2's own; all else is on stream 0."""
_FIRST = 1 << 40
"""Number of the first storage that sharding adds; storages of a recording have smaller numbers."""


def buckets(model: Any) -> list[int]:
    """Return the bytes of the buckets that DDP copies gradients to. Source: torch's distributed/c10d/reducer.cpp."""
    full: list[int] = []
    open_: dict[torch.dtype, int] = {}
    closed: dict[torch.dtype, int] = {}
    for parameter in reversed([parameter for parameter in model.parameters() if parameter.requires_grad]):
        kind = parameter.dtype
        open_[kind] = open_.get(kind, 0) + parameter.numel() * parameter.element_size()
        if open_[kind] >= _BUCKETS[min(closed.get(kind, 0), 1)]:
            full.append(open_.pop(kind))
            closed[kind] = closed.get(kind, 0) + 1
    return [*full, *open_.values()]


def share(shape: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Return the shape of a parameter's share on each rank: rows in equal parts, the last ones padded."""
    return (-(-shape[0] // ranks), *shape[1:])


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers and frees together: bytes of each, with the padding of all shares."""

    frozen: tuple[int, ...] = ()
    trained: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, which are gathered through a buffer of this size."""
        return sum(self.frozen) + sum(self.trained)


@dataclass(frozen=True)
class Units:
    """A model as FSDP2 divides it."""

    ranks: int
    layers: list[Unit]
    rest: Unit
    """Embeddings, output layer and all else. It is gathered for the whole forward pass, and for the backward pass."""
    offloaded: bool = False
    """Whether shares are kept in the machine's memory."""

    def __iter__(self) -> Iterator[Unit]:
        yield from (*self.layers, self.rest)


def units(model: Any, ranks: int, offloaded: bool = False) -> Units:
    """Divide a model into units of FSDP2, in shares for so many ranks."""
    seen: set[int] = set()

    def unit(parameters: Iterable[Any]) -> Unit:
        sizes: dict[bool, list[int]] = {False: [], True: []}
        for parameter in parameters:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                padded = ranks * math.prod(share(parameter.shape, ranks)) * parameter.element_size()
                sizes[parameter.requires_grad].append(padded)
        return Unit(tuple(sizes[False]), tuple(sizes[True]))

    layers = [unit(layer.parameters()) for layer in layers_of(model)]
    return Units(ranks, layers, unit(model.parameters()), offloaded)


def keep_shares(model: Any, ranks: int) -> None:
    """Replace the parameters of a model on the meta device by one rank's shares; tied weights stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            if id(parameter) not in made:
                made[id(parameter)] = _share(parameter, ranks)
            setattr(module, name, made[id(parameter)])


def _share(parameter: Any, ranks: int) -> torch.nn.Parameter:
    empty = torch.empty(share(parameter.shape, ranks), dtype=parameter.dtype, device="meta")
    if stored_bytes(parameter) is None:
        return torch.nn.Parameter(empty, parameter.requires_grad)
    packed: Any = empty.as_subclass(type(parameter))  # its constants are not shared out
    vars(packed).update(vars(parameter))
    return packed


@dataclass
class Traffic:
    """Bytes that each rank sends, and receives, for one optimizer step."""

    gathered: int = 0
    """By all-gathers of parameters."""
    reduced: int = 0
    """By all-reduces or reduce-scatters of gradients."""

    @property
    def total(self) -> int:
        """All bytes."""
        return self.gathered + self.reduced


def all_reduced(nbytes: int, ranks: int) -> Traffic:
    """Return the traffic of DDP: once per step, whatever the number of accumulated batches."""
    return Traffic(reduced=2 * (ranks - 1) * nbytes // ranks)


def shard(step: Step, units: Units, accumulated: int) -> tuple[Step, Traffic]:
    """Add to a step what FSDP2 allocates and frees; return it with its traffic for so many accumulated batches.

    Gradients are reduced after each batch, so that no rank keeps those of the whole model.
    """
    passes = _Collectives(units)
    sharded = Step(passes.run(step.passes), _Collectives(units).run(step.evaluation), step.work)
    gathered, reduced = (
        accumulated * (units.ranks - 1) * size // units.ranks for size in (passes.gathered, passes.reduced)
    )
    return sharded, Traffic(gathered, reduced)


@dataclass
class _Collectives:
    """The order in which FSDP2 gathers parameters, frees them and reduces gradients.

    Forward: a unit is gathered into a buffer and copied out of it; the buffer stays until the next one was copied out.
    Backward: the buffer of the next unit is filled while a unit computes, and freed when it was copied out. The buffer
    from which gradients are reduced stays until the next unit needs one.
    """

    units: Units
    gathered: int = 0
    """Bytes of all gathered units, as often as they were gathered."""
    reduced: int = 0
    """Bytes of all reduced gradients."""

    def __post_init__(self) -> None:
        self._units = [*self.units]
        self._rest = len(self._units) - 1
        self._events: list[Event] = []
        self._group: Group = ("start", 0)
        self._number = _FIRST
        self._layer: int | None = None
        """The layer that computes."""
        self._buffers: dict[int | str, Event] = {}
        """Buffers of units that are gathered ahead, by place; and the `held` one and the `reduced` one."""
        self._whole: dict[int, list[Event]] = {}
        """Gathered parameters by place of their unit."""
        self._gradients: defaultdict[int, list[Event]] = defaultdict(list)
        """Gradients that are not reduced yet, by place of their unit."""

    def run(self, events: Sequence[Event]) -> list[Event]:
        """Return the events with those of FSDP2."""
        if events:
            self._gather(self._rest)
        for event in events:
            if event.group != self._group:
                self._group = event.group
                self._enter(*event.group)
            if event.kind == "gradients":
                self._gradients[self._owner()].append(event)
                self._events.append(Event(event.group, event.storage, event.nbytes, "gathered"))
            else:
                self._events.append(event)
        return self._events

    def _enter(self, name: str, place: int) -> None:
        """Leave a layer, and gather the one that this part of the step needs."""
        layer, self._layer = self._layer, None
        match name, place:
            case ("loss", 1):
                self._drop("held")
                self._drop_whole(self._rest)
                self._begin_backward(self._rest)
            case ("forward" | "loss", _):
                if layer is not None:
                    self._drop_whole(layer)
                if name == "forward":
                    self._layer = place
                    self._gather(place)
            case ("backward", _):
                if layer is not None:
                    self._reduce(layer)
                self._layer = place
                self._begin_backward(place)
            case _:
                for number in (*([] if layer is None else [layer]), self._rest):
                    self._reduce(number)

    def _begin_backward(self, number: int) -> None:
        self._fill(number)  # unless it was filled ahead
        self._copy_out(number)
        self._drop(number)
        if number > 0:
            self._fill(number - 1)

    def _owner(self) -> int:
        """Return the unit of a new gradient: that of the layer that computes, until it has all; else the rest."""
        layer = self._layer
        if layer is None or len(self._gradients[layer]) == len(self._units[layer].trained):
            return self._rest
        return layer

    def _gather(self, number: int) -> None:
        """Gather a unit in a forward pass."""
        self._fill(number)
        self._copy_out(number)
        self._drop("held")
        if number in self._buffers:
            self._buffers["held"] = self._buffers.pop(number)

    def _fill(self, number: int) -> None:
        """Gather a unit into a buffer."""
        if not (nbytes := self._units[number].nbytes) or number in self._buffers:
            return
        own = nbytes // self.units.ranks
        copied = [self._take(own, "communication", _GATHERS)] if self.units.offloaded else []
        self._buffers[number] = self._take(nbytes, "communication", _GATHERS)
        self._give(copied)
        self.gathered += nbytes

    def _copy_out(self, number: int) -> None:
        unit = self._units[number]
        self._whole[number] = [self._take(nbytes, "gathered") for nbytes in (*unit.frozen, *unit.trained)]

    def _reduce(self, number: int) -> None:
        """Free a unit after its backward pass, and reduce its gradients to shares."""
        self._drop_whole(number)
        if not (gradients := self._gradients.pop(number, [])):
            return
        self._drop("reduced")
        trained = self._units[number].trained
        padded = sum(trained) if len(gradients) == len(trained) else sum(event.nbytes for event in gradients)
        self._buffers["reduced"] = self._take(padded, "communication")
        self._give(gradients)
        kind = "communication" if self.units.offloaded else "gradients"
        own = self._take(padded // self.units.ranks, kind, _REDUCES)
        if self.units.offloaded:
            self._give([own])
        self.reduced += padded

    def _take(self, nbytes: int, kind: str, stream: int = 0) -> Event:
        self._number += 1
        self._events.append(Event(self._group, self._number, nbytes, kind, stream))
        return self._events[-1]

    def _give(self, taken: Iterable[Event]) -> None:
        self._events += [Event(self._group, event.storage, -event.nbytes) for event in taken]

    def _drop(self, purpose: int | str) -> None:
        if (buffer := self._buffers.pop(purpose, None)) is not None:
            self._give([buffer])

    def _drop_whole(self, number: int) -> None:
        self._give(self._whole.pop(number, []))
