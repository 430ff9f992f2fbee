"""The fast dropout has torch's distribution and torch's arithmetic."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from qlora_exp.libraries.torch import FakeTensorMode, is_fake
from qlora_exp.models.layers import dropout
from qlora_exp.models.layers.dropout import CpuDropout, keep_mask


@settings(max_examples=25, deadline=None)
@given(p=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_each_element_is_dropped_with_probability_p_independently_of_its_neighbours(p: float, seed: int):
    torch.manual_seed(seed)
    n = 200_000
    dropped = ~keep_mask(torch.Size((n,)), p)
    assert abs(dropped.double().mean() - p) < 6 * math.sqrt(p * (1 - p) / n)
    for distance in (1, 8):  # within a 64-bit number, and in the next
        both = (dropped[:-distance] & dropped[distance:]).double().mean()
        assert abs(both - p**2) < 6 * math.sqrt(p**2 / n) + 1e-5


@pytest.mark.parametrize("p", [1 / 256, 0.05, 0.25, 0.3])
def test_probability_is_not_rounded_to_bytes(p: float):
    torch.manual_seed(0)
    n = 20_000_000
    assert abs((~keep_mask(torch.Size((n,)), p)).double().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (0, 4), (2, 5, 576)])
def test_values_and_gradients_are_those_of_torch_with_the_same_mask(dtype: torch.dtype, shape: tuple[int, ...]):
    x, gradient = (torch.randn(shape).to(dtype) for _ in range(2))
    x.requires_grad_()
    layer = CpuDropout(0.3)
    torch.manual_seed(1)
    out = layer(x)
    out.backward(gradient)
    torch.manual_seed(1)
    noise = keep_mask(torch.Size(shape), 0.3).to(dtype).div_(1 - 0.3)  # as `torch.nn.functional.dropout` computes
    assert torch.equal(out, x * noise)
    assert torch.equal(x.grad, gradient * noise)


def test_same_seed_same_mask_also_when_recomputed():
    x = torch.randn(64, 64, requires_grad=True)
    layer = CpuDropout(0.5)
    torch.manual_seed(3)
    plain = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch.manual_seed(3)
    recomputed = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)[0]
    assert torch.equal(plain, recomputed)


def test_without_training_or_randomness_nothing_is_drawn():
    x, before = torch.randn(4, 4), torch.get_rng_state()
    assert torch.equal(CpuDropout(0.5).eval()(x), x)
    assert torch.equal(CpuDropout(0.0)(x), x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not CpuDropout(1.0)(x).any()


def test_tensors_without_values_keep_one_byte_for_each_element():
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(3, 5, requires_grad=True)
        out = CpuDropout(0.1)(x)
        assert is_fake(out)
        assert out.grad_fn.saved_tensors[0].dtype == torch.bool
        out.sum().backward()
        assert x.grad.shape == x.shape


def test_all_dropout_layers_are_replaced_and_no_state_changes():
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1)), "b": torch.nn.Dropout(0.2)}
    )
    model["b"].eval()
    names = [*model.state_dict()]
    dropout.on_cpu(model)
    assert [(type(layer), layer.p, layer.training) for layer in (model["a"][1], model["b"])] == [
        (CpuDropout, 0.1, True),
        (CpuDropout, 0.2, False),
    ]
    assert [*model.state_dict()] == names
