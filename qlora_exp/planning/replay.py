"""Allocations through a model of torch's allocator: what each phase of a run takes. Knows nothing of models."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from qlora_exp.planning.cuda_allocator import CachingAllocator
from qlora_exp.planning.fake_tensors import Event
from qlora_exp.planning.step import Model, Step
from qlora_exp.utils.units import MIB

KINDS = ("weights", "quantization", "trainable", "gradients", "optimizer", "activations", "loss", "temporary")
"""What memory is for; `loss` has the logits."""
_WORKSPACE = 32 * MIB
"""Bytes that cuBLAS works in, for each thread that multiplies: backward passes have one of their own.

On Hopper; elsewhere 8 MiB, and what is planned is so much too high. Source: torch's ATen/cuda/CublasHandlePool.cpp.
"""


@dataclass(frozen=True)
class Phase:
    """The fullest moment of a phase, bytes."""

    kinds: dict[str, int]
    """What tensors took then, by KINDS."""
    allocated: int
    """At most, as torch counts it: in the allocator's blocks. On a CPU, which has none, what tensors took."""
    reserved: int
    """By the allocator, at most; on a CPU what tensors took."""

    @property
    def tensors(self) -> int:
        """All that tensors took."""
        return sum(self.kinds.values())


def play(model: Model, step: Step, on_cuda: bool, accumulates: bool) -> dict[str, Phase]:
    """The phases of a run through the allocator, its cache emptied before each, as a run does."""
    memory = Memory(on_cuda)
    if on_cuda:
        memory.take("temporary", _WORKSPACE)
    for kind, nbytes in model.static:
        memory.take(kind, nbytes)
    phases = {"load": memory.phase()}
    if on_cuda:
        memory.take("temporary", _WORKSPACE)
    for name, update in zip(("first_step", "steady"), model.updates, strict=True):
        memory.run(step.passes, keep=["gradients"])
        if accumulates:
            memory.run(step.passes, brief=["gradients"])  # added to those that are there
        memory.run(update, keep=["optimizer"])
        memory.forget("gradients")
        phases[name] = memory.phase()
    if step.evaluation:
        memory.run(step.evaluation)
        phases["evaluation"] = memory.phase()
    return phases


class Memory:
    """Plays events; notes the fullest moment."""

    def __init__(self, on_cuda: bool) -> None:
        self._allocator = CachingAllocator()
        self._on_cuda = on_cuda
        self._now: Counter[str] = Counter()
        self._most: Counter[str] = Counter()
        self._kept: dict[str, list[tuple[Any, int]]] = {}

    def take(self, kind: str, nbytes: int) -> Any:
        """Allocate."""
        self._now[kind] += nbytes
        if self._now.total() > self._most.total():
            self._most = self._now.copy()
        return self._allocator.malloc(nbytes) if self._on_cuda else None

    def _give(self, kind: str, nbytes: int, block: Any) -> None:
        self._now[kind] -= nbytes
        if block is not None:
            self._allocator.free(block)

    def run(self, events: Iterable[Event], keep: Collection[str] = (), brief: Collection[str] = ()) -> None:
        """Play events; what they leave is freed at the end, but for kinds that are kept; brief ones go at once."""
        held: dict[int, tuple[str, int, Any]] = {}
        for event in events:
            if event.nbytes > 0:
                one = event.kind, event.nbytes, self.take(event.kind, event.nbytes)
                if event.kind in brief:
                    self._give(*one)
                else:
                    held[event.storage] = one
            elif event.storage in held:
                self._give(*held.pop(event.storage))
        for kind, nbytes, block in held.values():
            if kind in keep:
                self._kept.setdefault(kind, []).append((block, nbytes))
            else:
                self._give(kind, nbytes, block)

    def forget(self, kind: str) -> None:
        """Free what was kept."""
        for block, nbytes in self._kept.pop(kind, []):
            self._give(kind, nbytes, block)

    def phase(self) -> Phase:
        """What was fullest since the last phase; empties the cache."""
        kinds = {kind: self._most[kind] for kind in KINDS if self._most[kind]}
        allocated = reserved = self._most.total()
        if self._on_cuda:
            allocated, reserved = self._allocator.peak_allocated, self._allocator.peak_reserved
        self._allocator.empty_cache()
        self._most = self._now.copy()
        return Phase(kinds, allocated, reserved)
