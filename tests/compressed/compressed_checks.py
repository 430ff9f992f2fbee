"""Exports in the compressed-tensors format, made by LLM Compressor on a CPU and read by transformers."""

import json

import pytest
import torch

from qlora_exp.deploy import export, load, merge
from qlora_exp.deploy.formats import COMPRESSED
from qlora_exp.utils.errors import ModelError

STORED = {
    "w4a16": "w4a16, groups of 64",
    "w4a16_awq": "w4a16_awq, groups of 64",
    "w8a8": "w8a8",
    "fp8": "fp8",
}


def find(folder):
    return load.find(str(folder), device="cpu")


@pytest.mark.parametrize("form", COMPRESSED)
def test_compressed_export_is_the_merged_model_but_for_rounding(form, trained_adapters, tmp_path):
    saved = find(trained_adapters())
    made = export.export(saved, tmp_path / "made", form)
    assert (made.form, made.weights) == (form, STORED[form])
    assert 0 < made.mean_kl < 0.05
    settings = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["quantization_status"]) == ("compressed-tensors", "compressed")
    assert [one.name for one in (tmp_path / "made").glob(".*")] == []
    model, tokenizer = load.load(str(tmp_path / "made"), device="cpu")
    ids = tokenizer("a question", return_tensors="pt").input_ids
    with torch.no_grad():
        far = (model(input_ids=ids).logits - merge.whole(saved).model(input_ids=ids).logits).abs().max()
    assert 0 < far < 0.5
    again = export.export(find(tmp_path / "made"), tmp_path / "again", "gguf", type_="f32")
    assert again.max_logit_difference < 1e-3


@pytest.mark.parametrize("form", COMPRESSED)
def test_compressed_export_that_loses_more_than_rounding_is_rejected(form, trained_adapters, tmp_path, monkeypatch):
    read = export.load_complete_model

    def damaged(*arguments):
        model = read(*arguments)
        model.model.layers[1].input_layernorm.weight.data *= 1.5
        return model

    monkeypatch.setattr(export, "load_complete_model", damaged)
    with pytest.raises(ModelError, match=f"storing weights as {STORED[form]} explains only"):
        export.export(find(trained_adapters()), tmp_path / "made", form)
    assert not (tmp_path / "made").exists()
