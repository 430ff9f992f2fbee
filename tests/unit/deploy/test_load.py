import json
import shutil
from pathlib import Path

import pytest
import yaml

from qlora_exp.config.hydra_compose import compose
from qlora_exp.deploy.load import find, load, remove_places
from qlora_exp.tracking import run_key
from qlora_exp.utils.errors import ModelError


@pytest.mark.usefixtures("mlflow_client")
@pytest.mark.parametrize(("source", "message"), [("0" * 32, "not found"), ("models:/nothing/1", "nothing")])
def test_missing_model_is_reported(source: str, message: str, mlflow_uri):
    with pytest.raises(ModelError, match=message):
        load(source, mlflow_uri)


def test_folder_with_a_pickle_is_rejected(tmp_path):
    (tmp_path / "qlora_exp.yaml").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="are a pickle, which is never opened here"):
        load(str(tmp_path))


def test_recorded_config_cannot_enable_remote_code(run_quick, monkeypatch):
    result = run_quick("method=lora")
    saved = result.output_dir / "model"
    text = (saved / "qlora_exp.yaml").read_text()
    changed = text.replace("trust_remote_code: false", "trust_remote_code: true")
    changed = changed.replace("attn_implementation: null", "attn_implementation: someone/kernel")
    assert changed.count("someone/kernel") == changed.count("trust_remote_code: true") == 1
    (saved / "qlora_exp.yaml").write_text(changed)
    seen = []
    monkeypatch.setattr("qlora_exp.deploy.load.load_model", lambda config, *_: seen.append(config))
    with pytest.raises(ModelError):
        load(str(saved), device="cpu")
    assert (seen[0].trust_remote_code, seen[0].attn_implementation) == (False, None)


def test_damaged_recorded_config_is_reported(run_quick):
    result = run_quick("method=lora")
    for text in ("!!python/object/apply:os.system ['touch pwned']", "a: &x [1]\nb: [*x, *x]", "just text", "model: 3"):
        (result.output_dir / "model" / "qlora_exp.yaml").write_text(text)
        with pytest.raises(ModelError, match="damaged"):
            load(str(result.output_dir / "model"), device="cpu")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"model_type": "llama", "attn_implementation": "somebody/kernel"}', "asks for a kernel of the hub"),
        ('{"text_config": [{"_attn_implementation": "somebody/kernel"}]}', "asks for a kernel of the hub"),
        ('{"model_type": ', "is damaged"),
        ('{"quantization_config": "nf4"}', "is damaged"),
        ("[]", "is damaged"),
    ],
)
def test_full_models_config_is_untrusted(text, says, trained_adapters, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained_adapters("method=full", "tracking.log_full_model=true"), folder)
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=says):
        load(str(folder), device="cpu")


def test_damaged_delivery_state_is_reported(trained_adapters, tmp_path):
    shutil.copytree(trained_adapters().parent, tmp_path / "run")
    (tmp_path / "run" / "delivered.json").write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        find(str(tmp_path / "run"))


@pytest.mark.slow
def test_adapter_of_a_local_base_names_no_folder_and_finds_its_base(
    run_quick, tiny_model, mlflow_uri, tmp_path, monkeypatch
):
    base = tiny_model("llama")
    result = run_quick("method=lora", "model=hub", f"model.model_name_or_path={base}", "evaluation=loss_only")
    saved = result.output_dir / "model"
    for file in saved.rglob("*"):
        assert not [hidden for hidden in (base, str(tmp_path), "mlruns") if hidden.encode() in file.read_bytes()], file
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == f"./{Path(base).name}"
    logged = str(find(result.run_id, mlflow_uri).folder)  # names its run, as a folder that MLflow downloaded does
    for source in (str(result.output_dir), str(saved), result.run_id, logged):
        assert find(source, mlflow_uri).config.model.model_name_or_path == base
    shutil.copytree(saved, tmp_path / "taken")
    with pytest.raises(ModelError, match=f"the base model of the adapter is not at {tmp_path}/{Path(base).name}: put"):
        find("taken", mlflow_uri)
    run_key.model_version.cache_clear()
    Path(base).rename(tmp_path / Path(base).name)
    assert load("taken", mlflow_uri, device="cpu")
    Path(tmp_path / Path(base).name).rename(base)
    old = yaml.safe_load((result.output_dir / "qlora_exp.yaml").read_text())
    (tmp_path / "taken" / "qlora_exp.yaml").write_text(yaml.safe_dump(old))  # as older versions saved it
    assert find("taken", mlflow_uri).config.model.model_name_or_path == base
    remove_places(tmp_path / "taken")
    assert "tracking" not in (tmp_path / "taken" / "qlora_exp.yaml").read_text()


def test_places_are_removed_from_every_file_and_from_nothing_else(tmp_path):
    local = {"bases/mine", "../rows.jsonl", "words"}
    config = compose(["method=prompt_tuning"]).model_dump(mode="json")
    config["model"]["model_name_or_path"], config["dataset"]["path"] = "bases/mine", "../rows.jsonl"
    config["dataset"]["prompt_column"], config["training"]["resume_from_checkpoint"] = "words", "runs/a"
    config["method"]["tokenizer_name_or_path"] = "words"
    (tmp_path / "qlora_exp.yaml").write_text(yaml.safe_dump(config))
    adapter = {"base_model_name_or_path": "/home/me/mine", "tokenizer_name_or_path": "/home/me/words", "bias": "words"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "tokenizer_config.json").write_text('{"name_or_path": "bases/mine", "eos_token": "/words"}')
    (tmp_path / "tokenizer.json").write_text('{"words": "/words", "_path": "words"}')
    remove_places(tmp_path, local)
    shared = yaml.safe_load((tmp_path / "qlora_exp.yaml").read_text())
    assert (shared["model"]["model_name_or_path"], shared["dataset"]["path"]) == ("./mine", "./rows.jsonl")
    assert (shared["dataset"]["prompt_column"], shared["training"]["resume_from_checkpoint"]) == ("words", None)
    assert shared["method"]["tokenizer_name_or_path"] == "./words"
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": "./mine", "tokenizer_name_or_path": "./words", "bias": "words",
    }  # fmt: skip
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "name_or_path": "./mine", "eos_token": "/words",
    }  # fmt: skip
    assert "./" not in (tmp_path / "tokenizer.json").read_text()


def test_model_that_no_run_saved_is_told_from_an_incomplete_one(trained_adapters, tmp_path):
    folder = shutil.copytree(trained_adapters(), tmp_path / "adapter")
    modes = {file.stat().st_mode for file in trained_adapters().iterdir()}
    assert len(modes) == 1  # whoever may read one file reads all
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"not a complete model: it has no adapter_model\.safetensors"):
        find(str(folder))
    (folder / "qlora_exp.yaml").unlink()
    with pytest.raises(ModelError, match=r"it has no qlora_exp\.yaml; adapters that were made with other programs"):
        find(str(folder))


def test_version_of_a_registered_model_is_a_number(mlflow_uri):
    with pytest.raises(ModelError, match="versions are numbers .*aliases models:/NAME@ALIAS"):
        find("models:/concrete/latest", mlflow_uri)
