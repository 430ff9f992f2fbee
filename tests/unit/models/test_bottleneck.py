"""Bottleneck adapters are a method of PEFT like any other, but for merging."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.models.base import load_unquantized, skeleton
from qlora_exp.models.bottleneck import BottleneckConfig, BottleneckLayer
from qlora_exp.models.targets import resolve_targets

TINY = ModelConfig(model_name_or_path="random:llama")
IDS = torch.arange(40, 72)[None]


def real():
    return load_unquantized(TINY)


def adapted(**settings):
    torch.manual_seed(0)
    model = get_peft_model(real(), BottleneckConfig(target_modules=["o_proj", "down_proj"], **settings))
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    return model.eval()


@pytest.mark.parametrize(
    ("family", "names"),
    [("llama", ["down_proj", "o_proj"]), ("qwen2", ["down_proj", "o_proj"]), ("opt", ["fc2", "out_proj"])],
)
def test_outputs_preset_names_the_last_layers_of_attention_and_mlp(family: str, names: list[str]):
    assert resolve_targets("outputs", skeleton(ModelConfig(model_name_or_path=f"random:{family}"))) == names


@pytest.mark.parametrize(
    ("non_linearity", "function"),
    [
        ("relu", torch.relu),
        ("gelu", torch.nn.functional.gelu),
        ("silu", torch.nn.functional.silu),
        ("tanh", torch.tanh),
    ],
)
def test_bottleneck_output_follows_the_papers_formula(non_linearity: str, function):
    base = torch.nn.Linear(6, 4)
    layer = BottleneckLayer(base, "default", BottleneckConfig(bottleneck_size=3, non_linearity=non_linearity))
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    x = torch.randn(2, 5, 6)
    y = base(x)
    expected = y + function(y @ down.weight.T + down.bias) @ up.weight.T + up.bias
    torch.testing.assert_close(layer(x), expected)


def test_bottleneck_starts_near_the_identity():
    model, base = get_peft_model(real(), BottleneckConfig(target_modules=["o_proj", "down_proj"])).eval(), real().eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits, atol=0.02, rtol=0.02)
    weights = [p for name, p in model.named_parameters() if "bottleneck_" in name and name.endswith("weight")]
    assert all(weight.abs().max() <= 0.02 for weight in weights)


def test_disabled_bottleneck_equals_the_base():
    model, base = adapted(), real().eval()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits)


def test_bottleneck_adapters_of_one_base_can_be_switched(tmp_path):
    model = adapted(bottleneck_size=4)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        first = model(IDS).logits
        model.add_adapter("second", BottleneckConfig(target_modules=["o_proj", "down_proj"], bottleneck_size=2))
        assert not any(p.requires_grad for name, p in model.named_parameters() if "second" in name)
        model.set_adapter("second")
        assert not torch.equal(model(IDS).logits, first)
        again = PeftModel.from_pretrained(real(), tmp_path).eval()
        torch.testing.assert_close(again(IDS).logits, first)


def test_merging_a_bottleneck_is_rejected():
    with pytest.raises(ValueError, match="cannot be merged"):
        adapted().merge_and_unload()


def test_bottleneck_after_a_nonlinear_layer_is_rejected():
    with pytest.raises(ValueError, match="follows a linear layer, not a"):
        get_peft_model(real(), BottleneckConfig(target_modules=["input_layernorm"]))
