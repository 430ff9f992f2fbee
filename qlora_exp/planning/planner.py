"""Predict the memory by phase and the work of a step of a run, without weights, GPU or hub.

The run's model is built without values. `step` runs its real code on fake tensors, and `replay` plays the recorded
allocations through a model of torch's allocator. This module does not read past runs.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from trl.trainer.utils import add_fused_lm_head

from qlora_exp.config import trainer_settings
from qlora_exp.config.schema import Config
from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.config.tables.optimizers import check_package
from qlora_exp.environment.device import UNPAGED, Device, Resolved, resolve
from qlora_exp.libraries import trl
from qlora_exp.libraries.peft import create_samplers, without_values
from qlora_exp.libraries.torch import WANTS_VALUES, AssumedValues, computing_as_on_gpu, factors_as_on_cpu
from qlora_exp.libraries.transformers import experts_without_values, rows_without_values
from qlora_exp.models import adapters
from qlora_exp.models.base import model_config
from qlora_exp.models.files import check_files
from qlora_exp.models.layers import dropout, tiling
from qlora_exp.models.layers.experts import check_use
from qlora_exp.models.quantization import check_stored, stored
from qlora_exp.models.trained import can_recompute_some, freeze, layers_of, sample_last
from qlora_exp.planning.packed_weights import first_product, quantize_meta
from qlora_exp.planning.recording.fake_tensors import Work
from qlora_exp.planning.replay import Phase, offloaded, on_host, play
from qlora_exp.planning.sharding import Traffic, Units, all_reduced, buckets, keep_shares, shard, units
from qlora_exp.planning.step import Batch, Step, optimizer, record, static_of, weigh
from qlora_exp.training import own_optimizers
from qlora_exp.utils.errors import ConfigError, ModelError, UserError, type_and_first_line


@dataclass(frozen=True)
class Prediction:
    """Predicted memory and work of a run; of each process, if several share it."""

    phases: dict[str, Phase]
    """Memory by phase: load, first_step, steady, evaluation, the phases that a run measures."""
    work: list[Work]
    """One entry for each operation of a forward and backward pass."""
    trainable: int
    """Number of trainable parameters."""
    total: int
    """Number of all parameters."""
    paged: int = 0
    """Bytes of paged optimizer states, which may be on the GPU or not, outside its allocator."""
    batches: int = 1
    """Batches of an optimizer step."""
    in_16_bits: bool = True
    """Whether matrix products are computed in 16 bits."""
    ranks: int = 1
    """Number of processes that share the run."""
    traffic: Traffic = field(default_factory=Traffic)
    """What each process sends for one optimizer step."""
    unquantized: str | None = None
    """Sentence about the weights of a quantized base that stay as they are; None if they are few."""
    offloaded: int = 0
    """Bytes of the machine's memory that each process takes for its share of the model."""
    activations_offloaded: int = 0
    """Bytes of the machine's memory that each process takes for activations."""

    @property
    def peak(self) -> int:
        """Reserved bytes of the fullest phase."""
        return max(phase.reserved for phase in self.phases.values())


_MOST_TOKENS = 2**28
"""Tokens of a batch that no device holds; its loss would be planned for minutes, a chunk after the other."""


def planner(config: Config, gpu: Device) -> "Planner":
    """Return the planner of a run on `gpu`, or on the device that `config.device` names. Raises as `Planner` does."""
    return Planner(config, resolved_on(config, gpu))


def resolved_on(config: Config, gpu: Device) -> Resolved:
    """Return the values of a run on `gpu`, or on the device that `config.device` names."""
    other = Device(config.device, config.device, bf16=False, paging=False)
    return resolve(config, other if config.device in ("cpu", "mps") else gpu)


class Planner:
    """Planner of one run, for its configured batches or for others."""

    def __init__(self, config: Config, resolved: Resolved) -> None:
        """Compute everything that does not depend on the batch.

        Raises:
            ConfigError: the method does not apply, or the run cannot be planned.
            ModelError: the architecture is not available locally.
        """
        for key, asked in (
            ("training.torch_compile=true", config.training.torch_compile),
            ("device=mps", resolved.device == "mps"),
            (
                "training.activation_offloading=true without gradient_checkpointing",
                resolved.activation_offloading and not resolved.gradient_checkpointing,
            ),
            ("distributed=deepspeed_zero3", config.distributed.engine == "deepspeed_zero3"),  # only ddp and fsdp
            (
                "method.use_dynamic_rank=true",
                config.method.settings.get("use_dynamic_rank"),
            ),  # ranks follow the weights
            *((f"training.sft_config.{name}", True) for name in trainer_settings.unplanned(config.training.sft_config)),
        ):
            if asked:
                raise ConfigError(f"{key} cannot be planned yet")
        check_package(config.optimizer.optim)
        name = config.model.model_name_or_path
        self._config, self._resolved, self._on_cuda = config, resolved, resolved.device == "cuda"
        self._architecture = model_config(config.model)
        stored = getattr(self._architecture, "quantization_config", None)
        check_files(name, config.quantization, stored)
        if (depth := getattr(self._architecture, "num_hidden_layers", None)) is None:
            raise ModelError(f"{name}: the architecture {self._architecture.model_type} cannot be planned yet")
        self.depth: int = depth
        """Number of layers."""
        self.family: str = self._architecture.get_text_config().model_type
        """Transformers' `model_type`."""
        shared = config.distributed
        if shared.engine != "none" and shared.num_processes == "auto":
            raise ConfigError("distributed.num_processes: a plan needs the number of processes, not auto")
        self.positions: int | None = getattr(self._architecture, "max_position_embeddings", None)
        """Longest row that the model accepts, in tokens; None if its config does not declare it."""
        self.has_router: bool = hasattr(self._architecture.get_text_config(), "router_aux_loss_coef")
        """Whether the model is a mixture of experts."""
        if (recomputed := resolved.recomputed_layers or 0) > depth:
            raise ConfigError(f"training.recomputed_layers={recomputed}: this model has {depth} layers")
        self._check(config.training.max_length)
        self._recorded: dict[tuple[Batch, Batch | None, int | None], Step] = {}
        """The recording of the last batch."""
        self.share(shared)

    def over(self, shared: DistributedConfig) -> "Planner":
        """Return the planner of the same run, shared by several processes in another way."""
        other = copy(self)
        other.share(shared)
        return other

    def computing(self, **changes: Any) -> "Planner":
        """Return the planner of the same run, which computes a step otherwise: batches, padding, recomputation.

        Args:
            changes: fields of `Resolved`.
        """
        other = copy(self)
        other.compute(**changes)
        return other

    def compute(self, **changes: Any) -> None:
        """Compute a step otherwise."""
        self._resolved, self._recorded = replace(self._resolved, **changes), {}

    def share(self, shared: DistributedConfig) -> None:
        """Compute what one process holds, whatever the batch."""
        self._ranks = 1 if shared.engine == "none" else int(shared.num_processes)
        self._units: Units | None = None
        self._buckets: list[int] = []
        self._offloaded = 0
        offloads = shared.cpu_offload and shared.engine == "fsdp" and self._ranks > 1
        optim: str = "lorafa" if self._config.optimizer.lora_optimizer == "lorafa" else self._resolved.optim
        if shared.engine == "fsdp":  # bitsandbytes' optimizers do not update shares
            optim = UNPAGED.get(optim, optim)
        with self._explained(), as_it_runs(self._on_cuda):
            model = build_model(self._config, self._resolved, self._architecture, self.depth)
            check_use(model, shared)
            parameters = adapters.count_parameters(model)
            self.can_recompute_some = can_recompute_some(layers_of(model))
            self._unquantized = getattr(model, "unquantized", None)
            if shared.engine == "fsdp" and self._ranks > 1:
                self._units = units(model, self._ranks, offloads)
                keep_shares(model, self._ranks)
            stay = [*static_of(model.buffers())] if offloads else []
            chosen = self._config.optimizer
            own = partial(own_optimizers.build, config=chosen, learning_rate=1e-3, weight_decay=0.0)
            many = self._on_cuda and not offloads
            weighed = weigh(model, partial(optimizer, optim, many, settings=chosen.optim_args, own=own))
            if shared.engine == "ddp" and self._ranks > 1:
                self._buckets = buckets(model)
        self._model = weighed if self._units is None else replace(weighed, parameters=parameters)
        if offloads:  # constants of quantization are no parameters
            stay += [taken for taken in weighed.static if taken[0] == "quantization"]
            moved = Counter(weighed.static) - Counter(stay)
            self._offloaded = offloaded(replace(weighed, static=[*moved.elements()]))
            self._model = replace(self._model, static=stay, updates=[[], []], paged=0)

    def predict(
        self, rows: int | None = None, length: int | None = None, evaluated: int | None = None, jobs: int = 1
    ) -> Prediction:
        """Predict memory and work.

        Args:
            rows: rows of a batch; None: as configured.
            length: tokens of its longest row; None: `training.max_length`.
            evaluated: tokens of the longest row of evaluation; None: as `length`; 0: evaluation is not planned.
            jobs: number of jobs of such batches that go through the base in one pass.

        Raises:
            ConfigError: the length exceeds the model's positions, the batch what any device holds, or the method's code
                cannot run on fake tensors.
        """
        training = self._config.training
        rows, length = rows or self._resolved.per_device_train_batch_size, length or training.max_length
        evaluated = length if evaluated is None else evaluated
        self._check(max(length, evaluated))
        if jobs * rows * length > _MOST_TOKENS:
            raise ConfigError(
                f"a batch of {jobs * rows * length:,} tokens cannot be planned: set per_device_train_batch_size"
            )
        batch = self._batch(jobs * rows, length)
        if training.packing or (self._resolved.padding == "free" and rows > 1):
            batch = Batch(jobs, rows * length, not self._flash)
        held_out = self._batch(jobs * training.per_device_eval_batch_size, evaluated) if evaluated else None
        step = self._step(batch, held_out)
        accumulated = self._resolved.gradient_accumulation_steps
        traffic = all_reduced(sum(self._buckets), self._ranks)
        if self._units is not None:
            step, traffic = shard(step, self._units, accumulated)
        phases = play(self._model, step, self._on_cuda, accumulated > 1, self._buckets)
        in_16_bits = self._resolved.bf16 or self._resolved.fp16 or self._resolved.dtype != "float32"
        return Prediction(
            phases,
            step.work,
            *self._model.parameters,
            self._model.paged,
            accumulated,
            in_16_bits,
            ranks=self._ranks,
            traffic=traffic,
            unquantized=self._unquantized,
            offloaded=self._offloaded,
            activations_offloaded=on_host(step.passes),
        )

    def _step(self, batch: Batch, evaluated: Batch | None) -> Step:
        """Record a step, or return the recording of the last one if the batches are the same."""
        method = self._config.method
        # A plan of shares needs all layers; with recomputation frozen layers keep their inputs.
        short = method.freezes_first and self._units is None and not self._resolved.gradient_checkpointing
        last = method.trainable_layers if short else None
        if (batch, evaluated, last) not in self._recorded:
            self._recorded.clear()
            with self._explained(), as_it_runs(self._on_cuda, self._flash):
                self._recorded[batch, evaluated, last] = record(
                    self._build,
                    self.depth,
                    batch,
                    loss=fused_loss,
                    computing=lambda: computing(self._resolved),
                    evaluated=evaluated,
                    alike=not method.freezes and (method.lisa_activated_layers or 1) == 1,
                    last=last,
                    offloads=self._resolved.activation_offloading,
                    on_gpu=self._on_cuda,
                    recomputed=self._resolved.recomputed_layers,
                )
        return self._recorded[batch, evaluated, last]

    def _build(self, layers: int) -> Any:
        model = build_model(self._config, self._resolved, self._architecture, layers)
        if self._config.optimizer.lora_optimizer == "lorafa":  # freeze what its optimizer would freeze
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
        return model

    def _check(self, length: int) -> None:
        if self.positions is not None and length > self.positions:
            raise ConfigError(f"training.max_length={length}: this model has only {self.positions} positions")

    @property
    def _flash(self) -> bool:
        return (self._config.model.attn_implementation or "").startswith("flash")  # FlashAttention needs no mask

    def _batch(self, rows: int, length: int) -> Batch:
        multiple = self._config.training.sft_config.get("pad_to_multiple_of") or 1
        padded = -(-length // multiple) * multiple
        return Batch(rows, padded, (rows > 1 or padded > length) and not self._flash)  # a single row has no padding

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of code that does not support fake tensors into errors that name what cannot be planned."""
        try:
            yield
        except UserError as error:
            raise type(error)(f"cannot be planned: {error}") from error
        except (
            RuntimeError,
            ValueError,
            AttributeError,
            TypeError,
            ArithmeticError,
            LookupError,
            AssertionError,
        ) as error:
            wants_values = isinstance(error, WANTS_VALUES) or "meta" in str(error).lower()
            why = "its code reads values, which a plan does not have: " if wants_values else ""
            message = type_and_first_line(error, 120)
            name = self._config.method.name
            raise ConfigError(f"method={name} cannot be planned ({why}{message})") from error


def build_model(config: Config, resolved: Resolved, architecture: PretrainedConfig, layers: int) -> Any:
    """Build the run's model on the meta device with `layers` layers, quantized and with its adapter."""
    values, new = architecture.to_dict() | {"num_hidden_layers": layers}, len(config.model.new_tokens)
    if new:  # as if the model had no rows to spare
        values["vocab_size"] += new
    if (kinds := values.get("layer_types")) is not None:
        values["layer_types"] = kinds[:layers]
    shorter = type(architecture)(**values)
    dtype = getattr(torch, resolved.dtype)
    with torch.device("meta"), AssumedValues():
        base = AutoModelForCausalLM.from_config(
            shorter,
            dtype=dtype,
            attn_implementation=_attention(config),
            trust_remote_code=config.model.trust_remote_code,
        )
        quantize_meta(base, config.quantization, resolved)
        if config.quantization.bitsandbytes:
            name = config.model.model_name_or_path
            base.unquantized = check_stored(name, config.quantization, stored(base), dtype)
        base.config.use_cache = False
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))  # as TRL does before PEFT
        settings: Any = adapters.peft_config(config, base, range(architecture.vocab_size, values["vocab_size"]))
        if config.lora_start is not None:
            # The initialization would need weights and rows. It changes no sizes, but for EVA's ranks.
            settings.init_lora_weights = True
        model = adapters.attach(base, settings, resolved.adapter_dtype)
        freeze(model, config.method)
        sample_last(model, config.method)
        if config.lora_start == "mica":  # it learns LoRA's A only
            adapters.set_trainable(model, {name for name in adapters.trainable_set(model) if ".lora_B." not in name})
        create_samplers(model)
        if resolved.device == "cpu":
            dropout.on_cpu(model)
    if resolved.tiled_mlp:
        tiling.tile(model)
    if resolved.gradient_checkpointing:
        if settings is not None:
            base.enable_input_require_grads()
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _attention(config: Config) -> str | None:
    # FlashAttention keeps the same tensors as torch's fused attention, which needs no extra package.
    return "sdpa" if (chosen := config.model.attn_implementation) not in (None, "eager") else chosen


def dequantized(weight: Any, state: Any = None) -> torch.Tensor:
    """Return a tensor as large as the values of a bitsandbytes weight that has none."""
    if (shape := getattr(weight, "shape_of_values", None)) is not None:
        return torch.empty(shape, dtype=weight.dtype_of_values)
    return torch.empty(weight.shape, dtype=torch.float32)


def fused_loss(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Compute TRL's loss, which never holds all logits at once."""
    outputs = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, fused_lm_head=True)
    return -outputs.log_probs.sum()


def computing(resolved: Resolved) -> AbstractContextManager[Any]:
    """Return the autocast context of training, for the CPU that the fake tensors are on."""
    half = torch.float16 if resolved.fp16 else torch.bfloat16
    return torch.autocast("cpu", half, enabled=resolved.bf16 or resolved.fp16)


@contextmanager
def as_it_runs(on_cuda: bool, flash: bool = False) -> Iterator[None]:
    """Make fake tensors on the CPU follow the code paths of the real run.

    Args:
        on_cuda: whether it runs on a GPU.
        flash: whether it runs FlashAttention there.
    """
    with ExitStack() as patches:
        patches.enter_context(trl.every_token_scored())
        patches.enter_context(without_values(dequantized))
        patches.enter_context(experts_without_values(first_product))
        patches.enter_context(rows_without_values())
        if on_cuda:
            patches.enter_context(trl.loss_as_on_gpu())
            patches.enter_context(computing_as_on_gpu(flash))
        else:
            patches.enter_context(factors_as_on_cpu())
        yield
