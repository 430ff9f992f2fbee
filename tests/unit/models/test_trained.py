"""Which of a model's own parameters full fine-tuning in parts trains: of layers, by name, or drawn by LISA."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_exp.config.sections.method import MethodConfig
from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.config.sections.optimizer import OptimizerConfig
from qlora_exp.models import trained
from qlora_exp.models.adapters import count_parameters, trainable_set
from qlora_exp.models.base import load_unquantized, skeleton
from qlora_exp.utils.errors import ConfigError


def frozen(**keys):
    model = skeleton(ModelConfig(model_name_or_path="random:llama", random_config={"num_hidden_layers": 3}))
    trained.freeze(model, MethodConfig(**keys))
    return model


def test_new_tokens_need_trained_tables():
    with pytest.raises(ConfigError, match="add embed_tokens.* to method.unfrozen_parameters"):
        trained.check_tables(frozen(trainable_layers=1))
    trained.check_tables(frozen(unfrozen_parameters=["embed_tokens", "lm_head"]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputation_in_some_layers_gives_the_same_gradients(family: str):
    model = load_unquantized(ModelConfig(model_name_or_path=f"random:{family}")).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    layers, calls = trained.layers_of(model), []
    for number, layer in enumerate(layers):
        norm = next(module for module in layer.modules() if "Norm" in type(module).__name__)
        norm.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    ids = torch.arange(6, 30)[None]

    def gradients():
        calls.clear()
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    assert calls == [0, 1]
    model.activation_checkpointing_enable({"use_reentrant": False})
    for count, expected in ((1, [0, 1, 0]), (2, [0, 1, 1, 0])):
        trained.recompute_first(model, count)
        found = gradients()
        assert calls == expected
        assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
    with pytest.raises(ConfigError, match="recomputed_layers=3: this model has 2 layers"):
        trained.recompute_first(model, 3)


@pytest.mark.parametrize(("count", "numbers"), [(1, {"2"}), (2, {"1", "2"}), (3, {"0", "1", "2"}), (-1, {"0"})])
def test_last_or_first_layers_are_trained_and_nothing_else(count: int, numbers: set[str]):
    names = trainable_set(frozen(trainable_layers=count))
    assert {name.split(".")[2] for name in names} == numbers
    assert all(name.startswith("model.layers.") for name in names)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["model.norm.weight"], {"model.norm.weight"}),
        (["norm"], {"model.norm.weight"}),
        (["layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj.weight"}),
        (["layers.(0|2).*norm"], {f"model.layers.{n}.{kind}_layernorm.weight" for n in (0, 2)
                                  for kind in ("input", "post_attention")}),
        (["embed_tokens", "q_proj"], {"model.embed_tokens.weight",
                                      *(f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3))}),
    ],
)  # fmt: skip
def test_names_are_whole_parts_of_names(patterns: list[str], names: set[str]):
    assert trainable_set(frozen(unfrozen_parameters=patterns)) == names


def test_the_number_of_a_layer_is_no_beginning_of_another():
    model = skeleton(ModelConfig(model_name_or_path="random:llama", random_config={"num_hidden_layers": 12}))
    trained.freeze(model, MethodConfig(unfrozen_parameters=["layers.1"]))
    assert {name.split(".")[2] for name in trainable_set(model)} == {"1"}


def test_layers_are_found_though_each_has_more_experts_than_there_are_layers():
    def layer():
        return torch.nn.ModuleDict({"experts": torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(5))})

    model = torch.nn.Sequential(torch.nn.ModuleList(layer() for _ in range(2)))
    assert trained.layers_of(model) == [*model[0]]


def test_layers_and_names_add_up():
    both = trainable_set(frozen(trainable_layers=1, unfrozen_parameters=["lm_head"]))
    assert both == trainable_set(frozen(trainable_layers=1)) | {"lm_head.weight"}


def test_naming_one_of_two_tied_weights_trains_both_and_counts_them_once():
    model = load_unquantized(ModelConfig(model_name_or_path="random:opt"))
    trained.freeze(model, MethodConfig(unfrozen_parameters=["lm_head"]))
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert model.lm_head.weight.requires_grad
    assert count_parameters(model)[0] == model.lm_head.weight.numel()
    assert trained.described(model) == "lm_head.weight = model.decoder.embed_tokens.weight"


def test_trained_parameters_are_described_by_kind_and_layer():
    text = trained.described(frozen(trainable_layers=2, unfrozen_parameters=["norm"]))
    assert "model.layers.*.mlp.up_proj.weight (1, 2)" in text
    assert text.endswith("model.norm.weight")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"trainable_layers": 4}, "method.trainable_layers=4: this model has 3 layers"),
        ({"unfrozen_parameters": ["lm_heed"]}, "'lm_heed' matches no parameter .* did you mean 'lm_head'"),
        ({"unfrozen_parameters": ["norm", "layers.7"]}, "'layers.7' matches no parameter"),
    ],
)
def test_what_the_model_does_not_have_is_refused_by_name(keys, message: str):
    with pytest.raises(ConfigError, match=message):
        frozen(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"trainable_layers": 0}, "trainable_layers=0 trains nothing"),
        ({"name": "freeze"}, "set one of them"),
        ({"peft_type": "LORA", "trainable_layers": 1}, "not an adapter"),
        ({"unfrozen_parameters": ["(a"]}, "not a valid regular expression"),
        ({"unfrozen_parameters": ["(?i)norm"]}, "not a valid regular expression: global flags"),
        ({"lisa_activated_layers": 1}, "needs both"),
        ({"name": "lisa"}, "needs both"),
        ({"lisa_activated_layers": 1, "lisa_interval_steps": 1, "trainable_layers": 1}, "use method=lisa alone"),
    ],
)
def test_contradicting_keys_are_refused(keys, message: str):
    with pytest.raises(ValueError, match=message):
        MethodConfig(**keys)


@settings(max_examples=8)
@given(st.integers(1, 3), st.lists(st.sampled_from(["norm", "mlp", "layers.0", "embed_tokens", "lm_head"]), max_size=3))
def test_trained_are_exactly_the_layers_and_the_named(count: int, patterns: list[str]):
    names = trainable_set(frozen(trainable_layers=count, unfrozen_parameters=patterns))
    layers = trainable_set(frozen(trainable_layers=count))
    named = trainable_set(frozen(unfrozen_parameters=patterns)) if patterns else set()
    assert names == layers | named


def test_lisa_trains_what_is_outside_of_layers_and_plans_with_the_last():
    model = frozen()
    trained.sample_last(model, MethodConfig(lisa_activated_layers=1, lisa_interval_steps=2))
    names = trainable_set(model)
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"2"}
    assert {name for name in names if ".layers." not in name} == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}  # fmt: skip


def test_lisa_of_more_layers_than_there_are_is_refused():
    method = MethodConfig(lisa_activated_layers=4, lisa_interval_steps=2)
    with pytest.raises(ConfigError, match="lisa_activated_layers=4: this model has 3 layers"):
        trained.check_trained(frozen(), method, OptimizerConfig())


WITHOUT_BLOCKS = {
    "bloom": "query_key_value",
    "deepseek_v3": "kv_a_proj_with_mqa",
    "gpt2": "c_fc",  # its rows are columns
    "gpt_bigcode": "c_attn",
    "gpt_oss": "sinks",
    "jamba": "A_log",
    "lfm2": "conv",
    "mixtral": "experts.gate_up_proj",
    "phi3": "qkv_proj",
    "qwen3_5_text": "in_proj_qkv",
}


@pytest.mark.parametrize("family", WITHOUT_BLOCKS)
def test_adam_mini_refuses_by_name_what_has_neither_heads_nor_rows(family: str):
    model = skeleton(ModelConfig(model_name_or_path=f"random:{family}"))
    with pytest.raises(ConfigError, match=rf"^optimizer=adam_mini has .*{WITHOUT_BLOCKS[family]}") as error:
        trained.check_trained(model, MethodConfig(), OptimizerConfig(optim="adam_mini"))
    assert "\n" not in str(error.value)


def test_adam_mini_asks_only_for_blocks_of_what_is_trained():
    model = skeleton(ModelConfig(model_name_or_path="random:phi3"))
    trained.freeze(model, MethodConfig(unfrozen_parameters=["mlp", "norm"]))
    blocks, head = trained.adam_mini_blocks(model)
    assert (head, {*blocks.values()}) == (0, {"row", "whole"})
    assert {name.split(".")[-2] for name, block in blocks.items() if block == "row"} == {"gate_up_proj", "down_proj"}


def test_adam_mini_refuses_heads_of_several_sizes():
    model = skeleton(ModelConfig(model_name_or_path="random:llama"))
    model.model.layers[0].self_attn.head_dim = 8
    with pytest.raises(ConfigError, match="its heads have several sizes"):
        trained.adam_mini_blocks(model)
