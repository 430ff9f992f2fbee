"""A merged model says what base and adapter say, needs no adapter, and appears whole or not at all."""

import json
import shutil

import pytest
import torch
from conftest import QUICK, exit_code
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_exp import loading, merging
from qlora_exp.errors import ConfigError, ModelError
from qlora_exp.merging import merge

SAVED = ("method=lora", "training.learning_rate=1e-2", "tracking.log_adapter=false", "evaluation=loss_only")


@pytest.fixture(scope="module")
def adapters(store, tmp_path_factory):
    """Folders that runs saved, by their overrides; each is trained once."""

    from qlora_exp.config import compose
    from qlora_exp.run import run

    made = {}

    def saved(*words: str):
        if words not in made:
            folder = tmp_path_factory.mktemp("run")
            run(compose([*QUICK, f"tracking.uri={store}", *SAVED, *words]), folder)
            made[words] = folder / "model"
        return made[words]

    return saved


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("lora_variant=dora",),
        ("method.use_rslora=true", "method.r=4"),
        ("lora_variant=pissa",),
        ("method=qlora",),
        ("method=qlora", "quantization=int8"),
        ("method=ia3",),
        ("method=loha",),
        ("method=oft",),
        ("method=vera",),
        ("method=ln_tuning",),
    ],
    ids=" ".join,
)
def test_merged_it_says_the_same_without_the_adapter(words, adapters, tmp_path):
    folder = adapters(*words)
    base = "trained" if "method=qlora" in words else "auto"
    made = merge(loading.find(str(folder), device="cpu"), tmp_path / "merged", base=base)
    assert made.max_logit_difference < 1e-4
    assert made.same_first_choice == 1
    ids = torch.arange(40, 60)[None]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not isinstance(whole, PeftModel)
    assert getattr(whole.config, "quantization_config", None) is None
    apart, _ = loading.load(str(folder), device="cpu")
    alone, _ = loading.load(str(adapters("training.learning_rate=1e-30")), device="cpu")
    with torch.no_grad():
        rounding = 5e-3 if "quantization=int8" in words else 1e-4  # which rounds what goes into a layer too
        assert torch.allclose(whole(ids).logits, apart(ids).logits, atol=rounding)
        assert not torch.allclose(whole(ids).logits, alone(ids).logits, atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|im_end|>"


def test_a_quantized_run_is_merged_into_what_was_quantized_unless_told(adapters, tmp_path):
    saved = loading.find(str(adapters("method=qlora")), device="cpu")
    made = {base: merge(saved, tmp_path / base, base=base) for base in ("auto", "files", "trained")}
    assert "what nf4_double lost" in made["auto"].base
    assert "what the adapter was trained on" in made["trained"].base
    weights = {base: load_file(tmp_path / base / "model.safetensors") for base in made}
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(weights["auto"][name], weights["files"][name])
    assert not torch.allclose(weights["auto"][name], weights["trained"][name], atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_each_weight_is_rounded_once(dtype, adapters, tmp_path):
    saved = loading.find(str(adapters("lora_variant=dora")), device="cpu")
    merge(saved, tmp_path / "whole", dtype="float32")
    made = merge(saved, tmp_path / "half", dtype=dtype)
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert (made.dtype, {one.dtype for one in half.values()}) == (dtype, {getattr(torch, dtype)})
    for name, weight in whole.items():  # of a base that is rounded itself: twice at most
        eps = torch.finfo(getattr(torch, dtype)).eps
        assert (half[name].float() - weight).abs().max() <= 1.01 * eps * weight.abs().max()
    facts = json.loads((tmp_path / "half" / "merged.json").read_text())
    assert facts["dtype"] == dtype
    assert facts["max_logit_difference"] == made.max_logit_difference > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("method=prompt_tuning",), "cannot be merged"),
        (("method=houlsby",), "cannot be merged"),
        (("method=full", "tracking.log_full_model=true"), "a full model already"),
    ],
    ids=str,
)
def test_what_has_nothing_to_merge_says_so(words, says, adapters, tmp_path):
    with pytest.raises(ConfigError, match=says):
        merge(loading.find(str(adapters(*words)), device="cpu"), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def broken(adapters, tmp_path):
    """A copy of an adapter's folder, to be broken."""
    return shutil.copytree(adapters(), tmp_path / "broken")


def refused(folder, tmp_path, error=ModelError):
    with pytest.raises(error) as found:
        merge(loading.find(str(folder), device="cpu"), tmp_path / "merged")
    assert [one.name for one in tmp_path.iterdir()] == ["broken"]
    return str(found.value)


def test_an_adapter_of_another_base_is_refused(broken, tmp_path):
    (broken / "base.json").write_text('{"version": "another"}')
    assert "is not the base that the adapter was trained on" in refused(broken, tmp_path)
    (broken / "base.json").write_text("{")
    assert "base.json is damaged" in refused(broken, tmp_path)


def test_an_adapter_of_other_shapes_is_refused(broken, tmp_path):
    weights = load_file(broken / "adapter_model.safetensors")
    save_file({name: one.repeat(2, 2) for name, one in weights.items()}, broken / "adapter_model.safetensors")
    assert "does not fit its base" in refused(broken, tmp_path)


def test_a_truncated_file_is_refused(broken, tmp_path):
    whole = (broken / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refused(broken, tmp_path)


def test_a_missing_tokenizer_is_told(broken, tmp_path):
    for file in (*broken.glob("tokenizer*"), *broken.glob("*.jinja"), *broken.glob("special_tokens*")):
        file.unlink()
    assert "no whole tokenizer" in refused(broken, tmp_path)


def test_weights_that_are_no_numbers_are_refused(broken, tmp_path):
    weights = load_file(broken / "adapter_model.safetensors")
    weights = {name: torch.full_like(one, float("nan")) for name, one in weights.items()}
    save_file(weights, broken / "adapter_model.safetensors")
    refused(broken, tmp_path, (ConfigError, ModelError))


def test_without_room_nothing_is_written(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    assert "of disk" in refused(broken, tmp_path, ConfigError)


def test_a_full_disk_leaves_nothing_half_written(broken, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    refused(broken, tmp_path, OSError)


def test_a_merge_that_changes_the_model_is_refused(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "_merged", lambda adapted: adapted.base_model.unload())  # forgets the adapter
    assert "says something else" in refused(broken, tmp_path)


def test_a_folder_that_is_there_is_left_alone(adapters, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        merge(loading.find(str(adapters()), device="cpu"), tmp_path / "mine")


def test_the_command_merges_a_run(run, store, tmp_path, capsys):
    result = run("method=lora", "evaluation=loss_only")
    words = ["--uri", store, "--out", str(tmp_path / "merged"), "--dtype", "bfloat16"]
    assert exit_code("merge", result.run_id, *words) == 0
    shown = capsys.readouterr().out
    assert "bfloat16" in shown
    assert "the same first choice" in shown
    assert (tmp_path / "merged" / "model.safetensors").is_file()
