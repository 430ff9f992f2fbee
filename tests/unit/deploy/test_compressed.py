"""What can be made is known before anything is loaded; the files themselves: `nox -s compressed`."""

import pytest
import torch

from qlora_exp.deploy import compressed, gptq
from qlora_exp.deploy.formats import COMPRESSED
from qlora_exp.utils.errors import ConfigError


@pytest.mark.parametrize("form", COMPRESSED)
def test_missing_package_is_named(form, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"--to {form} needs the packages llmcompressor.*nox -s compressed"):
        compressed.check(form)


def test_rounding_leaves_as_many_values_as_the_bits_have():
    weight = torch.randn(2, 1024)
    for bits, group in ((4, 128), (8, 1024)):
        rounded = gptq.round_to_nearest(weight, group, bits)
        for each in rounded.reshape(-1, group):
            assert len(each.unique()) <= 2**bits - 1
        assert (rounded - weight).abs().max() <= weight.abs().max() / (2**bits - 2)


def test_layers_that_divide_into_no_group_are_rejected():
    layers = [torch.nn.Linear(96, 8), torch.nn.Linear(100, 8)]
    assert gptq.group_size(layers[:1], "w4a16") == 32
    with pytest.raises(ConfigError, match="do not divide into groups of 128, 64, 32 weights"):
        gptq.group_size(layers, "w4a16")
