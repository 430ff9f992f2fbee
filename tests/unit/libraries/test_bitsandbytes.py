import copy

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit

from qlora_exp.libraries.bitsandbytes import constants, dequantize_every_width, keep_trainable, take_scales


def test_a_4_bit_layer_does_not_repack_its_weights():
    layer = Linear4bit(64, 64)
    assert "support_avx512bf16_for_cpu" in vars(layer)
    layer.support_avx512bf16_for_cpu = True
    keep_trainable(layer)
    assert layer.support_avx512bf16_for_cpu is False


def test_an_8_bit_layer_gets_back_scales_that_a_move_lost():
    layer = Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu")
    layer.weight = layer.weight.to("cpu")
    x = torch.ones(2, 64)
    before = layer(x)
    keep_trainable(layer)
    layer.weight.CB, layer.weight.SCB = layer.weight.data, None
    assert torch.equal(layer(x), before)


def test_other_layers_are_left_alone():
    layer = torch.nn.Linear(2, 2)
    keep_trainable(layer)
    assert not layer._forward_pre_hooks


def test_what_layers_keep_to_dequantize():
    eight, four = Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu"), Linear4bit(64, 64).to("cpu")
    eight(torch.ones(2, 64))
    assert {id(eight.state.CB), id(eight.state.SCB)} <= {*map(id, constants(eight))}
    assert id(four.weight.quant_state) in {*map(id, constants(four.weight))}


def test_8_bit_layers_with_one_weight_compute_the_same_once_they_have_its_scales():
    layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu")
    take_scales(layer)
    other = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    other.weight, other.state = layer.weight, copy.copy(layer.state)
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bit_weights_of_every_width_are_dequantized_to_their_own_values(kind: str, dtype: torch.dtype):
    dequantize_every_width()
    for width in (2, 32, 33, 48, 64, 96, 100, 128, 160):
        weight = torch.randn(7, width, dtype=dtype)
        packed, state = functional.quantize_4bit(weight, quant_type=kind)
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: weight.numel()].long()
        values = state.code[codes] * state.absmax.repeat_interleave(64)[: weight.numel()]
        expected = values.reshape(weight.shape).to(dtype)
        torch.testing.assert_close(functional.dequantize_4bit(packed, state), expected, rtol=1e-2, atol=1e-6)
        layer = Linear4bit(width, 7, bias=False, quant_type=kind)
        layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type=kind)
        inputs = torch.eye(width, dtype=dtype, requires_grad=True)
        torch.testing.assert_close(layer.to("cpu")(inputs).T, expected, rtol=2e-2, atol=1e-5)
