"""What a run will need, before it runs: memory by phase, and the work of a step. No weights, no GPU, no hub.

The run's model is built without values; `steps` runs its real code on fake tensors, and `footprint` plays what that
allocates through a model of torch's allocator. Knows nothing of recorded runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import UnsupportedFakeTensorException
from transformers import AutoModelForCausalLM, PretrainedConfig
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from qlora_exp import adapters, quantization
from qlora_exp.device import Resolved
from qlora_exp.errors import ConfigError, ModelError, UserError
from qlora_exp.fake import Work
from qlora_exp.footprint import Phase, play
from qlora_exp.model import model_config
from qlora_exp.schema import Config
from qlora_exp.steps import Batch, optimizer, record


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
