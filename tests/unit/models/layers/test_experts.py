"""Experts in 4 bits: they are what bitsandbytes stores, and a model with them computes as a dense model does."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.config.sections.quantization import QuantizationConfig
from qlora_exp.environment.device import Device, resolve
from qlora_exp.models import quantization
from qlora_exp.models.adapters import attach, peft_config
from qlora_exp.models.base import check_quantization, load_model, skeleton
from qlora_exp.models.builtin import TINY
from qlora_exp.models.layers import experts as module
from qlora_exp.models.layers.experts import Experts4bit, check_use, packed_experts, unpack
from qlora_exp.models.targets import fused_experts
from qlora_exp.utils.errors import ConfigError

CPU = Device("cpu", "CPU", bf16=False, paging=False)
FAMILIES = {
    "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "granitemoehybrid", "jamba", "lfm2_moe", "mixtral", "olmoe",
    "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
}  # fmt: skip


@cache
def kind(name: str) -> QuantizationConfig:
    return compose(["method=qlora", f"quantization={name}"]).quantization


def load(family: str, *words: str):
    model = f"model.model_name_or_path=random:{family}"
    config = compose(["model=tiny_llama", model, "method=qlora", "method.lora_dropout=0", *words])
    return config, load_model(config.model, config.quantization, resolve(config, CPU))


def loss_and_gradients(config, model, implementation: str):
    """Of a batch, with an adapter whose B is not zero."""
    model.set_experts_implementation(implementation)
    torch.manual_seed(0)
    adapted = attach(model, peft_config(config, model), "float32").train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.arange(3, 35).view(2, 16)
    loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss, {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}


def check_equal(config, packed, implementation: str = "grouped_mm") -> None:
    dense = deepcopy(packed)
    unpack(dense, dense.dtype)
    assert [*packed_experts(packed)]
    assert not [*packed_experts(dense)]
    (loss, gradients), (expected, of_dense) = (
        loss_and_gradients(config, model, implementation) for model in (packed, dense)
    )
    assert torch.equal(loss, expected)
    assert gradients.keys() == of_dense.keys() != set()
    assert all(torch.equal(gradients[name], of_dense[name]) for name in of_dense)


@settings(max_examples=30, deadline=None)
@given(
    shape=array_shapes(min_dims=3, max_dims=3, max_side=40),
    name=st.sampled_from(["nf4", "nf4_double", "fp4", "fp4_double"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_experts_stand_for_what_bitsandbytes_would_store(shape, name, dtype):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    chosen = kind(name)
    packed = Experts4bit.quantized(weights, chosen)
    values, state = functional.quantize_4bit(
        weights.view(1, -1),  # bitsandbytes 0.50.2 takes rows that are no whole number of blocks wrong on CPUs
        compress_statistics=chosen.bnb_4bit_use_double_quant,
        quant_type=chosen.bnb_4bit_quant_type,
    )
    expected = functional.dequantize_4bit(values, state).view(shape)
    assert (packed.shape, packed.dtype, packed.stride()) == (weights.shape, dtype, weights.stride())
    assert torch.equal(packed.dense(), expected)
    last = shape[0] - 1
    assert torch.equal(packed[last].dense(), expected[last])
    assert torch.equal(packed[torch.tensor(last)].t().dense(), expected[last].t())
    assert torch.equal(packed.transpose(-2, -1).dense(), expected.mT)
    assert torch.equal(packed.mT[0] + 0, expected.mT[0])
    assert torch.equal(packed[-1].to(torch.float64).dense(), expected[-1].double())
    assert torch.equal(packed[[last, 0]], expected[[last, 0]])
    assert torch.equal(deepcopy(packed).dense(), expected)


def test_many_values_are_quantized_and_read_in_parts(monkeypatch):
    weights = torch.randn(5, 32, 32)
    whole = Experts4bit.quantized(weights, kind("nf4_double")).dense()
    monkeypatch.setattr(module, "_MOST_VALUES", 2 * 32 * 32 + 1)  # bitsandbytes counts values in 32 bits
    in_parts = Experts4bit.quantized(weights, kind("nf4_double"))
    assert torch.equal(in_parts.dense(), whole)
    assert torch.equal(in_parts[4].dense(), whole[4])


def test_experts_in_4_bits_cannot_be_changed_or_moved():
    packed = Experts4bit.quantized(torch.randn(2, 8, 8), kind("nf4"))
    for change in (packed.zero_, lambda: packed.add_(1), lambda: torch.nn.init.normal_(packed)):
        with pytest.raises(NotImplementedError, match="cannot be changed"):
            change()
    with pytest.raises(NotImplementedError, match="cannot be moved"):
        packed.to("meta")
    assert packed.to("cpu:1") is not None  # as accelerate names the device of a process


def test_backward_pass_keeps_the_packed_experts_only():
    packed = Experts4bit.quantized(torch.randn(4, 16, 32), kind("nf4"))
    kept: list[torch.Tensor] = []
    tokens = torch.randn(6, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        torch.nn.functional.linear(tokens, packed[1])
        torch.nn.functional.grouped_mm(tokens, packed.mT, offs=torch.tensor([1, 2, 4, 6], dtype=torch.int32))
        with torch.autocast("cpu", torch.bfloat16):
            torch.nn.functional.linear(tokens, packed[1])
    assert [type(tensor) for tensor in kept if tensor.shape[-2:] in ((32, 16), (16, 32))] == [Experts4bit] * 3


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_experts_are_dequantized_once_for_each_product_and_pass(implementation: str, monkeypatch):
    config, model = load("qwen3_moe", "method.target_modules=attention", "+model.random_config.num_hidden_layers=1")
    read: list[int] = []
    dequantized = Experts4bit.dense
    monkeypatch.setattr(Experts4bit, "dense", lambda self: read.append(self.numel()) or dequantized(self))
    loss_and_gradients(config, model, implementation)
    both = 2 * sum(experts.numel() for _, experts in packed_experts(model))  # forward and backward
    assert sum(read) == both if implementation == "grouped_mm" else sum(read) <= both  # one expert has no token


@pytest.mark.thorough
def test_every_family_with_experts_is_known():
    words = {family: ["model=tiny_llama", f"model.model_name_or_path=random:{family}"] for family in TINY}
    assert {family for family in TINY if fused_experts(skeleton(compose(words[family]).model))} == FAMILIES


@pytest.mark.parametrize("target", ["attention", "all-linear"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_model_computes_as_a_dense_one_with_the_same_values(family: str, target: str):
    check_equal(*load(family, f"method.target_modules={target}"))


@pytest.mark.thorough
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("words", ["quantization=nf4_double", "quantization=fp4 model.dtype=bfloat16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_computes_as_a_dense_one(family: str, words: str, implementation: str):
    for target in ("attention", "all-linear"):
        check_equal(*load(family, f"method.target_modules={target}", *words.split()), implementation)


def test_recomputed_layers_have_the_same_gradients():
    config, model = load("qwen3_moe")
    other = deepcopy(model)
    for each in (model, other):
        each.enable_input_require_grads()
    other.gradient_checkpointing_enable({"use_reentrant": False})
    (_, gradients), (_, recomputed) = (loss_and_gradients(config, each, "grouped_mm") for each in (model, other))
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def test_experts_stay_in_16_bits_unless_configured():
    config, model = load("mixtral", "quantization.bnb_4bit_experts=false")
    assert not [*packed_experts(model)]
    bare = skeleton(config.model)
    said = check_quantization(config.model, config.quantization, resolve(config, CPU), bare)
    assert said is not None
    assert said.endswith("quantization.bnb_4bit_experts=true stores them in 4 bits")
    _, packed = load("mixtral")
    assert quantization.stored(packed).experts == 0
    assert quantization.stored(packed).share > 0.99
    saved = quantization.weights_bytes(model) - quantization.weights_bytes(packed)
    assert saved == pytest.approx(2 * 4 * 3 * 64 * 128 * (4 - 4.13 / 8), rel=0.01)


def test_checks_before_loading_see_what_loading_does():
    config, model = load("gpt_oss")
    bare = skeleton(config.model)
    assert check_quantization(config.model, config.quantization, resolve(config, CPU), bare) is None
    assert quantization.stored(bare) == quantization.stored(model)
    assert [name for name, _ in packed_experts(bare)] == [name for name, _ in packed_experts(model)]


def test_dequantized_model_has_ordinary_experts():
    _, model = load("gpt_oss")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        plain = quantization.dequantized(model, torch.float32)
        assert torch.allclose(plain(input_ids=ids).logits, before, atol=1e-5)
    assert {type(parameter) for parameter in plain.parameters()} == {torch.nn.Parameter}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["method.modules_to_save=[experts]"], r"modules_to_save=\['experts'\] trains fused experts as a whole"),
        (["method.modules_to_save=[mlp]"], "which 4 bits cannot be"),
        (["lora_variant=loftq", "method.target_modules=all-linear"], "LoftQ does not make up for what 4 bits lose"),
    ],
)
def test_what_experts_in_4_bits_cannot_be_is_rejected(words: list[str], says: str):
    model = "model.model_name_or_path=random:qwen3_moe"
    config = compose(["model=tiny_llama", model, "method=qlora", "method.lora_dropout=0", *words])
    with pytest.raises(ConfigError, match=says):
        peft_config(config, skeleton(config.model))
    in_16_bits = config.model_copy(
        update={"quantization": config.quantization.model_copy(update={"bnb_4bit_experts": False})}
    )
    assert peft_config(in_16_bits, skeleton(config.model)) is not None


def test_experts_in_4_bits_are_neither_sharded_nor_compiled():
    config, model = load("qwen3_moe")
    check_use(model, DistributedConfig(engine="ddp", num_processes=2))
    for engine in ("fsdp", "deepspeed_zero3"):
        with pytest.raises(ConfigError, match=f"distributed={engine} cannot shard experts"):
            check_use(model, DistributedConfig(engine=engine, num_processes=2))
    with pytest.raises(ConfigError, match="use training.torch_compile=false, or quantization.bnb_4bit_experts=false"):
        check_use(model, config.distributed, torch_compile=True)
    unpack(model, torch.float32)
    check_use(model, DistributedConfig(engine="fsdp", num_processes=2), torch_compile=True)
