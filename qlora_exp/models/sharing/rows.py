"""Put the rows of several jobs through one base model in one pass, each job's through its own adapter.

The pass computes the base's layers once for the rows of all jobs. At each layer that a job adapts, PEFT's own layer of
that job gets the job's rows and what the base layer made of them.
"""

import itertools
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from qlora_exp.environment.turns import Turns
from qlora_exp.models.sharing import layout
from qlora_exp.utils.errors import is_out_of_memory

log = logging.getLogger(__name__)

_DROPOUT = re.compile(r"^(?!classifier|summary).*(dropout|pdrop|_drop$)")
"""Names of settings of models that drop values of activations in training."""


@dataclass
class _Batch:
    """Rows that a job wants to put through the base."""

    ids: torch.Tensor
    """(rows, tokens)."""
    mask: torch.Tensor
    """(rows, tokens); 0 for padding."""
    positions: torch.Tensor | None
    """(1, tokens), each token's place in its row, if the rows follow one another in one sequence."""
    kind: tuple[bool, str, tuple[str, ...]]
    """Whether the job trains, else it evaluates; the dtype of autocast; the marks of rows that follow one another.

    Only batches of one kind go together.
    """
    random: torch.Tensor
    """The job's random state, of the device, when its rows went in."""
    after: Any = None
    """The same after the pass."""
    before: Sequence[torch.Tensor | None] = ()
    """Gradients of the job's adapter before the pass."""
    hidden: torch.Tensor | None = None
    """What the base made of the rows, (rows, tokens, hidden size); its gradient comes from the job's backward pass."""
    has_gradients: bool = False
    rows: slice = field(default_factory=lambda: slice(0))
    """Place among the rows of the pass."""

    @property
    def gradient(self) -> torch.Tensor | None:
        """Gradient of `hidden`; None if the job has failed."""
        return None if self.hidden is None else self.hidden.grad


@dataclass
class _Pass:
    """A forward and backward pass through the base."""

    batches: Mapping[int, _Batch]
    trains: bool
    hidden: torch.Tensor | None = None
    """What the base made of all rows."""
    drawn: dict[tuple[str, int], Any] = field(default_factory=dict)
    """Random state of a job before it drew numbers at a layer, which recomputation draws again."""
    error: BaseException | None = None
    """Why its backward pass failed."""


class Rows:
    """Jobs whose rows go through the base together."""

    def __init__(self, turns: Turns, base: Any, recomputes: bool) -> None:
        """Create it without jobs.

        Args:
            turns: the jobs' turns.
            base: the base model without adapters, whose weights all jobs share.
            recomputes: whether activations are recomputed in the backward pass.
        """
        self._turns = turns
        self._base = base.train()
        if recomputes:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self._models: dict[int, Any] = {}
        self._most = turns.at_once
        """Number of jobs that go together, at most; halved when memory runs out."""
        self._waiting: dict[int, _Batch] = {}
        self._pass: _Pass | None = None
        self._left: set[int] = set()
        self._adapted: set[str] = set()
        self._drawing: set[tuple[str, int]] = set()
        """Names of layers that draw random numbers, with the number of the job."""
        self._output: Any = None
        """Class of what the base returns."""

    @contextmanager
    def joined(self, number: int, model: Any) -> Iterator[None]:
        """Let the batches of a job go through the base with those of the others inside.

        Batches that it evaluates wait for the other jobs too, and go through with those that others evaluate then.
        Generated tokens do not: each job has a cache of its own, and its answers end at other lengths.

        Args:
            number: number of the job.
            model: its base model with the adapter, a `PeftModel`.
        """
        self._left.discard(number)
        self._models[number] = inner = model.get_base_model()
        layers: dict[str, Any] = dict(inner.base_model.named_modules())
        for name, layer in layers.items():
            if not isinstance(layer, BaseTunerLayer):
                continue
            if any(isinstance(part, torch.nn.Dropout) and part.p for part in cast(Any, layer).modules()):
                self._drawing.add((name, number))
            if name not in self._adapted:
                self._adapted.add(name)
                self._base.base_model.get_submodule(name).register_forward_hook(partial(self._adapt, name))
        alone = inner.base_model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() and (args or layout.more_than_rows(kwargs)):
                return alone(*args, **kwargs)
            return self._forward(number, alone, *args, **kwargs)

        try:
            with _calling(inner.base_model, forward):
                yield
        finally:  # the others go on without it
            self._left.add(number)
            self._waiting.pop(number, None)

    def _forward(self, number: int, alone: Any, input_ids: Any, attention_mask: Any = None, **others: Any) -> Any:
        if unknown := layout.more_than_rows({**others, "attention_mask": attention_mask}):
            raise TypeError(f"rows of several jobs cannot go together with {', '.join(unknown)}")
        device, trains = input_ids.device, torch.is_grad_enabled()
        dtype = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else ""
        marks = tuple(name for name in layout.MARKS if others.get(name) is not None)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = others.get("position_ids")
        batch = _Batch(input_ids, mask, positions, (trains, dtype, marks), _random_state(device))
        self._waiting[number] = batch
        while batch.hidden is None:
            there = [each for each in self._turns.running if each not in self._left]
            begin = there.index(number) // self._most * self._most
            party = there[begin : begin + self._most]
            if self._pass is not None or any(each not in self._waiting for each in party):
                self._turns.pass_on(number)
                continue
            # Evaluation, which jobs that train wait for; else what has waited longest.
            evaluated = [each for each in self._waiting if each in party and not self._waiting[each].kind[0]]
            first = self._waiting[next(iter(evaluated), next(each for each in self._waiting if each in party))].kind
            batches = {each: self._waiting[each] for each in party if self._waiting[each].kind == first}
            if [*batches] == [number] and not trains:
                del self._waiting[number]
                return alone(input_ids=input_ids, attention_mask=attention_mask, **others)
            self._enter(batches)
        _set_random_state(batch.after, device)
        return self._output(last_hidden_state=batch.hidden)

    def _enter(self, batches: Mapping[int, _Batch]) -> None:
        """Put the rows of these jobs through the base; if memory runs out, let fewer go together instead."""
        for gone in self._left & {*self._models}:
            del self._models[gone]
        try:
            with self._timed(batches):
                self._through(batches)
        except BaseException as error:
            self._pass = None
            for batch in batches.values():
                batch.hidden = None
            if not is_out_of_memory(error) or len(batches) == 1:
                raise
        else:
            for number in batches:
                del self._waiting[number]
            return
        self._halve(batches)

    def _halve(self, batches: Mapping[int, _Batch]) -> list[dict[int, _Batch]]:
        """Divide jobs; called outside of `except` clauses, whose tracebacks would keep the tensors."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        half = math.ceil(len(batches) / 2)
        halves = [dict(itertools.islice(batches.items(), *ends)) for ends in ((half,), (half, None))]
        log.warning("out of memory with the rows of %d jobs in one pass; %d from now on", len(batches), half)
        self._most = half
        return halves

    def _through(self, batches: Mapping[int, _Batch]) -> None:
        begin, (trains, autocast, marks) = 0, next(iter(batches.values())).kind
        for number, batch in batches.items():
            batch.rows = slice(begin, begin := begin + len(batch.ids))
            batch.after = batch.random
            batch.before = [None if each.grad is None else each.grad.clone() for each in self._trained(number)]
        ids = [batch.ids for batch in batches.values()]
        if marks:
            positions = [batch.positions for batch in batches.values() if batch.positions is not None]
            rows = layout.in_one_sequence_each(ids, positions, marks)
        else:
            rows = layout.padded_rows(ids, [batch.mask for batch in batches.values()])
        self._pass = _Pass(batches, trains)
        dtype = getattr(torch, autocast.removeprefix("torch."), None)
        device = rows["input_ids"].device.type
        with torch.set_grad_enabled(trains), torch.autocast(device, dtype, enabled=bool(autocast)):
            output = self._base.base_model(**rows, use_cache=False)
        self._output, hidden = type(output), output.last_hidden_state
        for batch in batches.values():
            if batch.hidden is None:
                batch.hidden = hidden[batch.rows, : batch.ids.shape[1]].detach().requires_grad_(trains)
        if trains:
            self._pass.hidden = hidden
        else:
            self._pass = None

    def _adapt(self, name: str, _module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Let each job's layer of that name adapt what the base layer made of the job's rows."""
        assert self._pass is not None
        whole, parts = inputs[0], []
        for number, batch in self._pass.batches.items():
            layer = self._models[number].base_model.get_submodule(name)
            given, made, length = whole[batch.rows], output[batch.rows], batch.ids.shape[1]
            if isinstance(layer, BaseTunerLayer):
                given, made = given[:, :length], made[:, :length]
                draws = self._pass.trains and (name, number) in self._drawing
                recomputes = (name, number) in self._pass.drawn
                if draws:  # its own numbers, and in recomputation the same ones again
                    _set_random_state(self._pass.drawn.setdefault((name, number), batch.after), given.device)
                made = layout.padded(_adapted(layer, given, made), output.shape[1])
                if draws and not recomputes:
                    batch.after = _random_state(given.device)
            parts.append(made)
        return torch.cat(parts)

    def backward(self, number: int) -> None:
        """Put the job's gradients back through the base, with those of the others; return when that is done."""
        current = self._pass
        assert current is not None
        current.batches[number].has_gradients = True
        while self._pass is current:
            missing = [each for each, batch in current.batches.items() if not batch.has_gradients]
            if all(each in self._left for each in missing):
                device = current.batches[number].ids.device
                outside = _random_state(device)
                try:
                    with self._timed(current.batches):
                        self._back(current.batches)
                except BaseException as error:
                    current.error = error
                    raise
                finally:
                    self._pass = None
                    _set_random_state(outside, device)
            else:
                self._turns.pass_on(number)
        if current.error is not None:  # the gradients are incomplete
            raise current.error

    def _back(self, batches: Mapping[int, _Batch]) -> None:
        """Put the gradients of these jobs through the base; if memory runs out, those of one half after the other."""
        try:
            self._one_back(batches)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(batches) == 1:
                raise
        else:
            return
        self._pass = None
        for number, batch in batches.items():
            for parameter, gradient in zip(self._trained(number), batch.before, strict=True):
                parameter.grad = gradient
        for half in self._halve(batches):
            self._through(half)
            self._back(half)

    def _one_back(self, batches: Mapping[int, _Batch]) -> None:
        assert self._pass is not None
        hidden, self._pass.hidden = self._pass.hidden, None
        assert hidden is not None
        gradient = torch.zeros_like(hidden)
        for batch in batches.values():
            if batch.gradient is not None:
                gradient[batch.rows, : batch.ids.shape[1]] = batch.gradient
        hidden.backward(gradient)

    def _trained(self, number: int) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self._models[number].base_model.parameters() if parameter.requires_grad]

    @contextmanager
    def _timed(self, batches: Mapping[int, _Batch]) -> Iterator[None]:
        """Share the time inside among the jobs, by their tokens with padding."""
        begin = time.perf_counter()
        yield
        total = sum(batch.ids.numel() for batch in batches.values())
        seconds = time.perf_counter() - begin
        self._turns.share(seconds, {number: batch.ids.numel() / total for number, batch in batches.items()})


def by_turns(model: Any, in_sequences: bool = False) -> str | None:
    """Return why rows of several jobs cannot go through a base model together; None if they can.

    Args:
        model: the base model.
        in_sequences: whether rows follow one another in a sequence (packing, no padding).
    """
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        return "the loss of the experts' router is that of a batch"
    # flash-linear-attention refuses `cu_seqlens` with more than one sequence.
    if in_sequences and "linear_attention" in (getattr(config, "layer_types", None) or ()):
        return "its layers of linear attention keep rows apart in one sequence only"
    for name, value in vars(config).items():
        if _DROPOUT.search(name) and isinstance(value, float) and value:
            return f"{name} of the base would draw from the random numbers of one job"
    return None


def _adapted(layer: Any, given: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Return what an adapted layer makes of `given`, if its base layer makes `made` of that."""
    base, alone = layer.base_layer, layer.base_layer.forward

    def forward(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return made if values is given else alone(values, *args, **kwargs)

    with _calling(base, forward):
        return layer(given)


@contextmanager
def _calling(module: Any, forward: Any) -> Iterator[None]:
    """Let a module compute `forward` inside."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
