"""Presets, names and regular expressions adapt the layers that they say, in every family, and nothing else."""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.models import targets
from qlora_exp.models.base import skeleton
from qlora_exp.models.builtin import TINY
from qlora_exp.utils.errors import ConfigError

ATTENTION = {
    "bloom": "query_key_value dense",
    "falcon": "query_key_value dense",
    "gpt2": "c_attn c_proj",
    "gpt_bigcode": "c_attn c_proj",
    "gpt_neox": "query_key_value dense",
    "gptj": "q_proj k_proj v_proj out_proj",
    "opt": "q_proj k_proj v_proj out_proj",
    "phi": "q_proj k_proj v_proj dense",
    "phi3": "qkv_proj o_proj",
}
"""Linear layers of an attention block; q_proj, k_proj, v_proj and o_proj in other families."""
MLP = {
    "bloom": "dense_h_to_4h dense_4h_to_h",
    "falcon": "dense_h_to_4h dense_4h_to_h",
    "gpt2": "c_fc c_proj",
    "gpt_bigcode": "c_fc c_proj",
    "glm4": "gate_up_proj down_proj",
    "gpt_neox": "dense_h_to_4h dense_4h_to_h",
    "gptj": "fc_in fc_out",
    "ministral3": "gate_proj up_proj down_proj",
    "opt": "fc1 fc2",
    "phi": "fc1 fc2",
    "phi3": "gate_up_proj down_proj",
    "starcoder2": "c_fc c_proj",
}
IN_ATTENTION = r".*\.(attn|self_attn|attention|self_attention)\.\w+"
WITHOUT_Q_V = {"bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "phi3"}
FUSED = {"gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen3_moe"}
MIXED = {
    "deepseek_v3", "falcon_h1", "glm4_moe", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "mamba", "mamba2",
    "qwen2_moe", "qwen3_5_text", "qwen3_next",
}  # fmt: skip
"""Families whose layers differ, or have no attention."""
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def bare(family: str):
    return skeleton(ModelConfig(model_name_or_path=f"random:{family}"))


@pytest.fixture
def multimodal():
    """A model of text and images."""
    sizes = TINY["gemma3_text"] | {"vocab_size": 300}
    config = AutoConfig.for_model("gemma3", text_config=sizes, vision_config=VISION, mm_tokens_per_image=4)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def adapted(model, wanted) -> set[str]:
    """The layers that PEFT adapts, by full name."""
    with torch.device("meta"):
        return {*get_peft_model(model, LoraConfig(target_modules=wanted)).base_model.targeted_module_names}


@pytest.mark.parametrize("family", sorted(TINY.keys() - MIXED))
def test_presets_adapt_the_layers_that_they_say(family: str):
    def found(preset: str) -> set[str]:
        model = bare(family)
        return adapted(model, targets.resolve_targets(preset, model))

    attention = found("attention")
    assert {name.rpartition(".")[2] for name in attention} == set(
        ATTENTION.get(family, "q_proj k_proj v_proj o_proj").split()
    )
    assert all(re.fullmatch(IN_ATTENTION, name) for name in attention)
    if family not in FUSED:
        mlp = found("mlp")
        assert {name.rpartition(".")[2] for name in mlp} == set(MLP.get(family, "gate_proj up_proj down_proj").split())
        assert not mlp & attention
        assert found("outputs") < mlp | attention
        assert found("all-linear") == mlp | attention
    if family not in WITHOUT_Q_V:
        assert {name.rpartition(".")[2] for name in found("q_v")} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("family", sorted(WITHOUT_Q_V))
def test_preset_without_its_layers_is_rejected_with_the_layers_there_are(family: str):
    with pytest.raises(ConfigError) as error:
        targets.resolve_targets("q_v", bare(family))
    assert "did you mean" not in str(error.value)
    for layer in ATTENTION[family].split():
        assert layer in str(error.value)


@pytest.mark.parametrize("family", sorted(FUSED))
def test_mlp_of_fused_experts_is_rejected_with_their_parameters(family: str):
    with pytest.raises(ConfigError, match=r"fused parameters \(model\.layers\.\*\..*method\.target_parameters"):
        targets.resolve_targets("mlp", bare(family))


@pytest.mark.parametrize(
    ("family", "bypassed"),
    [
        ("mamba", {"dt_proj", "out_proj", "x_proj"}),
        ("mamba2", {"out_proj"}),
        ("falcon_h1", {"out_proj"}),
        ("granitemoehybrid", {"out_proj"}),
        ("jamba", {"dt_proj"}),
        ("qwen3_next", set()),
        ("bloom", set()),  # which reads weights itself only with pretraining_tp
    ],
)
def test_layers_whose_adapters_would_be_bypassed_are_left_out(family: str, bypassed: set[str]):
    model = bare(family)
    names = targets.bypassed_layers(model)
    assert {name.rpartition(".")[2] for name in names} == bypassed
    found = adapted(model, targets.resolve_targets("all-linear", model))
    assert found
    assert not found & {*names}
    for name in names[:1]:
        with pytest.raises(ConfigError, match="reads without calling the layer.*bypassed; adapt others: all-linear"):
            targets.resolve_targets([name.rpartition(".")[2]], bare(family))


def test_adapters_of_bypassed_layers_would_not_learn():
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **TINY["mamba"], vocab_size=64))
    tuned = get_peft_model(model, LoraConfig(target_modules=["in_proj", "dt_proj"]))
    ids = torch.arange(8)[None]
    tuned.train()(input_ids=ids, labels=ids).loss.backward()
    unused = {name.split(".")[6] for name, p in tuned.named_parameters() if p.requires_grad and p.grad is None}
    assert unused == {"dt_proj"}


def test_state_space_blocks_are_not_mlps():
    assert not [name for name in targets.resolve_targets("mlp", bare("granitemoehybrid")) if "in_proj" in name]


def test_routers_that_return_more_than_a_product_are_not_adapted():
    model = bare("phimoe")
    names = adapted(model, targets.resolve_targets("all-linear", model))
    assert names
    assert not [name for name in names if name.endswith(("router", "gate"))]


def test_target_lists_and_regular_expressions_are_kept():
    assert targets.resolve_targets(["q_proj", "mlp.up_proj"], bare("llama")) == ["q_proj", "mlp.up_proj"]
    assert targets.resolve_targets(r".*\.0\..*q_proj", bare("llama")) == r".*\.0\..*q_proj"
    assert targets.resolve_targets("all-linear", bare("llama")) == "all-linear"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["q_proj", "w_proj"], "'w_proj' matches no module"),
        ("atention", "did you mean 'attention'"),
        ("[", "is not a valid regular expression"),
        (["fc1"], r"model.layers.*.mlp.down_proj"),
        (["attention"], "'attention' is a preset, not the name of a module: write it without a list"),
        (["all-linear"], "'all-linear' is a preset"),
        ("model.layers.9.*", "matches no module"),
    ],
)
def test_targets_that_match_nothing_are_rejected(wanted, message: str):
    with pytest.raises(ConfigError) as error:
        targets.resolve_targets(wanted, bare("llama"))
    assert message in str(error.value)


@pytest.mark.parametrize("wanted", ["all-linear", "attention", "q_v", ["q_proj"], ".*q_proj"])
def test_parts_that_text_does_not_pass_through_are_not_adapted(wanted, multimodal):
    assert targets.parts_without_text(multimodal) == ["model.vision_tower", "model.multi_modal_projector"]
    names = adapted(multimodal, targets.resolve_targets(wanted, multimodal))
    layers = TINY["gemma3_text"]["num_hidden_layers"]
    of_a_layer = {"all-linear": 7, "attention": 4, "q_v": 2}.get(str(wanted), 1)
    assert len(names) == of_a_layer * layers
    assert all(name.startswith("model.language_model.") for name in names)


def test_targets_in_the_vision_tower_only_are_rejected(multimodal):
    with pytest.raises(ConfigError, match="text does not pass through"):
        targets.resolve_targets(r".*vision_tower.*q_proj", multimodal)


def test_summary_names_what_is_adapted_and_what_all_linear_leaves_out(multimodal):
    model = bare("gpt_oss")
    with torch.device("meta"):
        attached = get_peft_model(bare("gpt_oss"), LoraConfig(target_modules="all-linear"))
    found = targets.summary(attached, model, "all-linear")
    assert found["adapted"].startswith("model.layers.*.self_attn.q_proj (2)")
    assert found["left_out"] == "model.layers.*.mlp.experts.gate_up_proj (2), model.layers.*.mlp.experts.down_proj (2)"
    assert targets.summary(multimodal, multimodal, None)["without_text"].startswith("model.vision_tower (1)")


@pytest.mark.parametrize(
    ("family", "preset"), [("gpt2", "attention"), ("gpt_bigcode", "mlp"), ("gemma3", "all-linear")]
)
def test_saved_adapter_of_a_preset_is_loaded_and_merged_by_peft(family: str, preset: str, multimodal, tmp_path):
    ids = torch.arange(40, 60)[None]

    def base():
        torch.manual_seed(0)
        config = multimodal.config if family == "gemma3" else bare(family).config
        return AutoModelForCausalLM.from_config(config).eval()

    settings = LoraConfig(target_modules=targets.resolve_targets(preset, base()), task_type="CAUSAL_LM")
    made = get_peft_model(base(), settings).eval()
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    made.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    with torch.no_grad():
        expected = made(input_ids=ids).logits
        assert not torch.allclose(base()(input_ids=ids).logits, expected, atol=1e-3)
        torch.testing.assert_close(again(input_ids=ids).logits, expected)
        torch.testing.assert_close(again.merge_and_unload()(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
