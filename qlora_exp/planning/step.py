"""Record what a training step allocates and computes on fake tensors: passes over a few layers, and the update.

This module does not read configs. Callers pass functions that build the model, its loss and its optimizer.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftType
from peft.optimizers import create_lorafa_optimizer
from transformers.optimization import Adafactor

from qlora_exp.config.tables.optimizers import COMPILED
from qlora_exp.libraries.torch import FakeTensorMode, storage_address
from qlora_exp.models import adapters
from qlora_exp.models.layers.experts import packed_experts
from qlora_exp.models.trained import layers_of, recompute_first
from qlora_exp.planning.packed_weights import stored_bytes
from qlora_exp.planning.recording.deepen import IrregularError, deepen, stand_ins
from qlora_exp.planning.recording.fake_tensors import (
    Event,
    Offloading,
    Recorder,
    Work,
    layers_marked,
    materialize,
)

_AFTER_START = 100
"""A step of schedule-free RAdam after those of its start, which allocate less."""
_FROZEN = 3
"""Number of frozen layers that stand for all."""
_EIGHT_BIT = {"adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1}
_FOUR_BYTES = {"paged_adamw_32bit": 2, "lion_32bit": 1, "paged_lion_32bit": 1}
"""Optimizers of bitsandbytes, with the number of states for each trained value."""


@dataclass(frozen=True)
class Model:
    """The part of a run's memory that does not depend on the batch."""

    static: list[tuple[str, int]]
    """Kind and bytes of each weight, in the model's order."""
    updates: list[list[Event]]
    """Events of the optimizer's first step and of its second."""
    parameters: tuple[int, int]
    """Number of trainable parameters and of all parameters."""
    paged: int
    """Bytes of optimizer states that are paged."""
    loading: int = 0
    """Bytes that loading takes besides for a moment: experts before they are packed."""


@dataclass
class Step:
    """Events and work of a training step before the optimizer's update, and events of an evaluation step."""

    passes: list[Event] = field(default_factory=list)
    evaluation: list[Event] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """Shape of a batch."""

    rows: int
    length: int
    masked: bool
    """Whether attention gets a mask, for padding or for the ends of packed rows."""


@dataclass
class Kept:
    """An optimizer to run on fake tensors, or the size of the states of one that only bitsandbytes can create."""

    run: torch.optim.Optimizer | None = None
    nbytes: list[int] = field(default_factory=list)
    """Bytes of each additional tensor that stays allocated."""
    paged: int = 0
    """Bytes in managed memory."""


def optimizer(
    name: str,
    many: bool,
    model: Any,
    settings: Mapping[str, Any] = MappingProxyType({}),
    own: Callable[..., torch.optim.Optimizer | None] = lambda *_, **__: None,
) -> Kept:
    """Build the run's optimizer, or compute the size of its states.

    Args:
        name: transformers' name of the optimizer, or `lorafa`.
        many: update all parameters in one operation (`foreach`), as torch does on a GPU.
        model: the model whose trainable parameters the optimizer updates.
        settings: `optim_args`.
        own: builds the optimizer of a model, if transformers does not.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [tensor for tensor in parameters if (tensor.ndim > 1) is decays]} for decays in (True, False)]
    groups = [group for group in groups if group["params"]]
    kept = Kept(nbytes=_importances(model))
    match name:
        case "adamw_torch":
            kept.run = torch.optim.AdamW(groups, foreach=many)
        case "adamw_torch_fused":
            kept.run = torch.optim.AdamW(groups, fused=True)
        case "sgd":
            kept.run = torch.optim.SGD(groups, lr=1e-3, foreach=many, **settings)
        case "rmsprop":
            kept.run = torch.optim.RMSprop(groups, foreach=many, **settings)
        case "adagrad":
            kept.run = torch.optim.Adagrad(groups, foreach=many, **settings)
        case "adafactor":  # with the settings of transformers
            kept.run = Adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False)
        case "lorafa":
            lora: Any = model.active_peft_config
            kept.run = create_lorafa_optimizer(model, lora.r, lora.lora_alpha, lr=1e-3)
        case _ if name in COMPILED:  # its compiled step allocates only states
            bits = 8 if name.endswith("8bit") else 4
            for parameter in parameters:
                kept.nbytes += 2 * _blocks(parameter, bits, settings.get("block_size", 256))
        case _ if (built := own(model, foreach=many)) is not None:
            if callable(begin := getattr(built, "train", None)):  # a schedule-free one
                begin()
                for group in built.param_groups:
                    group["k"] = _AFTER_START
            kept.run = built
        case _:  # an optimizer of bitsandbytes
            tables = {id(layer.weight) for layer in model.modules() if isinstance(layer, torch.nn.Embedding)}
            for parameter in parameters:
                sizes = _states(name, parameter.numel(), id(parameter) in tables)
                if name.startswith("paged") and parameter.numel() >= 100_000:
                    kept.paged += sum(sizes)
                else:
                    kept.nbytes += sizes
    return kept


def _states(name: str, count: int, table: bool) -> list[int]:
    """Return the bytes of bitsandbytes' states for a tensor: 4 per value, or in 8 bits 1 and a scale per 256 values.

    Small tensors and embeddings (as transformers configures them) always use 4 bytes per value.
    """
    sizes = [count, 4 * -(-count // 256)] if name in _EIGHT_BIT and count >= 4096 and not table else [4 * count]
    return sizes * {**_EIGHT_BIT, **_FOUR_BYTES}[name]


def _blocks(parameter: torch.Tensor, bits: int, block: int) -> list[int]:
    """Return the bytes of a state of torchao: codes, a scale for each block, and a table; small tensors are plain."""
    if (count := parameter.numel()) < 4096 or count % block:
        return [parameter.nbytes]
    return [count * bits // 8, 4 * count // block, 4 * 2**bits]


def _importances(model: Any) -> list[int]:
    """Return the bytes of AdaLoRA's importance scores: three values for each value of the adapter."""
    if getattr(getattr(model, "active_peft_config", None), "peft_type", None) != PeftType.ADALORA:
        return []
    return [p.numel() * p.element_size() for name, p in model.named_parameters() if "lora_" in name] * 3


def weigh(model: Any, optimizer: Callable[[Any], Kept]) -> Model:
    """Compute the static memory of a model on the meta device, and record its optimizer's steps on fake tensors."""
    static = [*static_of([*model.parameters(), *model.buffers()])]
    # As they are read, each by itself in most files, and as the tensor that they are joined to.
    loading = 2 * max((experts.numel() * experts.element_size() for _, experts in packed_experts(model)), default=0)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    materialize(model, mode, frozen=False)
    kept = optimizer(model)
    return Model(static, _updates(kept, model, mode), adapters.count_parameters(model), kept.paged, loading)


def record(
    build: Callable[[int], Any],
    depth: int,
    batch: Batch,
    *,
    loss: Callable[..., torch.Tensor],
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    evaluated: Batch | None = None,
    alike: bool = True,
    last: int | None = None,
    offloads: bool = False,
    on_gpu: bool = False,
    recomputed: int | None = None,
) -> Step:
    """Record a training step, and an evaluation step if requested, by running a few layers on fake tensors.

    Args:
        build: builds the model on the meta device with the given number of layers.
        depth: number of layers of the real model.
        batch: batch of training.
        loss: computes the loss from model, ids and mask.
        computing: creates the context of forward passes.
        evaluated: batch of evaluation; None: no evaluation.
        alike: whether the first and last layers of a few are trained as those of all; else all layers are run.
        last: number of trained layers, the last ones, of a model of which nothing else is trained. Frozen layers before
            them keep nothing, so that a few stand for all. None: others are trained.
        offloads: whether what the backward pass needs goes to the machine's memory.
        on_gpu: whether the fake tensors, which are on the CPU, stand for those of a GPU.
        recomputed: number of layers, the first ones, that recompute, if others do not.
    """
    passes = partial(_passes, loss=loss, computing=computing, offloads=offloads, on_gpu=on_gpu)
    if last is not None and depth - last > _FROZEN:
        return _with_few_frozen(build, depth, last, passes, batch, evaluated)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    step = Step()
    every = [1] * depth
    few = stand_ins(depth, recomputed) if alike else every
    for counts in (few, every) if few != every else (every,):
        recorder = passes(_short(build, counts, recomputed), mode, batch)
        rest = passes(_short(build, counts, recomputed), mode, evaluated, train=False) if evaluated else None
        try:
            step.passes = deepen(recorder.recording, counts) if counts != every else recorder.recording.events
            if rest is not None:
                step.evaluation = deepen(rest.recording, counts) if counts != every else rest.recording.events
        except IrregularError:
            continue  # record the model at its full depth, which takes longer
        for (name, place), works in recorder.recording.work.items():
            step.work += works * (counts[place] if name in ("forward", "backward") else 1)
        break
    return step


def _short(build: Callable[[int], Any], counts: Sequence[int], recomputed: int | None) -> Any:
    """Build a model whose layers stand for those of a deep one, of which the first `recomputed` recompute."""
    model = build(len(counts))
    if recomputed is not None:
        recompute_first(model, next(n for n in range(len(counts) + 1) if sum(counts[:n]) >= recomputed))
    return model


def _with_few_frozen(
    build: Callable[[int], Any],
    depth: int,
    last: int,
    passes: Callable[..., Recorder],
    batch: Batch,
    evaluated: Batch | None,
) -> Step:
    """Record a model that trains its last layers only, with a few of its frozen ones."""
    few, mode = last + _FROZEN, FakeTensorMode(allow_non_fake_inputs=True)
    recording = passes(build(few), mode, batch).recording
    step = Step(passes=recording.events)
    if evaluated is not None:
        step.evaluation = passes(build(few), mode, evaluated, train=False).recording.events
    for place, works in recording.work.items():
        step.work += works * (1 + depth - few if place == ("forward", 1) else 1)
    return step


def _passes(
    model: Any,
    mode: FakeTensorMode,
    batch: Batch,
    loss: Callable[..., torch.Tensor],
    computing: Callable[[], AbstractContextManager[Any]],
    train: bool = True,
    offloads: bool = False,
    on_gpu: bool = False,
) -> Recorder:
    """Record a forward pass and, if `train`, a backward pass."""
    materialize(model, mode)
    model.train(train)
    recorder = Recorder(on_gpu)
    recorder.ignore([*model.parameters(), *model.buffers()])
    with mode:
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        mask = torch.ones_like(ids) if batch.masked else None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(recorder.is_gradient)
    marked = layers_marked(recorder, layers_of(model))
    saving = Offloading(recorder) if train and offloads else nullcontext()
    with mode, recorder, marked, _garbage_collector_off(), torch.set_grad_enabled(train):
        with computing(), saving:
            value = loss(model, ids, mask)
        if train:
            recorder.group, recorder.kind = ("loss", 1), "temporary"
            value.backward()
        if isinstance(saving, Offloading):
            saving.close()
        recorder.group = ("end", 0)
        del value
    return recorder


@contextmanager
def _garbage_collector_off() -> Iterator[None]:
    """Disable Python's garbage collector: the moment when it runs would change which releases are recorded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def static_of(tensors: Iterable[torch.Tensor]) -> Iterator[tuple[str, int]]:
    """Yield kind and bytes of what stays allocated: weights, quantization constants, trainable parameters."""
    seen: set[int] = set()
    for tensor in tensors:
        # A view keeps all of its storage alive, such as a slice of a factor; several views of one keep it once.
        if (storage := storage_address(tensor)) in seen:
            continue
        seen.add(storage)
        if (sizes := stored_bytes(tensor)) is not None:
            yield "weights", sizes[0]
            for constant in sizes[1:]:
                yield "quantization", constant
        else:
            yield "trainable" if tensor.requires_grad else "weights", tensor.untyped_storage().nbytes()


def _updates(kept: Kept, model: Any, mode: FakeTensorMode) -> list[list[Event]]:
    """Record what gradient clipping and the optimizer allocate in a first and in a second step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with mode:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    recorder = Recorder()
    recorder.ignore([*model.parameters(), *(parameter.grad for parameter in trained if parameter.grad is not None)])
    steps = []
    for kind in ("optimizer", "temporary"):
        with mode, recorder, _garbage_collector_off():
            recorder.kind = "temporary"
            torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
            recorder.kind = kind
            if kept.run is not None:
                kept.run.step()
        steps.append(recorder.recording.events)
        recorder.recording.events = []
    steps[0] += [Event(("end", 0), -place, size, "optimizer") for place, size in enumerate(kept.nbytes, start=1)]
    return steps
