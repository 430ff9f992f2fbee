from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from qlora_exp.config.conf_folder import GROUPS, conf_dir
from qlora_exp.config.describe import json_schema, presets

jsonschema = pytest.importorskip("jsonschema", reason="pip install -e '.[dev]'")


@pytest.fixture(scope="module")
def validators() -> dict[str, Any]:
    made = {group: json_schema.of_group(group) for group in GROUPS} | {"": json_schema.of_any()}
    return {group: jsonschema.Draft7Validator(schema) for group, schema in made.items()}


def test_schemas_are_valid(validators: dict[str, Any]):
    for validator in validators.values():
        validator.check_schema(validator.schema)


@pytest.mark.parametrize("group", GROUPS)
def test_shipped_options_fit(group: str, validators: dict[str, Any]):
    for name in presets.options()[group]:
        values = OmegaConf.to_container(OmegaConf.load(conf_dir() / group / f"{name}.yaml")) or {}
        assert [error.message for error in validators[group].iter_errors(values)] == [], name


def test_the_root_config_fits(validators: dict[str, Any]):
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"))
    assert [error.message for error in validators[""].iter_errors(values)] == []


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ("dataset", "path: ${oc.env:ROWS}\nmax_train_rows: ${other}"),
        ("dataset", "sources: {talk: {path: a.jsonl, weight: 0.5}, code: {path: b.jsonl, format: chat}}"),
        ("experiment", "defaults: [override /model: llama3_8b, override /dataset: my_own, _self_]\nmethod: {r: 8}"),
        ("experiment", "training: {bf16: auto, sft_config: {label_smoothing_factor: 0.1}}"),
        ("method", "method: {peft_type: OFT, oft_block_size: 32}"),
        ("lora_variant", "use_dora: true"),
        ("model", "model_name_or_path: null"),
    ],
)
def test_what_may_be_written_fits(group: str, text: str, validators: dict[str, Any]):
    assert [
        error.message for error in validators[group].iter_errors(OmegaConf.to_container(OmegaConf.create(text)))
    ] == []


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ("dataset", "pth: a.jsonl"),
        ("dataset", "max_train_rows: many"),
        ("dataset", "max_train_rows: 0"),
        ("dataset", "sources: {talk: {name: x}}"),
        ("dataset", "sources: {talk: {pathh: x}}"),
        ("experiment", "trainning: {}"),
        ("experiment", "training: {max_stepz: 3}"),
        ("experiment", "training: {sft_config: {label_smoothing: 0.1}}"),
        ("experiment", "defaults: [{override /modell: x}]"),
        ("method", "method: {lora_alfa: 8}"),
        ("method", "method: {use_rslora: sometimes}"),
        ("lora_variant", "use_doraa: true"),
        ("lora_variant", "oft_block_size: 3"),
        ("training", "eval_strategy: never"),
    ],
)
def test_mistakes_do_not_fit(group: str, text: str, validators: dict[str, Any]):
    assert not validators[group].is_valid(OmegaConf.to_container(OmegaConf.create(text)))


def test_keys_are_explained_in_the_schema():
    described = json_schema.of_group("dataset")["properties"]
    assert "Hub id" in described["path"]["description"]
    assert [name for name, kind in described.items() if "description" not in kind] == []
    assert "Rank" in json_schema.of_any()["definitions"]["method"]["properties"]["r"]["description"]


def test_files_are_told_apart_by_their_first_line():
    assert presets.is_global("experiment", "opt125m_dolly_lora")
    assert not presets.is_global("dataset", "own")
    assert Path(conf_dir() / "dataset" / "own.yaml").is_file()
