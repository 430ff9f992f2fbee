"""Which weights an adapter goes into."""

from pathlib import Path

import pytest
import torch
from helpers import tiny_models

from qlora_exp.data import prompts
from qlora_exp.deploy import load, merge
from qlora_exp.deploy.merge import whole
from qlora_exp.deploy.serving import commands as serve
from qlora_exp.utils.errors import ConfigError


def test_quantized_run_is_merged_into_what_it_was_trained_on_by_default(trained_adapters):
    saved = load.find(str(trained_adapters("method=qlora")), device="cpu")
    made = {base: whole(saved, base=base) for base in ("auto", "files", "trained")}
    assert "as its files are, not as nf4_double stored them for training" in made["files"].base
    assert "stand for: what the adapter was trained on" in made["auto"].base
    assert {base: one.dtype for base, one in made.items()} == dict.fromkeys(made, "float32")  # the files'
    name = "model.layers.0.mlp.gate_proj.weight"
    weights = {base: one.model.state_dict()[name] for base, one in made.items()}
    assert torch.equal(weights["auto"], weights["trained"])
    assert not torch.allclose(weights["auto"], weights["files"], atol=1e-3)


def test_adapter_that_makes_up_for_quantization_goes_only_into_what_it_was_trained_on(trained_adapters, tiny_model):
    words = ("method=qlora", "lora_variant=loftq", "model=hub", f"model.model_name_or_path={tiny_model('llama')}")
    saved = load.find(str(trained_adapters(*words)), device="cpu")
    assert (
        "what the adapter was trained on (this adapter makes up for what nf4_double lost (LoftQ))" in whole(saved).base
    )
    with pytest.raises(ConfigError, match="use --base trained"):
        whole(saved, base="files")
    with pytest.raises(ConfigError, match="leave --quantization out"):
        load.load_saved(saved, "none")
    assert serve.adapter_on_vllm(saved, "127.0.0.1", 8000) is None


@pytest.mark.parametrize(
    "words",
    [
        ("method=qlora",),
        ("lora_variant=dora",),
        ("quantization=torchao_int8",),
        pytest.param(("quantization=quanto_int4",), marks=pytest.mark.thorough),  # it compiles for most of a minute
    ],
    ids=" ".join,
)
def test_expected_logits_are_those_of_base_and_adapter(words, trained_adapters):
    made = whole(load.find(str(trained_adapters(*words)), device="cpu"))
    apart, _ = load.load(str(trained_adapters(*words)), device="cpu")
    with torch.no_grad():
        assert torch.allclose(made.expected, apart(made.ids).logits[0], atol=1e-5)
        assert torch.allclose(made.expected, made.model(made.ids).logits[0], atol=1e-4)


@pytest.mark.parametrize("words", [("method=qlora",), ("lora_variant=dora",)], ids=" ".join)
def test_where_memory_is_short_weights_are_kept_in_files_and_are_the_same(
    words, trained_adapters, monkeypatch, tmp_path, caplog
):
    saved = load.find(str(trained_adapters(*words)), device="cpu")
    in_memory, before = whole(saved, scratch=tmp_path).model.state_dict(), Path("/proc/self/maps").read_text()
    assert str(tmp_path) not in before
    monkeypatch.setattr(merge, "free", lambda: 0)
    made = whole(saved, scratch=tmp_path)
    assert "memory is short" in caplog.text
    kept = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(kept) >= 14  # two layers of seven matrices each
    assert all(line.endswith("(deleted)") for line in kept)  # so they end with the process, whatever happens
    assert not list(tmp_path.iterdir())
    for name, weight in made.model.state_dict().items():
        assert torch.equal(weight, in_memory[name])


def test_what_renders_prompts_has_ended_before_weights_change(trained_adapters, monkeypatch):
    running: list[bool] = []
    merged = merge._merged

    def observed(*arguments):
        running.append(prompts._renderer._pipe is not None)
        return merged(*arguments)

    monkeypatch.setattr(merge, "_merged", observed)
    whole(load.find(str(trained_adapters("dataset.format=chat", "model=tiny_llama")), device="cpu"))
    assert running == [False]


def test_full_model_is_used_as_it_is(trained_adapters):
    saved = load.find(str(trained_adapters("method=full", "tracking.log_full_model=true")), device="cpu")
    assert "a whole model" in whole(saved).base
    assert whole(saved, dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(ConfigError, match="is a complete model"):
        whole(saved, base="files")


def test_template_that_demands_a_system_message_is_asked_with_one():
    first = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message must come first') }}{% endif %}"
    )
    assert "Be brief." in merge._asked(tiny_models.tokenizer(template=first + tiny_models.CHATML))
    assert "Be brief." not in merge._asked(tiny_models.tokenizer())


def test_bias_that_the_base_has_no_place_for_is_reported(trained_adapters):
    with pytest.raises(ConfigError, match="cannot be merged: .*has no bias"):
        whole(load.find(str(trained_adapters("method.lora_bias=true")), device="cpu"))
