"""What few bits lose, against values that can be worked out by hand."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import exit_code

from qlora_exp.config.hydra_compose import compose
from qlora_exp.models.base import load_unquantized
from qlora_exp.studies import quantize_error

pytestmark = pytest.mark.usefixtures("_quanto")

BITS = {
    "bfloat16": 16,
    "float16": 16,
    "nf4": 4 + 32 / 64,
    "nf4_double": 4 + 8 / 64 + 32 / (64 * 256),
    "fp4": 4 + 32 / 64,
    "fp4_double": 4 + 8 / 64 + 32 / (64 * 256),
    "int4_uniform": 4 + 32 / 64,
    "int8": 8 + 32 / 1024,
    "torchao_int8": 8 + (32 + 8) / 1024,  # a zero for each row too
    "torchao_float8": 8 + 32 / 1024,
    "quanto_int8": 8 + 32 / 1024,
    "quanto_float8": 8 + 32 / 1024,
    "quanto_int4": 4 + 2 * 32 / 128,
    "quanto_int2": 2 + 2 * 32 / 128,
}


def tiny():
    return load_unquantized(compose(["model=tiny_llama"]).model)


@pytest.fixture(scope="module")
def sample_losses() -> dict[str, quantize_error.Loss]:
    return quantize_error.of_samples(count=2**18)


@pytest.mark.parametrize("name", quantize_error.FORMATS)
def test_bits_include_values_and_constants(name: str, sample_losses):
    assert sample_losses[name].bits == pytest.approx(BITS[name], abs=1e-3)


def test_double_quantization_saves_bits_at_almost_no_error(sample_losses):
    assert sample_losses["nf4"].bits - sample_losses["nf4_double"].bits == pytest.approx(0.373, abs=1e-3)
    assert sample_losses["nf4_double"].rmse == pytest.approx(sample_losses["nf4"].rmse, rel=1e-3)


def test_nf4_beats_uniform_levels_and_fp4_on_normal_samples(sample_losses):
    kinds = ("nf4", "int4_uniform", "fp4", "int8", "bfloat16", "float16")
    order = sorted(kinds, key=lambda name: sample_losses[name].rmse)
    assert order == ["float16", "bfloat16", "int8", "nf4", "int4_uniform", "fp4"]


def test_16_bit_floats_are_off_by_half_a_unit_in_the_last_place_at_most(sample_losses):
    assert sample_losses["bfloat16"].rmse < 2**-8
    assert sample_losses["float16"].rmse < 2**-11


def test_nf4_has_16_levels_with_zero_and_both_ends():
    found = quantize_error.levels("nf4")
    assert len(found) == 16
    assert {-1.0, 0.0, 1.0} <= set(found)


@given(st.integers(1, 200), st.sampled_from([8, 64]), st.integers(2, 32))
def test_uniform_levels_are_off_by_half_a_step_at_most(size: int, blocksize: int, levels: int):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(size))
    back, _ = quantize_error.uniform(weight, blocksize, levels)
    for start in range(0, size, blocksize):
        block, found = weight[start : start + blocksize], back[start : start + blocksize]
        assert (found - block).abs().max() <= block.abs().max() / (levels - 1) * (1 + 1e-5)


def test_zeros_stay_zeros():
    for name, store in quantize_error.FORMATS.items():
        if name.endswith("float8"):  # NaN: `quantization.guard_layers` refuses such a model
            continue
        back, _ = store(torch.zeros(64, 64), 64)
        assert back.abs().max() <= 1e-30, name


def test_measuring_a_model_leaves_it_unchanged():
    model = tiny()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    asked = []

    def loss_of(one) -> float:
        changed = {name for name, parameter in one.named_parameters() if not torch.equal(parameter, before[name])}
        asked.append(changed)
        return len(changed)

    found = quantize_error.of_model(model, loss_of)
    linear = {f"{name}.weight" for name in quantize_error.linear_layers(model)}
    assert asked == [set(), *[linear] * len(quantize_error.FORMATS)]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert found["none"] == quantize_error.Loss(0.0, 32, 0)
    assert 0.08 < found["nf4"].rmse < 0.1  # random weights are normal


def test_failed_measurement_leaves_the_model_unchanged():
    model = tiny()
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    answers = iter([1.0])
    with pytest.raises(StopIteration):
        quantize_error.of_model(model, lambda _: next(answers))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_text_loss_equals_the_models_loss():
    model = tiny().eval()
    ids = list(range(40, 60))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": [ids, ids], "labels": [ids, ids]})
    assert quantize_error.text_loss(model, rows) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_quantize_error_command_prints_and_writes_a_table(tmp_path, capsys):
    words = ("model=tiny_llama", "unrelated.max_eval_rows=1", "--out", str(tmp_path / "lab"))
    assert exit_code("quantize-error", *words) == 0
    assert "nf4_double" in capsys.readouterr().out
    written = json.loads((tmp_path / "lab" / "quantize_error.json").read_text())
    assert written["weights"].keys() == {"none", *quantize_error.FORMATS}
    assert math.isfinite(written["weights"]["nf4"]["loss"])
    assert "| nf4_double |" in (tmp_path / "lab" / "quantize_error.md").read_text()
    assert "<svg" in (tmp_path / "lab" / "quantize_error.svg").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["unrelated=none"], "choose one, such as unrelated=python_docs"),
        (["--blocksize", "63"], "invalid choice: 63"),
        (["model=tiny_lama"], "no option 'tiny_lama'"),
    ],
)
def test_invalid_quantize_error_arguments_are_rejected(words: list[str], message: str, capsys):
    assert exit_code("quantize-error", "model=tiny_llama", *words) in (1, 2)
    assert message in capsys.readouterr().err
