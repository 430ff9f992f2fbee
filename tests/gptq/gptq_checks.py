"""Bases whose files are GPTQ or AWQ already, through GPTQModel on a CPU (`nox -s gptq`).

GPTQ files are made by GPTQModel itself; it makes AWQ files on a GPU only, so that ours are written by hand.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # GPTQModel 7.6 wants two, and takes half of the cores

from qlora_exp import load
from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.tables import compatibility
from qlora_exp.config.tables.compatibility import WORKS
from qlora_exp.deploy import export, merge
from qlora_exp.deploy.load import find
from qlora_exp.environment.device import Device, resolve
from qlora_exp.models import base, files, quantization
from qlora_exp.studies import probe
from qlora_exp.tracking.journal import FILE, read
from qlora_exp.utils.errors import ModelError

CPU = Device("cpu", "CPU", bf16=False, paging=False)
GROUP = 32
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Of the values in one 32-bit integer of AWQ's GEMM format."""


@pytest.fixture(scope="module")
def plain_folder() -> Path:
    return Path(files.locate(compose(["model=tiny_llama"]).model))


@pytest.fixture(scope="module")
def gptq_folder(plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gptqmodel import GPTQModel, QuantizeConfig

    folder = tmp_path_factory.mktemp("gptq") / "model"
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(0, 100, (40,)).tolist(), "attention_mask": [1] * 40} for _ in range(64)]
    quantizer = GPTQModel.load(str(plain_folder), QuantizeConfig(bits=4, group_size=GROUP), device="cpu")
    quantizer.quantize(rows, batch_size=1)
    quantizer.save(str(folder))
    return folder


def packed(values: torch.Tensor) -> torch.Tensor:
    """Integers 0 to 15, (rows, columns), eight in one."""
    eight = values.view(values.shape[0], -1, 8)[:, :, ORDER].to(torch.int64)
    together = sum(eight[..., place] << (4 * place) for place in range(8))
    return torch.where(together >= 2**31, together - 2**32, together).to(torch.int32).contiguous()


@pytest.fixture(scope="module")
def awq_folder(plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(plain_folder, tmp_path_factory.mktemp("awq") / "model")
    written = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" not in name:
            written[name] = weight
            continue
        groups = weight.T.float().reshape(-1, GROUP, weight.shape[0])
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        scale = (high - low) / 15
        zero = (-low / scale).round().clamp(0, 15)
        module = name.removesuffix("weight")
        written[f"{module}qweight"] = packed((groups / scale + zero).round().clamp(0, 15).view_as(weight.T))
        written[f"{module}qzeros"] = packed(zero[:, 0])
        written[f"{module}scales"] = scale[:, 0].half().contiguous()
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(params=["gptq", "awq"])
def quantized_folder(request: pytest.FixtureRequest) -> tuple[str, Path]:
    return request.param, request.getfixturevalue(f"{request.param}_folder")


def test_quantized_files_support_all_aspects_of_training_but_merging(
    quantized_folder: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
):
    name, folder = quantized_folder
    monkeypatch.setitem(compatibility.BASES, name, f"{name} model.model_name_or_path={folder}")
    found = probe.verdicts(["method=lora"], name)
    assert {aspect for aspect, verdict in found.items() if verdict != WORKS} == {"merge"}, found


def test_layer_computes_with_its_dequantized_weights(quantized_folder: tuple[str, Path]):
    name, folder = quantized_folder
    config = compose(["method=lora", f"quantization={name}", f"model.model_name_or_path={folder}"])
    layer = base.load_model(config.model, config.quantization, resolve(config, CPU)).model.layers[0].mlp.down_proj
    weight = quantization.weight_of(layer)
    assert weight is not None
    assert weight.shape == (64, 128)
    assert torch.allclose(layer(torch.eye(128)).T, weight, atol=1e-3)


@pytest.mark.parametrize(
    "words", [["method=qlora"], ["method=lora", "lora_variant=qalora", f"lora_variant.qalora_group_size={GROUP}"]]
)
def test_run_on_gptq_files_trains_and_is_loaded_again(
    gptq_folder: Path, run_quick: Callable[..., Any], words: list[str]
):
    result = run_quick(*words, "quantization=gptq", f"model.model_name_or_path={gptq_folder}")
    adapted, tokenizer = load(str(result.output_dir))
    assert type(adapted.base_model.model.model.layers[0].mlp.down_proj).__name__ == "GPTQLoraLinear"
    ids = tokenizer("a question", return_tensors="pt").input_ids
    assert torch.isfinite(adapted(input_ids=ids).logits).all()
    plain = run_quick("method=lora", "evaluation=loss_only", "training.max_steps=1")
    frozen = [one.metrics["total_parameters"] - one.metrics["trainable_parameters"] for one in (result, plain)]
    assert frozen[0] == frozen[1]  # packed weights count for what they stand for


def test_gptq_files_without_quantization_gptq_are_rejected(gptq_folder: Path):
    config = compose(["method=lora", f"model.model_name_or_path={gptq_folder}"])
    with pytest.raises(ModelError, match="choose quantization=gptq"):
        base.load_model(config.model, config.quantization, resolve(config, CPU))


def test_gptq_export_calibrates_on_the_runs_own_rows(run_quick: Callable[..., Any], tmp_path: Path):
    result = run_quick("method=lora", "dataset.max_train_rows=32", "training.learning_rate=1e-2")
    made = export.export(find(result.run_id, result_store(result), "cpu"), tmp_path / "made", "gptq")
    assert (made.form, made.weights) == ("gptq", "gptq, groups of 64")
    assert 0 < made.mean_kl < 0.01
    assert json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]["bits"] == 4
    assert sorted(one.name for one in (tmp_path / "made").glob(".*")) == []
    adapted, tokenizer = load(str(tmp_path / "made"), device="cpu")
    whole = merge.whole(find(str(result.output_dir), device="cpu"))
    ids = tokenizer("a question", return_tensors="pt").input_ids
    with torch.no_grad():
        far = (adapted(input_ids=ids).logits - whole.model(input_ids=ids).logits).abs().max()
    assert 0 < far < 0.3


def test_gptq_export_that_loses_more_than_rounding_is_rejected(
    run_quick: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    result = run_quick("method=lora", "dataset.max_train_rows=32", "training.learning_rate=1e-2")
    read = export.load_complete_model

    def damaged(*arguments: Any) -> Any:
        model = read(*arguments)
        model.model.layers[1].input_layernorm.weight.data *= 1.5
        return model

    monkeypatch.setattr(export, "load_complete_model", damaged)
    with pytest.raises(ModelError, match="storing weights as gptq, groups of 64 explains only"):
        export.export(find(result.run_id, result_store(result), "cpu"), tmp_path / "made", "gptq")
    assert not (tmp_path / "made").exists()


def result_store(result: Any) -> str:
    """Of the run's journal."""
    return str(next(read(result.output_dir / FILE))[0]["uri"])
