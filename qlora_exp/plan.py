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
from peft import PeftType
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedFakeTensorException
from transformers import AutoModelForCausalLM, PretrainedConfig
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from qlora_exp import adapters, quantization
from qlora_exp.allocator import CachingAllocator
from qlora_exp.device import Resolved
from qlora_exp.errors import ConfigError, ModelError, UserError
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
    paged: int = 0
    """Bytes of optimizer states that may be on the GPU or not, past its allocator."""
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
    paged: int = 0
    """Bytes of optimizer states that are paged."""


@dataclass(frozen=True)
class Batch:
    """What a step computes at once."""

    rows: int
    length: int
    masked: bool
    """Attention is told what is padding, or where a packed row ends."""


def predict(config: Config, resolved: Resolved) -> Prediction:
    """Memory and work of a run whose longest batch is as long as `max_length` lets it be.

    Raises:
        ConfigError: the method does not apply, or the run cannot be planned.
        ModelError: the architecture is not known here.
    """
    training = config.training
    for key, asked in (
        ("optimizer.lora_optimizer=lorafa", config.optimizer.lora_optimizer == "lorafa"),
        ("training.torch_compile=true", training.torch_compile),
        ("device=mps", resolved.device == "mps"),
    ):
        if asked:
            raise ConfigError(f"{key} cannot be planned yet")
    name = config.model.model_name_or_path
    architecture = model_config(config.model)
    quantization.check_files(name, config.quantization, getattr(architecture, "quantization_config", None))
    depth = getattr(architecture, "num_hidden_layers", None)
    if depth is None:
        raise ModelError(f"{name}: an architecture ({architecture.model_type}) that cannot be planned yet")
    if training.max_length > (most := getattr(architecture, "max_position_embeddings", training.max_length)):
        raise ConfigError(f"training.max_length={training.max_length}: this model has {most} positions")

    def build(layers: int) -> Any:
        return build_model(config, resolved, architecture, layers)

    # A row alone has no padding; FlashAttention needs no mask.
    unmasked = (config.model.attn_implementation or "").startswith("flash")
    rows, length = training.per_device_train_batch_size, training.max_length
    batch = Batch(rows, length, rows > 1 and not unmasked)
    if training.packing:
        batch = Batch(1, rows * length, not unmasked)
    rows = training.per_device_eval_batch_size
    on_cuda = resolved.device == "cuda"
    try:
        with _loss_without_values(on_cuda):
            step = record(
                build,
                depth,
                batch,
                loss=fused_loss,
                optimizer=lambda model: optimizer(resolved.optim, on_cuda, model),
                computing=lambda: computing(resolved),
                evaluated=Batch(rows, length, rows > 1 and not unmasked),
            )
    except UserError as error:
        raise type(error)(f"cannot be planned: {error}") from error
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:  # of code that was not made for fake tensors
        wants_values = isinstance(error, UnsupportedFakeTensorException) or "meta" in str(error).lower()
        why = "its code looks at values, which a plan has none of: " if wants_values else ""
        told = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]:.120}"
        raise ConfigError(f"method={config.method.name} cannot be planned ({why}{told})") from error
    phases = play(step, on_cuda, training.gradient_accumulation_steps > 1)
    in_16_bits = resolved.bf16 or resolved.fp16 or resolved.dtype != "float32"
    return Prediction(phases, step.work, *step.parameters, step.paged, in_16_bits)


def build_model(config: Config, resolved: Resolved, architecture: PretrainedConfig, layers: int) -> Any:
    """The run's model with `layers` layers, quantized and with its adapter, on the meta device."""
    values = architecture.to_dict() | {"num_hidden_layers": layers}
    if (kinds := values.get("layer_types")) is not None:
        values["layer_types"] = kinds[:layers]
    shorter = type(architecture)(**values)
    dtype = getattr(torch, resolved.dtype)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            shorter,
            dtype=dtype,
            attn_implementation=_attention(config),
            trust_remote_code=config.model.trust_remote_code,
        )
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


@contextmanager
def computing(resolved: Resolved) -> Iterator[None]:
    """The precision that training computes in: a CPU's autocast, with layer norms in float32 as a GPU's has them."""
    if not (resolved.bf16 or resolved.fp16):
        yield
        return
    functions: Any = torch.nn.functional
    kept = functions.layer_norm

    def in_float32(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        with torch.autocast("cpu", enabled=False):
            weight, bias = (one if one is None else one.float() for one in (weight, bias))
            return kept(x.float(), shape, weight, bias, eps)

    if resolved.device == "cuda":
        functions.layer_norm = in_float32
    try:
        with torch.autocast("cpu", torch.float16 if resolved.fp16 else torch.bfloat16):
            yield
    finally:
        functions.layer_norm = kept


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
        name: transformers' name of it.
        many: all parameters in one operation, as torch chooses on a GPU.
        model: whose parameters it trains.

    Raises:
        ConfigError: what it keeps is not known.
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
        case _ if name in _EIGHT_BIT or name in _FOUR_BYTES:
            tables = {id(layer.weight) for layer in model.modules() if isinstance(layer, torch.nn.Embedding)}
            for one in parameters:
                sizes = _states(name, one.numel(), id(one) in tables)
                if name.startswith("paged") and one.numel() >= 100_000:
                    kept.paged += sum(sizes)
                else:
                    kept.nbytes += sizes
        case _:
            raise ConfigError(f"optimizer.optim={name} cannot be planned yet: choose adamw_torch")
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


def record(
    build: Callable[[int], Any],
    depth: int,
    batch: Batch,
    *,
    loss: Callable[..., torch.Tensor],
    optimizer: Callable[[Any], Kept],
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    evaluated: Batch | None = None,
) -> Step:
    """Run a few layers and the optimizer on fake tensors.

    Args:
        build: a model on the meta device with so many layers.
        depth: layers of the real one.
        batch: of training.
        loss: of the model, ids and mask.
        optimizer: of a model.
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
    whole = build(depth)
    step.static, step.parameters = [*_static(whole)], adapters.count_parameters(whole)
    materialize(whole, mode)
    kept = optimizer(whole)
    step.updates, step.paged = _updates(kept, whole, mode), kept.paged
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


def _updates(kept: Kept, model: Any, mode: FakeTensorMode) -> list[list[Event]]:
    """What clipping and the optimizer allocate in a first and in a second step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with mode:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    recorder = Recorder()
    recorder.ignore([*trained, *(parameter.grad for parameter in trained if parameter.grad is not None)])
    steps = []
    for kind in ("optimizer", "temporary"):
        with mode, recorder:
            recorder.kind = "temporary"
            torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
            recorder.kind = kind
            if kept.run is not None:
                kept.run.step()
        steps.append(recorder.recording.events)
        recorder.recording.events = []
    steps[0] += [Event(("end", 0), -place, size, "optimizer") for place, size in enumerate(kept.nbytes, start=1)]
    return steps


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
        reserved = self._allocator.peak_reserved if self._on_cuda else self._most.total()
        self._allocator.empty_cache()
        self._most = self._now.copy()
        return Phase(kinds, reserved)
