"""What llama.cpp computes for each family of models: its name, what it takes for granted, how it lays out tensors.

Does not write files. Compared with llama.cpp (xllamacpp 2026.10) by tests/unit/deploy/gguf/test_llama_cpp.py.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_exp.utils.errors import ConfigError

SERVE = "Use --to merged: transformers (qlora-exp serve) and vLLM load that folder"
"""What to do with a model that llama.cpp does not compute."""
_CONVERT = (
    "llama.cpp has such models: use --to merged, and convert that folder with its script: python "
    "convert_hf_to_gguf.py FOLDER --outtype bf16"
)
_NAMES = {
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "falcon_mamba": "mamba",
    "gpt_bigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "ministral3": "mistral3",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen3_5_text": "qwen35",
}
"""llama.cpp's names of architectures that are not written here and have another name in transformers."""

_OUTPUTS = ("lm_head.weight", "embed_out.weight")

Change = Callable[[torch.Tensor, Any], torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """How llama.cpp stores some of the tensors, and the way back."""

    names: str
    """Regular expression; its match in a tensor's name selects the tensor."""
    stored: Change
    restored: Change


@dataclass(frozen=True)
class Family:
    """What llama.cpp computes for models of one `model_type`."""

    architecture: str
    """Name in `gguf.MODEL_ARCH`."""
    expected: dict[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    """Config fields that llama.cpp does not read, with the values that it takes for granted."""
    layouts: tuple[Layout, ...] = ()
    partial_rotation: bool = False
    """Whether only a part of each head may be rotated (`partial_rotary_factor`)."""
    window_period: int = 0
    """If n, all layers but each n-th attend to a sliding window; 0: llama.cpp has no windows in this family."""
    large: int = 0
    """Number of layers with which llama.cpp divides queries by sqrt(hidden_size / heads), not by sqrt(head_dim)."""


def _swapped(leading: Callable[[torch.Tensor, Any], tuple[int, ...]], axes: tuple[int, int], names: str) -> Layout:
    """Return a layout in which two of the axes that a tensor's rows divide into are swapped."""

    def change(tensor: torch.Tensor, config: Any, back: bool) -> torch.Tensor:
        shape = [*leading(tensor, config)]
        if back:
            shape[axes[0]], shape[axes[1]] = shape[axes[1]], shape[axes[0]]
        return tensor.reshape(*shape, *tensor.shape[1:]).swapaxes(*axes).reshape(tensor.shape)

    return Layout(names, lambda tensor, config: change(tensor, config, False), lambda t, c: change(t, c, True))


def _pairs(name: str) -> Callable[[torch.Tensor, Any], tuple[int, ...]]:
    def shape(tensor: torch.Tensor, config: Any) -> tuple[int, ...]:
        heads = getattr(config, name)
        return heads, 2, tensor.shape[0] // heads // 2

    return shape


# The two values of a rotary pair are half a head apart in transformers, and adjacent in llama.cpp.
_ADJACENT = (
    _swapped(_pairs("num_attention_heads"), (1, 2), r"q_proj\."),
    _swapped(_pairs("num_key_value_heads"), (1, 2), r"k_proj\."),
)
# Queries, keys and values of all heads follow one another; in transformers, those of each head do.
_FUSED = _swapped(
    lambda tensor, config: (config.num_attention_heads, 3, tensor.shape[0] // config.num_attention_heads // 3),
    (0, 1),
    r"query_key_value\.",
)
_TRANSPOSED = Layout(r"c_\w+\.weight", lambda tensor, _: tensor.T, lambda tensor, _: tensor.T)
_PLUS_ONE = Layout(r"norm\.weight", lambda tensor, _: tensor.float() + 1, lambda tensor, _: tensor.float() - 1)
_GELU = {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False, "use_bidirectional_attention": None}
_GEMMA = _GELU | {"hidden_activation": "gelu_pytorch_tanh"}

FAMILIES = {
    "llama": Family("LLAMA", layouts=_ADJACENT),
    "mistral": Family("LLAMA", layouts=_ADJACENT),
    "smollm3": Family("SMOLLM3", layouts=_ADJACENT),
    "granite": Family("GRANITE", layouts=_ADJACENT),
    "qwen2": Family("QWEN2"),
    "qwen3": Family("QWEN3", {"hidden_act": "silu", "attention_bias": False}),
    "olmo2": Family("OLMO2", {"hidden_act": "silu", "attention_bias": False}),
    "phi3": Family("PHI3", partial_rotation=True),
    "stablelm": Family("STABLELM", {"hidden_act": "silu", "qk_layernorm": False}, partial_rotation=True),
    "gemma": Family("GEMMA", _GEMMA, (_PLUS_ONE,)),
    "gemma2": Family("GEMMA2", _GEMMA, (_PLUS_ONE,), window_period=2, large=46),
    "gemma3_text": Family("GEMMA3", _GEMMA | {"attn_logit_softcapping": None}, (_PLUS_ONE,), window_period=6, large=62),
    "gpt2": Family(
        "GPT2",
        {
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        (_TRANSPOSED,),
    ),
    "gpt_neox": Family("GPTNEOX", {"hidden_act": "gelu", "attention_bias": True}, (_FUSED,), partial_rotation=True),
    "starcoder2": Family("STARCODER2", {"hidden_act": "gelu_pytorch_tanh", "use_bias": True}),
}
"""The families that are written, by `model_type`."""


def check_family(family: str) -> None:
    """Check that models of this `model_type` can be written.

    Raises:
        ConfigError: they cannot; the message says what to do instead.
    """
    if family in FAMILIES:
        return
    import gguf

    plain = {re.sub(r"\W", "", name) for name in gguf.MODEL_ARCH_NAMES.values()}
    known = re.sub(r"[\W_]", "", _NAMES.get(family, family)) in plain
    raise ConfigError(
        f"--to gguf: models of type {family} are not supported ({', '.join(FAMILIES)} are). "
        + (_CONVERT if known else f"llama.cpp has no such models. {SERVE}")
    )


def check_config(config: Any) -> None:
    """Check that llama.cpp computes what the config of a model says.

    Raises:
        ConfigError: it does not; the message says what to do instead.
    """
    check_family(config.model_type)
    if why := next(_unlike_llama_cpp(config, FAMILIES[config.model_type]), None):
        raise ConfigError(f"--to gguf: {why}, which llama.cpp does not compute in models of this type. {SERVE}")


def _unlike_llama_cpp(config: Any, family: Family) -> Iterator[str]:
    """Yield what the config asks for that llama.cpp does not compute."""
    for name, value in family.expected.items():
        if (asked := getattr(config, name, value)) != value and (asked or value):
            yield f"the model has {name} {asked}"
    if not family.window_period:
        window = getattr(config, "sliding_window", None)
        full = "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"])
        used = window and not full and getattr(config, "use_sliding_window", True)
        if used and window < config.max_position_embeddings:
            yield "the model attends to a sliding window"
    elif _periodic(config, family.window_period, "sliding_attention") != config.layer_types:
        yield f"other layers than all but one in {family.window_period} attend to a sliding window"
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None and family.window_period:
        usual = config.head_dim
        if config.num_hidden_layers == family.large:
            usual = config.hidden_size // config.num_attention_heads
        if scalar != usual:
            yield f"the model has query_pre_attn_scalar {scalar}, not {usual}"
    if family.architecture == "SMOLLM3" and [bool(one) for one in config.no_rope_layers] != [
        bool((layer + 1) % 4) for layer in range(config.num_hidden_layers)
    ]:
        yield "other layers than all but one in 4 rotate positions"
    if not config.tie_word_embeddings and not _has_output(family):
        yield "the model has an output layer that is not its embedding (tie_word_embeddings: false)"
    yield from _unlike_rotation(config, family)


def _has_output(family: Family) -> bool:
    """Return whether llama.cpp reads an output layer of its own, which is not the embedding."""
    import gguf

    return gguf.MODEL_TENSOR.OUTPUT in gguf.MODEL_TENSORS[gguf.MODEL_ARCH[family.architecture]]


def _periodic(config: Any, period: int, most: str) -> list[str]:
    """Return the kinds of attention of all layers if each `period`-th is full attention."""
    return [most if (layer + 1) % period else "full_attention" for layer in range(config.num_hidden_layers)]


def _unlike_rotation(config: Any, family: Family) -> Iterator[str]:
    """Yield what the config asks of rotary positions that llama.cpp does not compute."""
    rope, local = rotation(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        yield f"the model has rotary position embeddings of rope_type {kind}"
    read = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
    read |= {"low_freq_factor", "high_freq_factor"} if kind == "llama3" else set()
    read |= {"partial_rotary_factor"} if family.partial_rotation else set()
    if others := sorted(key for key, value in rope.items() if key not in read and value is not None):
        yield f"the model has rotary position embeddings with {', '.join(others)}"
    if local and local.get("rope_type", "default") != "default":
        yield f"layers with a sliding window have rope_type {local['rope_type']}"


def rotation(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters of rotary positions, and those of layers with a sliding window if they have their own."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (rope["full_attention"], rope["sliding_attention"]) if "full_attention" in rope else (rope, {})


def describe(writer: Any, config: Any) -> None:
    """Add what llama.cpp reads of the config to a GGUF file."""
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    inner = getattr(config, "n_inner" if config.model_type == "gpt2" else "intermediate_size")
    writer.add_feed_forward_length(inner or 4 * config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", heads))
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config.vocab_size)
    read = {
        "rms_norm_eps": writer.add_layer_norm_rms_eps,
        "layer_norm_eps": writer.add_layer_norm_eps,
        "layer_norm_epsilon": writer.add_layer_norm_eps,
        "norm_epsilon": writer.add_layer_norm_eps,
        "use_parallel_residual": writer.add_parallel_residual,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
    }
    for name, add in read.items():
        if (value := getattr(config, name, None)) is not None:
            add(value)
    if FAMILIES[config.model_type].window_period:
        writer.add_sliding_window(config.sliding_window)
    _describe_rotation(writer, config, size)


def _describe_rotation(writer: Any, config: Any, size: int) -> None:
    import gguf

    rope, local = rotation(config)
    if not rope:
        return
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(int(size * (rope.get("partial_rotary_factor") or 1)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file."""

    name: str
    key: str | None
    """Name in the model's `state_dict`; None: it follows from the config."""
    value: torch.Tensor
    """In the layout of the model."""
    layout: Layout | None
    config: Any

    def stored(self) -> torch.Tensor:
        """Return the value in llama.cpp's layout."""
        return self.value if self.layout is None else self.layout.stored(self.value, self.config).contiguous()

    def restored(self, stored: torch.Tensor) -> torch.Tensor:
        """Return a value in llama.cpp's layout as the model has it."""
        return stored if self.layout is None else self.layout.restored(stored, self.config).contiguous()


def tensors(model: Any) -> Iterator[Tensor]:
    """Yield the tensors of a model's GGUF file.

    Raises:
        ConfigError: llama.cpp has no place for one.
    """
    import gguf

    config, family = model.config, FAMILIES[model.config.model_type]
    rope, _ = rotation(config)
    if rope.get("rope_type") == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        size = 2 * len(scaled)
        plain = rope["rope_theta"] ** -(torch.arange(0, size, 2) / size)
        yield Tensor("rope_freqs.weight", None, plain / scaled, None, config)
    architecture = gguf.MODEL_ARCH[family.architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for key, value in model.state_dict().items():
        if tied and key in _OUTPUTS:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigError(
                f"--to gguf: llama.cpp has no place for the tensor {key} in models of type {config.model_type}. {SERVE}"
            )
        layout = next((layout for layout in family.layouts if re.search(layout.names, key)), None)
        yield Tensor(name, key, value, layout, config)
