"""What a training step allocates and computes: passes over a few layers, and the optimizer's update, on fake tensors.

Knows nothing of configs: it is told how to build a model, its loss and its optimizer.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftType
from peft.optimizers import create_lorafa_optimizer
from transformers.optimization import Adafactor

from qlora_exp.libraries.torch import FakeTensorMode
from qlora_exp.models import adapters
from qlora_exp.planning.fake_tensors import (
    LAYERS,
    Event,
    IrregularError,
    Recorder,
    Work,
    deepen,
    layers_marked,
    materialize,
)
from qlora_exp.planning.packed_weights import stored_bytes

_EIGHT_BIT = {"adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1}
_FOUR_BYTES = {"paged_adamw_32bit": 2, "lion_32bit": 1, "paged_lion_32bit": 1}
"""bitsandbytes' optimizers: states for each trained value."""


@dataclass(frozen=True)
class Model:
    """What no batch changes."""

    static: list[tuple[str, int]]
    """Kind and bytes of weights, in the order of the model."""
    updates: list[list[Event]]
    """The optimizer's first step, and its second."""
    parameters: tuple[int, int]
    """Trained, and all."""
    paged: int
    """Bytes of optimizer states that are paged."""


@dataclass
class Step:
    """Bytes and order of what a training step allocates before the optimizer's, and of an evaluation step."""

    passes: list[Event] = field(default_factory=list)
    evaluation: list[Event] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """What a step computes at once."""

    rows: int
    length: int
    masked: bool
    """Attention is told what is padding, or where a packed row ends."""


@dataclass
class Kept:
    """An optimizer to run, or what one keeps that only bitsandbytes makes."""

    run: torch.optim.Optimizer | None = None
    nbytes: list[int] = field(default_factory=list)
    """Of each tensor more that stays."""
    paged: int = 0
    """Bytes in managed memory."""


def optimizer(name: str, many: bool, model: Any) -> Kept:
    """The run's.

    Args:
        name: transformers' name of it, or lorafa.
        many: all parameters in one operation, as torch chooses on a GPU.
        model: whose parameters it trains.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [one for one in parameters if (one.ndim > 1) is decays]} for decays in (True, False)]
    groups = [group for group in groups if group["params"]]
    kept = Kept(nbytes=_importances(model))
    match name:
        case "adamw_torch":
            kept.run = torch.optim.AdamW(groups, foreach=many)
        case "adamw_torch_fused":
            kept.run = torch.optim.AdamW(groups, fused=True)
        case "sgd":
            kept.run = torch.optim.SGD(groups, lr=1e-3, foreach=many)
        case "rmsprop":
            kept.run = torch.optim.RMSprop(groups, foreach=many)
        case "adagrad":
            kept.run = torch.optim.Adagrad(groups, foreach=many)
        case "adafactor":  # as transformers sets it up
            kept.run = Adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False)
        case "lorafa":
            lora: Any = model.active_peft_config
            kept.run = create_lorafa_optimizer(model, lora.r, lora.lora_alpha, lr=1e-3)
        case _:  # bitsandbytes'
            tables = {id(layer.weight) for layer in model.modules() if isinstance(layer, torch.nn.Embedding)}
            for one in parameters:
                sizes = _states(name, one.numel(), id(one) in tables)
                if name.startswith("paged") and one.numel() >= 100_000:
                    kept.paged += sum(sizes)
                else:
                    kept.nbytes += sizes
    return kept


def _states(name: str, count: int, table: bool) -> list[int]:
    """Bytes of bitsandbytes' states for a tensor: 4 a value, or one and a scale for 256 of them.

    Small tensors and embeddings (transformers sees to that) keep 4 bytes.
    """
    sizes = [count, 4 * -(-count // 256)] if name in _EIGHT_BIT and count >= 4096 and not table else [4 * count]
    return sizes * {**_EIGHT_BIT, **_FOUR_BYTES}[name]


def _importances(model: Any) -> list[int]:
    """What AdaLoRA keeps to move ranks: three values for each of its own."""
    if getattr(getattr(model, "active_peft_config", None), "peft_type", None) != PeftType.ADALORA:
        return []
    return [p.numel() * p.element_size() for name, p in model.named_parameters() if "lora_" in name] * 3


def weigh(whole: Any, optimizer: Callable[[Any], Kept]) -> Model:
    """What a model on the meta device keeps, and its optimizer's steps, on fake tensors."""
    static = [*_static(whole)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    materialize(whole, mode, frozen=False)
    kept = optimizer(whole)
    return Model(static, _updates(kept, whole, mode), adapters.count_parameters(whole), kept.paged)


def record(
    build: Callable[[int], Any],
    depth: int,
    batch: Batch,
    *,
    loss: Callable[..., torch.Tensor],
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    evaluated: Batch | None = None,
) -> Step:
    """Run a few layers on fake tensors.

    Args:
        build: a model on the meta device with so many layers.
        depth: layers of the real one.
        batch: of training.
        loss: of the model, ids and mask.
        computing: context of forward passes.
        evaluated: batch of evaluation; None for none.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    step = Step()
    for few in (LAYERS, depth) if depth > LAYERS else (depth,):
        recorder = _passes(build(few), mode, batch, loss, computing)
        rest = _passes(build(few), mode, evaluated, loss, computing, train=False) if evaluated else None
        try:
            step.passes = deepen(recorder.recording, depth) if few != depth else recorder.recording.events
            if rest is not None:
                step.evaluation = deepen(rest.recording, depth) if few != depth else rest.recording.events
        except IrregularError:
            continue  # as deep as it is, which takes longer
        extra = depth - few
        for (name, place), works in recorder.recording.work.items():
            alike = name in ("forward", "backward") and place == few // 2
            step.work += works * (1 + extra if alike else 1)
        break
    return step


def _passes(
    model: Any,
    mode: FakeTensorMode,
    batch: Batch,
    loss: Callable[..., torch.Tensor],
    computing: Callable[[], AbstractContextManager[Any]],
    train: bool = True,
) -> Recorder:
    """A forward pass and, if it trains, a backward pass."""
    materialize(model, mode)
    model.train(train)
    recorder = Recorder()
    recorder.ignore([*model.parameters(), *model.buffers()])
    with mode:
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        mask = torch.ones_like(ids) if batch.masked else None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(recorder.is_gradient)
    marked = layers_marked(recorder, _layers(model))
    with mode, recorder, marked, _nothing_collected(), torch.set_grad_enabled(train):
        with computing():
            found = loss(model, ids, mask)
        if train:
            recorder.kind = "temporary"
            found.backward()
        recorder.group = ("end", 0)
        del found
    return recorder


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Inside, Python collects no cycles: when it does would change what is recorded as freed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _layers(model: Any) -> list[torch.nn.Module]:
    """The decoder's layers: the longest list of modules of one kind."""
    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda layers: (len(layers), sum(len([*layer.modules()]) for layer in layers)))


def _static(model: Any) -> Iterator[tuple[str, int]]:
    """Kind and bytes of what stays: weights, constants of quantization, what trains."""
    seen: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if (sizes := stored_bytes(tensor)) is not None:
            yield "weights", sizes[0]
            for constant in sizes[1:]:
                yield "quantization", constant
        else:
            yield "trainable" if tensor.requires_grad else "weights", tensor.numel() * tensor.element_size()


def _updates(kept: Kept, model: Any, mode: FakeTensorMode) -> list[list[Event]]:
    """What clipping and the optimizer allocate in a first and in a second step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with mode:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    recorder = Recorder()
    recorder.ignore([*model.parameters(), *(parameter.grad for parameter in trained if parameter.grad is not None)])
    steps = []
    for kind in ("optimizer", "temporary"):
        with mode, recorder, _nothing_collected():
            recorder.kind = "temporary"
            torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
            recorder.kind = kind
            if kept.run is not None:
                kept.run.step()
        steps.append(recorder.recording.events)
        recorder.recording.events = []
    steps[0] += [Event(("end", 0), -place, size, "optimizer") for place, size in enumerate(kept.nbytes, start=1)]
    return steps
