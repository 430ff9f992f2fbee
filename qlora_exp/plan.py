"""What a run will need, before it runs: memory by phase, and the work of a step. No weights, no GPU, no hub.

The architecture's real code runs on fake tensors (`fake`); what it allocates goes through a model of torch's allocator
(`allocator`). The only formulas are sizes of what bitsandbytes keeps. Knows nothing of recorded runs.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from qlora_exp import adapters, quantization
from qlora_exp.allocator import CachingAllocator
from qlora_exp.device import Resolved
from qlora_exp.errors import ConfigError, UserError
from qlora_exp.fake import LAYERS, Event, IrregularError, Recorder, Work, deepen, layers_marked, materialize
from qlora_exp.model import model_config
from qlora_exp.schema import Config

KINDS = ("weights", "quantization", "trainable", "gradients", "optimizer", "activations", "loss", "temporary")
"""What memory is for; `loss` has the logits."""
_EIGHT_BIT = {"adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1}
_FOUR_BYTES = {"paged_adamw_32bit": 2, "lion_32bit": 1, "paged_lion_32bit": 1}
"""bitsandbytes' optimizers: states for each trained value."""


@dataclass(frozen=True)
class Phase:
    """The fullest moment of a phase, bytes."""

    kinds: dict[str, int]
    """What was allocated then, by KINDS."""
    reserved: int
    """By the allocator, at most; on a CPU, which has none of this kind, what was allocated."""

    @property
    def allocated(self) -> int:
        """All that tensors took."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Prediction:
    """What a run will need."""

    phases: dict[str, Phase]
    """load, first_step, steady, evaluation: as a run measures them."""
    work: list[Work]
    """Each operation of one forward and backward pass."""
    trainable: int
    total: int
    """Parameters."""
    in_16_bits: bool = True
    """Whether matrix products are computed so."""

    @property
    def peak(self) -> int:
        """Bytes reserved in the fullest phase."""
        return max(phase.reserved for phase in self.phases.values())


@dataclass
class Step:
    """What repeats: bytes and order of a training step and of an evaluation step, and what stays."""

    static: list[tuple[str, int]] = field(default_factory=list)
    """Kind and bytes of weights, in the order of the model."""
    passes: list[Event] = field(default_factory=list)
    updates: list[list[Event]] = field(default_factory=list)
    """The optimizer's first step, and its second."""
    evaluation: list[Event] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    """Trained, and all."""


def predict(config: Config, resolved: Resolved) -> Prediction:
    """Memory and work of a run whose longest batch is as long as `max_length` lets it be.

    Raises:
        ConfigError: the method does not apply, or it cannot be predicted with this quantization.
        ModelError: the architecture is not known here.
    """
    training = config.training
    architecture = model_config(config.model)
    if training.max_length > (most := getattr(architecture, "max_position_embeddings", training.max_length)):
        raise ConfigError(f"training.max_length={training.max_length}: this model has {most} positions")

    if config.optimizer.lora_optimizer == "lorafa":
        raise ConfigError("optimizer.lora_optimizer=lorafa cannot be planned yet: choose optimizer=adamw_torch")

    def build(layers: int) -> Any:
        return build_model(config, resolved, architecture, layers)

    on_cuda = resolved.device == "cuda"
    try:
        with _loss_without_values(on_cuda):
            rows, length = training.per_device_train_batch_size, training.max_length
            step = record(
                build,
                architecture.num_hidden_layers,
                (1, rows * length) if training.packing else (rows, length),
                loss=fused_loss,
                optimizer=lambda parameters: optimizer(resolved, parameters),
                computing=lambda: computing(resolved),
                evaluated=(training.per_device_eval_batch_size, length),
                # A row alone has no padding; FlashAttention needs no mask.
                masked=(training.packing or rows > 1)
                and not (config.model.attn_implementation or "").startswith("flash"),
            )
    except UserError as error:
        raise type(error)(f"cannot be planned: {error}") from error
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:  # of code that wants values, by design
        raise ConfigError(
            f"method={config.method.name} cannot be planned: its code looks at values, which a plan has none of "
            f"({type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]:.120})"
        ) from error
    phases = play(step, on_cuda, training.gradient_accumulation_steps > 1)
    in_16_bits = resolved.bf16 or resolved.fp16 or resolved.dtype != "float32"
    return Prediction(phases, step.work, *step.parameters, in_16_bits)


def build_model(config: Config, resolved: Resolved, architecture: PretrainedConfig, layers: int) -> Any:
    """The run's model with `layers` layers, quantized and with its adapter, on the meta device."""
    values = architecture.to_dict() | {"num_hidden_layers": layers}
    if (kinds := values.get("layer_types")) is not None:
        values["layer_types"] = kinds[:layers]
    shorter = type(architecture)(**values)
    dtype = getattr(torch, resolved.dtype)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shorter, dtype=dtype, attn_implementation=_attention(config))
        quantization.quantize_meta(base, config.quantization, resolved)
        base.config.use_cache = False
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))  # as TRL does before PEFT
        settings: Any = adapters.peft_config(config, base)
        if config.lora_start is not None:
            settings.init_lora_weights = True  # where LoRA starts changes no sizes, and would want weights and rows
        model = adapters.attach(base, settings, resolved.adapter_dtype)
    if resolved.gradient_checkpointing:
        if settings is not None:
            base.enable_input_require_grads()
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _attention(config: Config) -> str:
    # FlashAttention keeps what torch's own fused attention keeps; its package need not be here.
    return "eager" if config.model.attn_implementation == "eager" else "sdpa"


def fused_loss(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """TRL's, which never has all logits at once."""
    found = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, fused_lm_head=True)
    return -found.log_probs.sum()


def computing(resolved: Resolved) -> AbstractContextManager[Any]:
    """The precision that training computes in."""
    half = torch.float16 if resolved.fp16 else torch.bfloat16
    return torch.autocast("cpu", half) if resolved.bf16 or resolved.fp16 else nullcontext()


Optimizer = torch.optim.Optimizer | list[int]
"""One to run, or the bytes of each tensor that it keeps."""


def optimizer(resolved: Resolved, parameters: list[torch.nn.Parameter]) -> Optimizer:
    """The run's: torch's own to run, bitsandbytes' by what it keeps.

    Raises:
        ConfigError: what it keeps is not known.
    """
    many = resolved.device == "cuda"  # torch's choice there: all parameters in one operation
    kept = [one for one in parameters if one.ndim > 1]
    groups = [{"params": kept}, {"params": [one for one in parameters if one.ndim <= 1]}]
    groups = [group for group in groups if group["params"]]
    match resolved.optim:
        case "adamw_torch":
            return torch.optim.AdamW(groups, foreach=many)
        case "adamw_torch_fused":
            return torch.optim.AdamW(groups, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=1e-3, foreach=many)
        case "rmsprop":
            return torch.optim.RMSprop(groups, foreach=many)
        case "adagrad":
            return torch.optim.Adagrad(groups, foreach=many)
        case name if name in _EIGHT_BIT or name in _FOUR_BYTES:
            return bitsandbytes_states(name, parameters)
    raise ConfigError(f"optimizer.optim={resolved.optim} cannot be planned yet: choose adamw_torch")


def record(
    build: Callable[[int], Any],
    depth: int,
    shape: tuple[int, int],
    *,
    loss: Callable[..., torch.Tensor],
    optimizer: Callable[[list[torch.nn.Parameter]], Optimizer],
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    evaluated: tuple[int, int] | None = None,
    masked: bool = True,
) -> Step:
    """Run a few layers and the optimizer on fake tensors.

    Args:
        build: a model on the meta device with so many layers.
        depth: layers of the real one.
        shape: rows of a batch, and tokens of each.
        loss: of the model, ids and mask.
        optimizer: of the trained parameters.
        computing: context of forward passes.
        evaluated: as `shape`, of an evaluation batch; None for none.
        masked: attention is told what is padding, or where one packed row ends.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    step = Step()
    for few in (LAYERS, depth) if depth > LAYERS else (depth,):
        recorder = _passes(build(few), mode, shape, loss, computing, masked)
        rest = _passes(build(few), mode, evaluated, loss, computing, masked, train=False) if evaluated else None
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
    whole = build(depth)
    step.static, step.parameters = [*_static(whole)], adapters.count_parameters(whole)
    materialize(whole, mode)
    trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    step.updates = _updates(optimizer, trained, mode)
    return step


def _passes(
    model: Any,
    mode: FakeTensorMode,
    shape: tuple[int, int],
    loss: Callable[..., torch.Tensor],
    computing: Callable[[], AbstractContextManager[Any]],
    masked: bool = True,
    train: bool = True,
) -> Recorder:
    """A forward pass and, if it trains, a backward pass."""
    materialize(model, mode)
    model.train(train)
    recorder = Recorder()
    recorder.ignore([*model.parameters(), *model.buffers()])
    rows, length = shape
    with mode:
        ids = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.ones(rows, length, dtype=torch.long) if masked else None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(recorder.is_gradient)
    with mode, recorder, layers_marked(recorder, _layers(model)), torch.set_grad_enabled(train):
        with computing():
            found = loss(model, ids, mask)
        if train:
            recorder.kind = "temporary"
            found.backward()
        recorder.group = ("end", 0)
        del found
    return recorder


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
        if (sizes := quantization.stored_bytes(tensor)) is not None:
            yield "weights", sizes[0]
            for constant in sizes[1:]:
                yield "quantization", constant
        else:
            yield "trainable" if tensor.requires_grad else "weights", tensor.numel() * tensor.element_size()


def _updates(
    make: Callable[[list[torch.nn.Parameter]], Optimizer],
    trained: list[torch.nn.Parameter],
    mode: FakeTensorMode,
) -> list[list[Event]]:
    """What clipping and the optimizer allocate in a first and in a second step."""
    with mode:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    recorder = Recorder()
    recorder.ignore([*trained, *(parameter.grad for parameter in trained if parameter.grad is not None)])
    found = make(trained)
    steps = []
    for kind in ("optimizer", "temporary"):
        with mode, recorder:
            recorder.kind = "temporary"
            torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
            recorder.kind = kind
            if isinstance(found, torch.optim.Optimizer):
                found.step()
        steps.append(recorder.recording.events)
        if isinstance(found, list) and kind == "optimizer":
            steps[0] += [Event(("end", 0), -place, size, kind) for place, size in enumerate(found, start=1)]
        recorder.recording.events = []
    return steps


def bitsandbytes_states(name: str, trained: Iterable[torch.Tensor]) -> list[int]:
    """What bitsandbytes' optimizers keep for each state: 4 bytes a value, or one and a scale for 256 of them."""
    kept = []
    for tensor in trained:
        count = tensor.numel()
        sizes = [4 * count]
        if name in _EIGHT_BIT and count >= 4096:
            sizes = [count, 4 * -(-count // 256)]
        kept += sizes * {**_EIGHT_BIT, **_FOUR_BYTES}[name]
    return kept


@contextmanager
def _loss_without_values(on_cuda: bool) -> Iterator[None]:
    """Inside, TRL's loss scores all tokens, and on a GPU its kernels work in place. TRL 1.16 has no switch for it."""
    utils: Any = trl_utils
    kernels: Any = chunked_logprob
    kept = utils._use_triton, kernels._forward_tile, kernels._backward_tile
    utils._use_triton = lambda _: False
    if on_cuda:
        kernels._forward_tile = kernels._backward_tile = lambda *_, **__: None
    try:
        yield
    finally:
        utils._use_triton, kernels._forward_tile, kernels._backward_tile = kept


def play(step: Step, on_cuda: bool, accumulates: bool) -> dict[str, Phase]:
    """The phases of a run through the allocator, its cache emptied before each, as a run does."""
    memory = Memory(on_cuda)
    for kind, nbytes in step.static:
        memory.take(kind, nbytes)
    phases = {"load": memory.phase()}
    for name, update in zip(("first_step", "steady"), step.updates, strict=True):
        if accumulates:
            memory.run(step.passes, keep=["gradients"])
            memory.run(step.passes)
        else:
            memory.run(step.passes, keep=["gradients"])
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

    def run(self, events: Iterable[Event], keep: Collection[str] = ()) -> None:
        """Play events; what they leave is freed at the end, but for kinds that are kept."""
        held: dict[int, tuple[str, int, Any]] = {}
        for event in events:
            if event.nbytes > 0:
                held[event.storage] = event.kind, event.nbytes, self.take(event.kind, event.nbytes)
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
        reserved = self._allocator.peak_reserved if self._on_cuda else self._most.total()
        self._allocator.empty_cache()
        self._most = self._now.copy()
        return Phase(kinds, reserved)
