import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from qlora_exp.libraries.bitsandbytes import constants, keep_trainable


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
