"""Bases in a few bits: what they take, that they compute what they stand for, and what is refused."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import Device, resolve
from qlora_exp.models import files, quantization
from qlora_exp.models.adapters import attach, peft_config
from qlora_exp.models.base import load_model
from qlora_exp.models.files import locate
from qlora_exp.utils.errors import ModelError

pytestmark = pytest.mark.usefixtures("_quanto")

CPU = Device("cpu", "CPU", bf16=False, paging=False)
BITS = {
    "nf4": 4,
    "nf4_double": 4,
    "fp4": 4,
    "fp4_double": 4,
    "int8": 8,
    "torchao_int8": 8,
    "torchao_float8": 8,
    "quanto_int8": 8,
    "quanto_float8": 8,
    "quanto_int4": 4,
    "quanto_int2": 2,
}
"""Of one weight, without what blocks or rows share."""
TINY = ["model=tiny_llama", "+model.random_config.hidden_size=256", "+model.random_config.intermediate_size=512"]


def load(*overrides: str):
    config = compose([*TINY, *overrides])
    resolved = resolve(config, CPU)
    return config, resolved, load_model(config.model, config.quantization, resolved)


def gradients(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stored(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The common tensors that one of a library's own kinds is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.data]
    return [one for name in tensor.__tensor_flatten__()[0] for one in stored(getattr(tensor, name))]


@pytest.mark.parametrize("name", BITS)
def test_quantized_weights_have_the_expected_size(name: str):
    _, _, model = load("method=lora", f"quantization={name}")
    parts = stored(model.model.layers[0].mlp.up_proj.weight)
    assert max(part.nbytes for part in parts) == 256 * 512 * BITS[name] / 8
    assert sum(part.nbytes for part in parts) < 256 * 512 * (BITS[name] + 1) / 8


@pytest.mark.parametrize("name", BITS)
def test_layer_computes_with_its_dequantized_weights(name: str):
    _, _, model = load("method=lora", f"quantization={name}")
    _, _, plain = load("method=lora")
    layer, original = (one.model.layers[0].mlp.up_proj for one in (model, plain))
    weight = quantization.weight_of(layer)
    assert weight is not None
    assert quantization.weight_of(original) is None
    products = layer(torch.eye(256)).T
    assert torch.allclose(products, weight, atol=0.02 * float(weight.abs().max()))  # int8 rounds its inputs too
    error = (weight - original.weight).norm() / original.weight.norm()
    assert 0.001 < error < {8: 0.03, 4: 0.13, 2: 0.6}[BITS[name]]


@pytest.mark.parametrize("name", ["torchao_int8", "quanto_int4"])
def test_missing_quantizer_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="qlora-exp\\[quantizers\\]"):
        load("method=lora", f"quantization={name}")


@pytest.mark.parametrize(
    ("asked", "stored", "says"),
    [
        ("none", {"quant_method": "gptq", "bits": 4}, "quantized already (gptq): choose quantization=gptq"),
        ("nf4", {"quant_method": "awq"}, "choose quantization=awq"),
        ("none", {"quant_method": "mxfp4"}, "quantized already (mxfp4): choose another model"),
        ("gptq", None, "its files are not quantized"),
        ("none", {"load_in_8bit": True}, "choose quantization=int8"),
        (
            "fp4",
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "choose quantization=nf4",
        ),
        (
            "nf4",
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "choose quantization=nf4_double",
        ),
    ],
)
def test_files_quantized_otherwise_are_rejected(asked: str, stored: dict | None, says: str):
    config = compose(["method=lora", f"quantization={asked}"]).quantization
    with pytest.raises(ModelError) as error:
        files.check_files("x", config, stored)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        ("none", None),
        ("nf4", None),
        ("gptq", {"quant_method": "gptq", "bits": 4}),
        ("nf4_double", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        ("int8", {"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}),
    ],
)
def test_files_quantized_as_configured_are_accepted(asked: str, stored: dict | None):
    files.check_files("x", compose(["method=lora", f"quantization={asked}"]).quantization, stored)


@pytest.mark.parametrize("name", ["torchao_float8", "quanto_float8"])
def test_zero_rows_that_would_become_nan_are_rejected(name: str, tmp_path):
    folder = shutil.copytree(locate(compose(TINY).model), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = compose(["method=lora", f"quantization={name}", f"model.model_name_or_path={folder}"])
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj: rows of zeros"):
        load_model(config.model, config.quantization, resolve(config, CPU))


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="GPTQModel is installed")
def test_gptq_files_without_gptqmodel_name_the_package(tmp_path):
    folder = shutil.copytree(locate(compose(TINY).model), tmp_path / "model")
    values = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}
    }
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="pip install 'GPTQModel' 'optimum'"):
        config = compose(["method=lora", "quantization=gptq", f"model.model_name_or_path={folder}"])
        load_model(config.model, config.quantization, resolve(config, CPU))


def test_quantization_settings_reach_the_model():
    _, _, model = load("quantization=fp4_double", "quantization.bnb_4bit_compute_dtype=bfloat16")
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.quant_type == "fp4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_int8_gradients_are_equal_after_an_evaluation(variant: str):
    config, resolved, base = load("quantization=int8", f"lora_variant={variant}", "method.lora_dropout=0.0")
    adapted = attach(base, peft_config(config, base), resolved.adapter_dtype)
    ids = torch.arange(40, 72)[None]
    first = gradients(adapted, ids)
    with torch.no_grad():
        adapted.eval()(input_ids=ids)
    again = gradients(adapted, ids)
    assert all(torch.equal(again[name], gradient) for name, gradient in first.items())


@pytest.mark.parametrize("quantization", ["nf4_double", "fp4"])
def test_four_bit_gradients_are_right_after_an_evaluation(quantization: str):
    """The silent bitsandbytes bug: without `guard_layers`, the second pass loses most of the gradient."""
    import bitsandbytes as bnb

    config, resolved, base = load(f"quantization={quantization}", "method.r=4", "method.lora_dropout=0.0")
    _, _, plain = load("method=lora", "method.r=4", "method.lora_dropout=0.0")
    for (_, quantized), (_, full) in zip(base.named_modules(), plain.named_modules(), strict=True):
        if isinstance(quantized, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(quantized.weight.data, quantized.weight.quant_state)
            full.weight.data = values.to(torch.float32)
    settings = peft_config(config, base)
    torch.manual_seed(0)
    adapted = attach(base, settings, resolved.adapter_dtype)
    torch.manual_seed(0)
    reference = attach(plain, settings, resolved.adapter_dtype)
    ids = torch.arange(40, 72)[None]

    expected = gradients(reference, ids)
    adapted.eval()
    with torch.no_grad():
        adapted(input_ids=ids)
        adapted.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    found = gradients(adapted, ids)
    layers = [module for module in base.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)  # also where this CPU cannot show the bug
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient.norm() > 0:
            cosine = torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.999, name
