"""Files of a stranger's model end in the model or in one line that names the file; docs in SECURITY.md."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch

from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.models.base import load_tokenizer, load_unquantized, skeleton
from qlora_exp.models.files import read_json
from qlora_exp.models.untrusted import bounded, check_folder, explained, most_values
from qlora_exp.utils.errors import ConfigError, ModelError


@pytest.fixture
def folder(tiny_model, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_numbers_of_published_models_are_accepted(tmp_path: Path):
    file = tmp_path / "config.json"
    values = {
        "shared_expert_intermediate_size": 20480,  # Qwen2-MoE
        "num_experts": 16384,  # Doge
        "layer_rope_theta": 5e5,  # Granite
        "layer_types": ["full_attention"] * 1000,
        "deepseek2.expert_feed_forward_length": 30720,  # in GGUF files
    }
    file.write_text(json.dumps(values))
    assert read_json(file) == values


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe", "'utf-8' codec"),
        (b"[]", "must be a JSON object"),
        (b"[" * 100_000, "recursion"),
        (b'{"a":', "Expecting value"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"num_hidden_layers": 10000000}', "num_hidden_layers is 1e.07; no model has more than"),
        (b'{"text_config": [{"num_experts": 1e300}]}', "num_experts is 1e.300"),
        (b'{"layer_replication": [[0, 1000000000]]}', "layer_replication is 1e.09"),
        (b'{"layer_types": [' + b"1," * 50_000 + b"1]}", "layer_types has 50,001 entries"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_damaged_config_is_named_with_file_and_key(content: bytes, why: str, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(content)
    for read in (read_json, lambda file: check_folder(file.parent)):
        with pytest.raises(ModelError, match=f"config.json.*{why}"):
            read(tmp_path / "config.json")


@pytest.mark.parametrize(
    "shard",
    ["evil.bin", "../model.safetensors", "/tmp/model.safetensors", "a/b.safetensors", 3, None, "x.safetensors\n"],
)
def test_index_that_names_other_files_is_rejected(shard, folder: Path):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ModelError, match=r"index.json: weight_map names .* no .safetensors file of this folder"):
        check_folder(folder)
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    check_folder(folder)


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "fast_tokenizer_files"])
def test_tokenizer_file_elsewhere_is_rejected(key: str, folder: Path):
    edit(folder / "tokenizer_config.json", **{key: ["../other/tokenizer.1.0.json"]})
    with pytest.raises(ModelError, match=f"tokenizer_config.json: {key} names"):
        load_tokenizer(ModelConfig(model_name_or_path=str(folder)))


class Touch:
    def __reduce__(self):
        return os.system, ("touch canary",)


def test_pickle_is_never_opened(folder: Path):
    config = ModelConfig(model_name_or_path=str(folder))
    (folder / "model.safetensors").rename(folder / "modelX.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(ModelError, match="are a pickle, which is never opened here: convert them to .safetensors"):
        load_unquantized(config)
    torch.save({}, folder / "pytorch_model.bin")  # also a harmless one
    with pytest.raises(ModelError, match="are a pickle"):
        load_unquantized(config)
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"num_hidden_layers": 1500}, "model with more than .* values"),
        ({"hidden_size": 10**7}, "sizes that no model has|more than"),
        ({"vocab_size": 10**9}, "sizes that no model has|more than"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "evil"}, "KeyError: 'evil'"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"dtype": "evil"}, "no attribute 'evil'"),
        ({"pad_token_id": 10**12}, "AssertionError"),
        ({"model_type": ["x"]}, "unhashable"),
    ],
    ids=str,
)
def test_absurd_config_is_refused_before_it_takes_memory(values: dict, why: str, folder: Path):
    edit(folder / "config.json", **values)
    with pytest.raises(ModelError, match=why):
        skeleton(ModelConfig(model_name_or_path=str(folder)))


def test_own_errors_and_full_memory_are_not_explained_away():
    for error in (ConfigError("mine"), MemoryError(), KeyboardInterrupt(), OSError(28, "no space")):
        with pytest.raises(type(error)), explained("x"):
            raise error
    with pytest.raises(ModelError, match="x: cannot be loaded, a file may be damaged: KeyError: 'y'"), explained("x"):
        raise KeyError("y")


def test_sizes_are_counted_while_modules_are_built(folder: Path):
    assert most_values(folder) > 16 * (folder / "model.safetensors").stat().st_size
    with bounded("x", 200):
        torch.nn.Linear(10, 10)
    with (
        pytest.raises(ModelError, match="x: its config describes a model with more than 200 values"),
        bounded("x", 200),
    ):
        torch.nn.Linear(20, 20)
    with torch.device("meta"), pytest.raises(ModelError, match="bytes of tables"), bounded("x", 200):
        torch.nn.Module().register_buffer("mask", torch.empty(2**17, 2**17))
    torch.nn.Linear(20, 20)


@pytest.mark.parametrize("cut", [0, 3, 8, 30])
def test_damaged_gguf_file_is_rejected(cut: int, tmp_path: Path):
    text = b"general.architecture"
    values = struct.pack("<Q", len(text)) + text + struct.pack("<IQ", 8, 5) + b"llama"
    blocks = struct.pack("<Q", 17) + b"llama.block_count" + struct.pack("<II", 4, 10**7)
    whole = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + values + blocks
    (tmp_path / "model.gguf").write_bytes(whole)
    with pytest.raises(ModelError, match="model.gguf: llama.block_count is 1e.07"):
        check_folder(tmp_path)
    for damaged in (whole[:cut], whole[:16] + struct.pack("<Q", 2**60) + whole[24:]):
        (tmp_path / "model.gguf").write_bytes(damaged)
        with pytest.raises(ModelError, match="model.gguf: cannot be loaded"):
            check_folder(tmp_path)
