"""Replay recorded allocations through a model of torch's allocator, to get the memory of each phase of a run."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from qlora_exp.planning.cuda_allocator import CachingAllocator
from qlora_exp.planning.recording.fake_tensors import HOST, Event
from qlora_exp.planning.step import Model, Step
from qlora_exp.utils.units import MIB

KINDS = (
    "weights", "quantization", "trainable", "gathered", "gradients", "optimizer", "activations", "loss",
    "communication", "temporary",
)  # fmt: skip
"""Kinds of memory. `loss` includes the logits. `gathered`: whole layers that other ranks share, and their gradients.
`communication`: buffers that values are sent from or received in."""
_WORKSPACE = 32 * MIB
"""Bytes of cuBLAS's workspace for each thread that multiplies matrices; the backward pass has its own thread.

This is the size on Hopper. Other GPUs use 8 MiB, so plans for them are too high by the difference. Source: torch's
ATen/cuda/CublasHandlePool.cpp.
"""


@dataclass(frozen=True)
class Phase:
    """Peak memory of a phase, in bytes."""

    kinds: dict[str, int]
    """Bytes of tensors at the fullest moment, by KINDS."""
    allocated: int
    """Peak as torch counts it, in the allocator's blocks. On a CPU, which has no such allocator: bytes of tensors."""
    reserved: int
    """Peak that the allocator reserves. On a CPU: bytes of tensors."""

    @property
    def tensors(self) -> int:
        """Bytes of all tensors at the fullest moment."""
        return sum(self.kinds.values())


def play(model: Model, step: Step, on_cuda: bool, accumulates: bool, buckets: Iterable[int] = ()) -> dict[str, Phase]:
    """Replay the phases of a run. The allocator's cache is emptied before each phase, as in a run.

    Args:
        model: what does not depend on the batch.
        step: events of a training step and an evaluation step.
        on_cuda: whether torch's allocator for CUDA is used.
        accumulates: whether a step has several batches.
        buckets: bytes of each bucket in which DDP reduces gradients.
    """
    memory = Memory(on_cuda)
    if on_cuda:
        memory.take("temporary", _WORKSPACE)
    for kind, nbytes in model.static:
        memory.take(kind, nbytes)
    memory.run([Event(("start", 0), 0, model.loading, "temporary")] if model.loading else [])
    phases = {"load": memory.phase()}
    if on_cuda:
        memory.take("temporary", _WORKSPACE)
    for nbytes in buckets:
        memory.take("communication", nbytes)
    for name, update in zip(("first_step", "steady"), model.updates, strict=True):
        memory.run(step.passes, keep=["gradients"])
        if accumulates:
            memory.run(step.passes, brief=["gradients"])  # they are added to the existing gradients
        memory.run(update, keep=["optimizer"])
        memory.forget("gradients")
        phases[name] = memory.phase()
    if step.evaluation:
        memory.run(step.evaluation)
        phases["evaluation"] = memory.phase()
    return phases


def offloaded(model: Model) -> int:
    """Return the most bytes that a rank's share of weights, gradients and optimizer states takes in an update."""
    memory = Memory(on_cuda=False)
    for kind, nbytes in model.static:
        memory.take(kind, nbytes)
        if kind == "trainable":
            memory.take("gradients", nbytes)
    for update in model.updates:
        memory.run(update, keep=["optimizer"])
    return memory.phase().tensors + model.paged


def on_host(events: Iterable[Event]) -> int:
    """Return the most bytes of the machine's memory that events take at once."""
    now = most = 0
    for event in events:
        now += event.nbytes if event.kind == HOST else 0
        most = max(most, now)
    return most


class Memory:
    """Replayer of events that keeps track of the fullest moment."""

    def __init__(self, on_cuda: bool) -> None:
        self._allocator = CachingAllocator()
        self._on_cuda = on_cuda
        self._now: Counter[str] = Counter()
        self._most: Counter[str] = Counter()
        self._kept: dict[str, list[tuple[Any, int]]] = {}

    def take(self, kind: str, nbytes: int, stream: int = 0) -> Any:
        """Allocate `nbytes` of memory of a kind; return the block, or None on a CPU."""
        self._now[kind] += nbytes
        if self._now.total() > self._most.total():
            self._most = self._now.copy()
        return self._allocator.malloc(nbytes, stream) if self._on_cuda else None

    def _free(self, kind: str, nbytes: int, block: Any) -> None:
        self._now[kind] -= nbytes
        if block is not None:
            self._allocator.free(block)

    def run(self, events: Iterable[Event], keep: Collection[str] = (), brief: Collection[str] = ()) -> None:
        """Replay events, then free the storages that they leave.

        Args:
            events: allocations and releases, in order.
            keep: kinds that stay allocated until `forget`.
            brief: kinds that are freed as soon as they are allocated.
        """
        alive: dict[int, tuple[str, int, Any]] = {}
        for event in events:
            if event.kind == HOST:
                continue
            if event.nbytes > 0:
                allocation = event.kind, event.nbytes, self.take(event.kind, event.nbytes, event.stream)
                if event.kind in brief:
                    self._free(*allocation)
                else:
                    alive[event.storage] = allocation
            elif event.storage in alive:
                self._free(*alive.pop(event.storage))
        for kind, nbytes, block in alive.values():
            if kind in keep:
                self._kept.setdefault(kind, []).append((block, nbytes))
            else:
                self._free(kind, nbytes, block)

    def forget(self, kind: str) -> None:
        """Free storages of a kind that `run` kept."""
        for block, nbytes in self._kept.pop(kind, []):
            self._free(kind, nbytes, block)

    def phase(self) -> Phase:
        """End a phase: return its peak and empty the allocator's cache."""
        kinds = {kind: self._most[kind] for kind in KINDS if self._most[kind]}
        allocated = reserved = self._most.total()
        if self._on_cuda:
            allocated, reserved = self._allocator.peak_allocated, self._allocator.peak_reserved
        self._allocator.empty_cache()
        self._most = self._now.copy()
        return Phase(kinds, allocated, reserved)
