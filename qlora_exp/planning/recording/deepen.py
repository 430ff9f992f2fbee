"""Derive the events of a deep model from a recording of a few of its layers."""

from collections.abc import Sequence

from qlora_exp.planning.recording.fake_tensors import LAYERS, Event, Group, Recording


class IrregularError(Exception):
    """The layers that ran allocate differently, so that none can represent the layers of a deeper model."""


def stand_ins(depth: int, recomputed: int | None = None) -> list[int]:
    """Return the number of layers of a deep model that each layer of a shorter one stands for.

    Args:
        depth: number of layers of the deep model.
        recomputed: number of first layers that recompute, in a model where others do not; None: all layers are alike.

    Returns:
        1 for each layer that stands for itself. Of each LAYERS alike the middle one stands for more.
    """
    middle = LAYERS // 2
    kinds = [depth] if recomputed is None else [recomputed, depth - recomputed]
    if min(kinds) < LAYERS:
        return [1] * depth
    return [count - LAYERS + 1 if place == middle else 1 for count in kinds for place in range(LAYERS)]


def deepen(recording: Recording, counts: Sequence[int]) -> list[Event]:
    """Derive the events of a deep model from a recording of a shorter one.

    A storage is identified by its position among the storages of its group. If a layer that stands for several frees a
    storage of its neighbour, each layer that it represents frees the storage at the same position of its own neighbour.

    Args:
        recording: that of the shorter model.
        counts: how many layers of the deep model each of its layers stands for.

    Raises:
        IrregularError: the neighbours of a layer that stands for several create other storages than it does.
    """
    groups: dict[Group, list[Event]] = {}
    made: dict[Group, list[int]] = {}
    home: dict[int, tuple[Group, int]] = {}
    """For each storage, the group that created it and its position within that group."""
    for event in recording.events:
        groups.setdefault(event.group, []).append(event)
        if event.nbytes > 0:
            home[event.storage] = event.group, len(made.setdefault(event.group, []))
            made[event.group].append(event.nbytes)
    first = [sum(counts[:layer]) for layer in range(len(counts))]
    for name in ("forward", "backward"):
        for layer in (layer for layer, count in enumerate(counts) if count > 1):
            between = [made.get((name, near), []) for near in (layer - 1, layer, layer + 1)]
            if any(sizes != between[0] for sizes in between):
                raise IrregularError(f"{name}: layers allocate {[len(sizes) for sizes in between]} storages")

    def stands_for(layer: int) -> range:
        """Return the layers of the deep model that a layer that ran stands for."""
        return range(first[layer], first[layer] + counts[layer])

    alive: dict[tuple[str, int, int], int] = {}
    deeper: list[Event] = []

    def play(group: Group, layer: int) -> None:
        """Append a group's events as events of `layer`."""
        name, place = group
        for event in groups[group]:
            (maker, origin), at = home[event.storage]
            origins: Sequence[int] = (origin,)
            if maker in ("forward", "backward"):
                origins = (layer + origin - place,) if name in ("forward", "backward") else stands_for(origin)
            if event.nbytes > 0:
                alive[maker, origins[0], at] = number = len(deeper)
                deeper.append(Event((name, layer), number, event.nbytes, event.kind, event.stream))
                continue
            for owner in origins:
                if (number := alive.pop((maker, owner, at), -1)) >= 0:  # the first layer frees what layers share
                    deeper.append(Event((name, layer), number, event.nbytes, event.kind))

    for group in groups:
        name, place = group
        if name not in ("forward", "backward"):
            play(group, place)
            continue
        for layer in stands_for(place) if name == "forward" else reversed(stands_for(place)):
            play(group, layer)
    return deeper
