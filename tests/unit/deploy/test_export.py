"""What is exported says what base and adapter say, needs no adapter, and appears whole or not at all."""

import json
import resource
import shutil

import gguf
import numpy as np
import pytest
import torch
from bitsandbytes import functional
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_exp.deploy import export, load, merge
from qlora_exp.deploy.formats import GGUF_TYPES
from qlora_exp.tracking import mlflow_store
from qlora_exp.utils.errors import ConfigError, ModelError

pytestmark = pytest.mark.slow


def find(folder):
    return load.find(str(folder), device="cpu")


@pytest.mark.parametrize(
    "words",
    [  # what is added, with magnitudes, to a base that moved, to 4 and to 8 bits; factors, rotations, other weights
        (),
        pytest.param(("lora_variant=dora",), marks=pytest.mark.thorough),
        pytest.param(("lora_variant=pissa",), marks=pytest.mark.thorough),
        ("method.layer_replication=[[0,2],[1,2]]",),
        ("method=qlora",),
        pytest.param(("method=qlora", "quantization=int8"), marks=pytest.mark.thorough),
        ("method=ia3",),
        pytest.param(("method=oft",), marks=pytest.mark.thorough),
        pytest.param(("method=ln_tuning",), marks=pytest.mark.thorough),
    ],
    ids=" ".join,
)
def test_merged_model_equals_base_with_adapter(words, trained_adapters, tmp_path):
    folder = trained_adapters(*words)
    made = export.export(find(folder), tmp_path / "merged")
    assert made.max_logit_difference < 1e-4
    assert made.same_first_choice == 1
    assert made.same_answer_tokens == made.answer_tokens
    ids = torch.arange(40, 60)[None]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not isinstance(whole, PeftModel)
    assert getattr(whole.config, "quantization_config", None) is None
    apart, _ = load.load(str(folder), device="cpu")
    assert whole.config.num_hidden_layers == apart.config.num_hidden_layers
    alone, _ = load.load(str(trained_adapters("training.learning_rate=1e-30")), device="cpu")
    with torch.no_grad():
        rounding = 5e-3 if "quantization=int8" in words else 1e-4  # which rounds what goes into a layer too
        assert torch.allclose(whole(ids).logits, apart(ids).logits, atol=rounding)
        assert not torch.allclose(whole(ids).logits, alone(ids).logits, atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|im_end|>"
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]  # transformers 4 reads the first
    for place in (folder, tmp_path / "merged"):
        assert json.loads((place / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert len({one.stat().st_mode for one in (tmp_path / "merged").iterdir()}) == 1  # whoever may read one reads all


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merge_rounds_each_weight_once(dtype, trained_adapters, tmp_path):
    saved = find(trained_adapters("lora_variant=dora"))
    export.export(saved, tmp_path / "whole", dtype="float32")
    made = export.export(saved, tmp_path / "half", dtype=dtype)
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert (made.weights, {one.dtype for one in half.values()}) == (dtype, {getattr(torch, dtype)})
    for name, weight in whole.items():  # of a base that is rounded itself: twice at most
        eps = torch.finfo(getattr(torch, dtype)).eps
        assert (half[name].float() - weight).abs().max() <= 1.01 * eps * weight.abs().max()
    facts = json.loads((tmp_path / "half" / "export.json").read_text())
    assert facts["weights"] == dtype
    assert facts["max_logit_difference"] == made.max_logit_difference > 0


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_quantized_export_is_stored_and_loaded_in_few_bits(form, trained_adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # as on some CPUs only
    made = export.export(find(trained_adapters()), tmp_path / form, form)
    model, tokenizer = load.load(str(tmp_path / form), device="cpu")
    assert model.config.quantization_config.quant_method == "bitsandbytes"
    assert not any(getattr(layer, "support_avx512bf16_for_cpu", False) for layer in model.modules())
    assert 0 < made.mean_kl < 0.01
    weights = load_file(tmp_path / form / "model.safetensors")
    assert weights["model.layers.0.mlp.gate_proj.weight"].dtype == (torch.uint8 if form == "nf4" else torch.int8)
    assert sorted(one.name for one in (tmp_path / form).glob(".*")) == []
    assert tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("type_", GGUF_TYPES)
def test_gguf_file_contains_the_merged_model(type_, trained_adapters, tmp_path):
    made = export.export(find(trained_adapters()), tmp_path / "gguf", "gguf", type_=type_)
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf")
    kinds = {one.name: one.tensor_type.name.lower() for one in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == type_
    assert kinds["token_embd.weight"] == (type_ if type_ in ("f32", "f16", "bf16") else "q8_0")
    assert kinds["output_norm.weight"] == "f32"
    most = {"f32": 1e-5, "f16": 1e-2, "bf16": 5e-2, "q8_0": 5e-2}.get(type_, 0.5)
    assert made.max_logit_difference < most
    if type_ == "f32":
        assert made.same_answer_tokens == made.answer_tokens


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_exported_model_can_be_exported_again(form, trained_adapters, tmp_path):
    export.export(find(trained_adapters()), tmp_path / "one", form, type_="f32")
    made = export.export(find(tmp_path / "one"), tmp_path / "two", "gguf", type_="f32")
    assert "a whole model" in made.base
    assert made.max_logit_difference < 1e-5
    one, two = (load.load(str(tmp_path / name), device="cpu")[0].state_dict() for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_export_keeps_the_prompt_format_of_the_run(trained_adapters, tmp_path):
    export.export(find(trained_adapters()), tmp_path / "gguf", "gguf", type_="f32")
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf")
    template = reader.fields["tokenizer.chat_template"].contents()
    assert "### Instruction:" in template
    assert template == AutoTokenizer.from_pretrained(tmp_path / "gguf").chat_template
    assert "### Instruction:\n{{ .Prompt }}\n" in (tmp_path / "gguf" / "Modelfile").read_text()


@pytest.mark.parametrize(
    ("words", "form", "says"),
    [
        (("method=prompt_tuning",), "merged", "cannot be merged"),
        (("method=houlsby",), "gguf", "cannot be merged"),
        (("method=full", "tracking.log_full_model=true"), "merged", "a full model already"),
        (("model=tiny_opt",), "gguf", "models of type opt are not supported.*llama.cpp has no such models"),
    ],
    ids=str,
)
def test_impossible_export_is_rejected(words, form, says, trained_adapters, tmp_path):
    with pytest.raises(ConfigError, match=says):
        export.export(find(trained_adapters(*words)), tmp_path / "made", form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("model=tiny_opt",), "of type opt"),
        (
            ("model.model_name_or_path=random:gemma2", "+model.random_config.query_pre_attn_scalar=256"),
            "query_pre_attn_scalar 256, not 16, which llama.cpp does not",
        ),
    ],
    ids=str,
)
def test_model_that_cannot_be_written_is_rejected_before_it_is_loaded(
    words, says, trained_adapters, tmp_path, monkeypatch
):
    saved = find(trained_adapters(*words))
    monkeypatch.setattr(merge, "whole", lambda *_: pytest.fail("was loaded"))
    with pytest.raises(ConfigError, match=says):
        export.export(saved, tmp_path / "made", "gguf")


def test_tokenizer_that_llama_cpp_does_not_have_is_rejected_before_the_model_is_loaded(
    broken_adapter, tmp_path, monkeypatch
):
    file = broken_adapter / "tokenizer.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"normalizer": {"type": "Lowercase"}}))
    monkeypatch.setattr(merge, "whole", lambda *_: pytest.fail("was loaded"))
    assert "changes texts by Lowercase" in refused(broken_adapter, tmp_path, ConfigError, form="gguf")


def test_what_llama_cpp_reads_otherwise_is_in_the_record(broken_adapter, tmp_path):
    file = broken_adapter / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "NFC"}}))
    made = export.export(find(broken_adapter), tmp_path / "made", "gguf", type_="f32")
    assert "does not compose characters (NFC)" in made.differences[0]
    assert json.loads((tmp_path / "made" / "export.json").read_text())["differences"] == made.differences


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt2", ()),
        ("gemma3_text", ()),
        *(pytest.param(name, (), marks=pytest.mark.thorough) for name in ("phi3", "stablelm", "gpt_neox")),
    ],
)
def test_gguf_export_of_another_family_is_read_back(family, words, trained_adapters, tmp_path):
    folder = trained_adapters(f"model.model_name_or_path=random:{family}", *words)
    made = export.export(find(folder), tmp_path / "made", "gguf", type_="f32")
    assert made.max_logit_difference < 1e-5
    assert made.same_answer_tokens == made.answer_tokens


@pytest.fixture
def broken_adapter(trained_adapters, tmp_path):
    """A copy of an adapter's folder, to be broken."""
    return shutil.copytree(trained_adapters(), tmp_path / "broken")


def refused(folder, tmp_path, error=ModelError, **options):
    with pytest.raises(error) as found:
        export.export(find(folder), tmp_path / "made", **options)
    assert [one.name for one in tmp_path.iterdir()] == ["broken"]
    return str(found.value)


def test_adapter_of_another_base_is_rejected(broken_adapter, tmp_path):
    (broken_adapter / "base.json").write_text('{"version": "another"}')
    assert "is not the base model that the adapter was trained on" in refused(broken_adapter, tmp_path)
    (broken_adapter / "base.json").write_text("{")
    assert "base.json is damaged" in refused(broken_adapter, tmp_path)


def test_adapter_of_other_shapes_is_rejected(broken_adapter, tmp_path):
    weights = load_file(broken_adapter / "adapter_model.safetensors")
    save_file({name: one.repeat(2, 2) for name, one in weights.items()}, broken_adapter / "adapter_model.safetensors")
    assert "does not fit" in refused(broken_adapter, tmp_path)


def test_truncated_adapter_file_is_rejected(broken_adapter, tmp_path):
    whole = (broken_adapter / "adapter_model.safetensors").read_bytes()
    (broken_adapter / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refused(broken_adapter, tmp_path)


def test_missing_tokenizer_is_reported(broken_adapter, tmp_path):
    for file in (
        *broken_adapter.glob("tokenizer*"),
        *broken_adapter.glob("*.jinja"),
        *broken_adapter.glob("special_tokens*"),
    ):
        file.unlink()
    assert "the tokenizer is missing or incomplete" in refused(broken_adapter, tmp_path)


@pytest.mark.parametrize("form", ["merged", "gguf", "nf4"])
def test_nan_weights_are_rejected(form, broken_adapter, tmp_path):
    weights = load_file(broken_adapter / "adapter_model.safetensors")
    weights = {name: torch.full_like(one, float("nan")) for name, one in weights.items()}
    save_file(weights, broken_adapter / "adapter_model.safetensors")
    refused(broken_adapter, tmp_path, (ConfigError, ModelError), form=form)


def test_export_without_disk_space_writes_nothing(broken_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    assert "of disk" in refused(broken_adapter, tmp_path, ConfigError)


@pytest.mark.parametrize(
    ("form", "writes"),
    [("merged", "transformers.PreTrainedModel.save_pretrained"), ("gguf", "gguf.GGUFWriter.write_tensor_data")],
)
def test_full_disk_leaves_no_partial_export(form, writes, broken_adapter, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writes, full)
    refused(broken_adapter, tmp_path, OSError, form=form)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_that_loses_half_of_the_adapter_is_rejected(dtype, broken_adapter, tmp_path, monkeypatch):
    weights = load_file(broken_adapter / "adapter_model.safetensors")
    big = {name: 8 * one for name, one in weights.items()}  # so that it says something else in 8 bits of mantissa too
    save_file(big, broken_adapter / "adapter_model.safetensors")
    merged = merge._merged

    def forgetful(adapted, keep):
        for name, one in adapted.named_parameters():
            if "layers.0" in name and "lora_B" in name:
                one.data.zero_()
        return merged(adapted, keep)

    monkeypatch.setattr(merge, "_merged", forgetful)
    assert "gives other outputs" in refused(broken_adapter, tmp_path, dtype=dtype)


def test_merge_that_changes_the_model_is_rejected(broken_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "_merged", lambda adapted, _: adapted.base_model.unload())  # forgets the adapter
    assert "gives other outputs" in refused(broken_adapter, tmp_path)


def test_export_beyond_the_file_size_limit_is_reported(broken_adapter, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert "cannot be written" in refused(broken_adapter, tmp_path, ConfigError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_leftovers_of_a_killed_export_are_removed(trained_adapters, tmp_path):
    (tmp_path / ".qlora_exp.killed.part" / "made").mkdir(parents=True)
    (tmp_path / ".made.txt").mkdir()
    export.export(find(trained_adapters()), tmp_path / "made")
    assert sorted(one.name for one in tmp_path.iterdir()) == [".made.txt", "made"]
    assert (tmp_path / "made").stat().st_mode == (tmp_path / ".made.txt").stat().st_mode


def test_export_appears_only_after_it_is_logged(trained_adapters, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_log_to_run", killed)
    with pytest.raises(KeyboardInterrupt):
        export.export(find(trained_adapters()), tmp_path / "merged")
    assert not list(tmp_path.iterdir())  # so that the same command makes and logs it


def test_existing_export_is_identified_by_weights_and_options(trained_adapters, tmp_path):
    saved = find(trained_adapters())
    assert not export.is_exported(saved, tmp_path / "made")
    export.export(saved, tmp_path / "made", "gguf", type_="q8_0")
    named = export.replace(saved, source="by another name")
    assert export.is_exported(named, tmp_path / "made", "gguf", type_="q8_0")
    for other in ({"form": "merged"}, {"form": "gguf", "type_": "q4_0"}):
        with pytest.raises(ConfigError, match="contains something else"):
            export.is_exported(saved, tmp_path / "made", **other)
    with pytest.raises(ConfigError, match="contains something else"):
        export.is_exported(find(trained_adapters("lora_variant=dora")), tmp_path / "made", "gguf")


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_quantized_export_is_dequantized_for_gguf(form, trained_adapters, tmp_path):
    export.export(find(trained_adapters()), tmp_path / "small", form)
    made = export.export(find(tmp_path / "small"), tmp_path / "again", "gguf", type_="f32")
    assert "what its weights stored by bitsandbytes stand for" in made.base
    assert made.max_logit_difference < (5e-2 if form == "int8" else 1e-4)  # which rounds what goes into a layer too
    with pytest.raises(ModelError, match="its files are quantized already"):
        load.load(str(tmp_path / "small"), device="cpu", quantization="fp4")


def test_existing_folder_is_left_alone(trained_adapters, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export.export(find(trained_adapters()), tmp_path / "mine")


def test_unreachable_store_does_not_fail_the_export(trained_adapters, tmp_path, monkeypatch, caplog):
    saved = find(trained_adapters())

    def away(_):
        raise export.TrackingError("does not answer")

    monkeypatch.setattr(mlflow_store, "client", away)
    export.export(export.replace(saved, run_id="0" * 32), tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert "was not logged" in caplog.text


@pytest.mark.parametrize("type_", ["q4_k_m", "iq2_xs"])
def test_gguf_type_made_by_llama_cpp_only_names_its_command(type_, trained_adapters, tmp_path):
    with pytest.raises(ConfigError, match=f"llama-quantize model.gguf model-{type_}.gguf {type_.upper()}"):
        export.export(find(trained_adapters()), tmp_path / "gguf", "gguf", type_=type_)


def test_quantized_gguf_tensors_are_within_rounding(trained_adapters, tmp_path):
    """The tensors, not the logits: every matrix within its type's rounding."""
    export.export(find(trained_adapters()), tmp_path / "whole", "gguf", type_="f32")
    export.export(find(trained_adapters()), tmp_path / "small", "gguf", type_="q8_0")
    whole, small = (gguf.GGUFReader(tmp_path / name / "model.gguf") for name in ("whole", "small"))
    for one, other in zip(whole.tensors, small.tensors, strict=True):
        values = gguf.dequantize(other.data, other.tensor_type)
        assert one.name == other.name
        assert np.abs(values - gguf.dequantize(one.data, one.tensor_type)).max() <= np.abs(values).max() / 127


TIED = ("+model.random_config.tie_word_embeddings=true", "dataset.format=prompt_completion")


@pytest.mark.parametrize(
    ("words", "tied"),
    [
        ("method.modules_to_save=[embed_tokens,lm_head]", False),
        pytest.param("method.modules_to_save=[lm_head]", False, marks=pytest.mark.thorough),
        pytest.param("method.target_modules=[q_proj,embed_tokens]", False, marks=pytest.mark.thorough),
        ("method.modules_to_save=[embed_tokens] method.ensure_weight_tying=true", True),
    ],
)
def test_tied_ends_that_were_trained_apart_are_stored_apart(words, tied, trained_adapters, tmp_path):
    saved = find(trained_adapters(*TIED, *words.split()))
    export.export(saved, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert (config["tie_word_embeddings"], "lm_head.weight" not in weights) == (tied, tied)
    made = export.export(saved, tmp_path / "gguf", "gguf", type_="f32")
    assert made.max_logit_difference < 1e-5
    made = export.export(saved, tmp_path / "small", "gguf", type_="q8_0")
    assert made.same_first_choice > 0.9


def test_folder_that_ties_two_matrices_is_exported_with_both(trained_adapters, tmp_path):
    export.export(find(trained_adapters(*TIED, "method.modules_to_save=[lm_head]")), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    made = export.export(find(tmp_path / "merged"), tmp_path / "gguf", "gguf", type_="f32")
    assert made.max_logit_difference < 1e-5


@pytest.mark.parametrize(
    ("form", "type_"),
    [
        ("gguf", "q4_0"),
        ("int8", ""),
        pytest.param("gguf", "q8_0", marks=pytest.mark.thorough),
        pytest.param("nf4", "", marks=pytest.mark.thorough),
    ],
)
def test_quantized_export_that_loses_more_than_rounding_is_rejected(
    form, type_, trained_adapters, tmp_path, monkeypatch
):
    saved, read = find(trained_adapters()), export.load_complete_model
    for dtype in ("float32", "bfloat16"):
        export.export(saved, tmp_path / dtype, form, dtype, type_=type_)

    def damaged(*arguments, **options):
        model = read(*arguments, **options)
        model.model.layers[1].input_layernorm.weight.data *= 1.5
        return model

    monkeypatch.setattr(export, "load_complete_model", damaged)
    with pytest.raises(ModelError, match=f"storing weights as {type_ or form} explains only"):
        export.export(saved, tmp_path / "made", form, type_=type_)


def test_adapter_that_lacks_a_tensor_is_rejected_by_its_name(broken_adapter, tmp_path):
    weights = load_file(broken_adapter / "adapter_model.safetensors")
    lost = sorted(weights)[0]
    save_file(
        {name: one for name, one in weights.items() if name != lost}, broken_adapter / "adapter_model.safetensors"
    )
    assert f"lacks 1 tensors that its config describes: {lost}" in refused(broken_adapter, tmp_path)


@pytest.mark.parametrize(
    ("words", "form", "type_", "base"),
    [
        (("method=qlora",), "merged", "q8_0", "trained"),
        (("method=qlora",), "gguf", "q8_0", "trained"),
        (("method=qlora",), "gguf", "q4_0", "files"),
        (("method=qlora",), "w8a8", "q8_0", "files"),
        (("method=qlora",), "fp8", "q8_0", "files"),
        (("method=qlora",), "gptq", "q8_0", "files"),
        (("method=qlora",), "nf4", "q8_0", "files"),
        (("method=qlora",), "int8", "q8_0", "files"),
        (("method=lora",), "nf4", "q8_0", "auto"),
    ],
)
def test_base_that_was_rounded_before_is_not_rounded_again(words, form, type_, base, trained_adapters):
    assert export._base_for(saved := find(trained_adapters(*words)), form, type_, "auto") == base
    assert export._asked(saved, form, "auto", "auto", type_)["base"] == base  # an older export is not taken for it
    assert export._base_for(saved, form, type_, "trained") == "trained"


def test_small_changes_of_weights_survive_one_rounding_to_4_bits_and_not_two():
    """Why `_base_for` takes the files' weights for formats of few bits."""
    torch.manual_seed(0)
    weights = torch.randn(512, 512)
    change = 0.02 * torch.randn_like(weights)

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return functional.dequantize_4bit(*functional.quantize_4bit(values, blocksize=64, quant_type="nf4"))

    def surviving(result: torch.Tensor) -> float:
        return ((result - rounded(weights)) * change).sum().item() / change.square().sum().item()

    assert surviving(rounded(weights + change)) == pytest.approx(1, abs=0.05)
    assert surviving(rounded(rounded(weights) + change)) < 0.05
