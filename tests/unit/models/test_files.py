"""What a model's files say is checked before anything slow is imported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.models import files
from qlora_exp.utils.errors import ConfigError, ModelError

COMPLETE = ("tokenizer.json", "model.safetensors")
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture
def make_model(tmp_path):
    """Write a model's config.json and its other files, which are empty; give its folder."""

    def make(config: dict | str | None, *names: str) -> str:
        folder = tmp_path / "model"
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
        if config is not None:
            (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("config", "names", "words", "message"),
    [
        (None, (), (), "it has no config.json"),
        (None, ("adapter_config.json",), (), "holds an adapter, not a model; merge it"),
        ("{", COMPLETE, (), "config.json is damaged"),
        ("[]", COMPLETE, (), "config.json is damaged: it must be a JSON object"),
        ({"model_type": "llamma"}, COMPLETE, (), "no model of type llamma; did you mean '.*llama"),
        ({"model_type": "llama"}, ("model.safetensors",), (), "it has no tokenizer"),
        ({"model_type": "llama"}, ("tokenizer.json",), (), "it has no weights"),
        ({"model_type": "llama"}, ("tokenizer.json", "model.gguf"), (), "in a GGUF file, which no run trains"),
        ({"model_type": "falcon"}, COMPLETE, ("method=qlora",), "nf4_double would leave most of .* FalconLinear"),
        ({"model_type": "falcon"}, COMPLETE, ("quantization=int8",), "int8 would leave most of .* FalconLinear"),
        ({"model_type": "falcon"}, COMPLETE, ("lora_variant=lora_ga",), "lora_variant=lora_ga cannot train .* falcon"),
        ({"model_type": "x", "text_config": {"model_type": "llama"}}, COMPLETE, (), "no model of type x"),
        *(
            ({"model_type": "llama", "quantization_config": stored}, COMPLETE, words, message)
            for stored, words, message in (
                ({"quant_method": "gptq"}, ("method=qlora",), r"quantized already \(gptq\): choose quantization=gptq"),
                ({"quant_method": "awq"}, (), r"quantized already \(awq\): choose quantization=awq"),
                ({"quant_method": "fp8"}, (), r"quantized already \(fp8\): choose another model"),
                (NF4, ("method=qlora",), "choose quantization=nf4"),
            )
        ),
    ],
)
def test_mistakes_are_seen_in_files(config, names, words, message, make_model):
    made = make_model(config, *names)
    with pytest.raises((ModelError, ConfigError), match=message):
        files.check(compose(["method=lora", *words, f"model.model_name_or_path={made}"]))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, ("method=qlora",)),
        ({"model_type": "gpt-sw3"}, ()),
        ({"model_type": "their_own", "auto_map": {"AutoConfig": "theirs.Config"}}, ()),
        ({"model_type": "falcon"}, ()),
        ({"model_type": "llama", "quantization_config": NF4}, ("method=qlora", "quantization=nf4")),
        ({"architectures": ["LlamaForCausalLM"]}, ()),  # transformers may know it by its name
    ],
)
def test_models_without_a_mistake_are_accepted(config, words, make_model):
    files.check(compose(["method=lora", *words, f"model.model_name_or_path={make_model(config, *COMPLETE)}"]))


def test_missing_shard_is_named(make_model):
    folder = Path(make_model({"model_type": "llama"}, "tokenizer.json", "a.safetensors"))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    with pytest.raises(ModelError, match="it lacks b.safetensors, which"):
        files.check(compose(["method=lora", f"model.model_name_or_path={folder}"]))


def test_plan_needs_neither_weights_nor_tokenizer(make_model):
    made = make_model({"model_type": "llama"})
    files.check(compose(["method=lora", f"model.model_name_or_path={made}"]), trains=False)
    there = "model.architecture={_name_or_path: org/name, model_type: falcon}"
    with pytest.raises(ModelError, match="FalconLinear"):
        files.check(compose(["method=qlora", "model.model_name_or_path=org/name", there]), trains=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no folder ./nowhere"),
        ("random:lama", "did you mean 'random:llama'"),
        ("embedded:smollm", "did you mean 'embedded:smollm2-135m'"),
        ("random:falcon", "FalconLinear"),
        ("models/nowhere", "models/nowhere: is not a local folder, and cannot be fetched from the hub"),
        ("two/slashes/here", "no such model on the hub, and no such local folder"),
    ],
)
def test_model_that_is_nowhere_is_rejected(name, message):
    with pytest.raises((ModelError, ConfigError), match=message):
        files.check(compose(["method=qlora", f"model.model_name_or_path={name}"]))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Put a file of a model into a hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def put(name: str, content: dict) -> None:
        folder = tmp_path / "models--org--name"
        (folder / "snapshots" / "a").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("a")
        (folder / "snapshots" / "a" / name).write_text(json.dumps(content))

    return put


def test_config_in_the_cache_of_the_hub_is_checked(hub_cache):
    hub_cache("config.json", {"model_type": "falcon"})
    with pytest.raises(ModelError, match="org/name: .* FalconLinear"):
        files.check(compose(["method=qlora", "model.model_name_or_path=org/name"]))


def test_adapter_of_the_hub_names_its_base(hub_cache):
    hub_cache("adapter_config.json", {"base_model_name_or_path": "org/base"})
    with pytest.raises(ModelError, match="org/name holds an adapter.*its base is org/base: use model"):
        files.check(compose(["method=lora", "model.model_name_or_path=org/name"]))


def test_what_runs_saved_says_what_it_is_and_what_to_use(make_model, tmp_path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)

    def refusal(folder: Path | str, *words: str) -> str:
        with pytest.raises(ModelError) as error:
            files.check(compose(["method=lora", f"model.model_name_or_path={folder}", *words]))
        return str(error.value)

    (run / "qlora_exp.yaml").write_text("{}")
    assert refusal(run).endswith(f"is the output folder of a run, not a model; use {run / 'model'}")
    (run / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert refusal(run).endswith(f"train on from it with model.adapter={run} and its base")
    assert "holds an adapter, not a model; its base is org/base: use model.model" in refusal(run / "model")
    (run / "model" / "qlora_exp.yaml").write_text("{}")
    asked = f"use model.model_name_or_path=org/base model.adapter={run / 'model'} to train on from the adapter"
    assert asked in refusal(run / "model")
    shutil.rmtree(run / "model")
    assert refusal(run).endswith("it saved no model")

    exported = Path(make_model({"model_type": "llama", "quantization_config": NF4}, *COMPLETE))
    facts = {"form": "nf4", "run_id": "abc", "source": "x", "model_name_or_path": "org/base"}
    (exported / "export.json").write_text(json.dumps(facts))
    assert "(exported as nf4 from run abc on org/base): its files are quantized already" in refusal(exported)
    files.check(compose(["method=qlora", "quantization=nf4", f"model.model_name_or_path={exported}"]))
    (exported / "export.json").write_text(json.dumps(facts | {"form": "merged", "run_id": None}))
    assert files.exported(exported) == "merged from x on org/base"


def test_nothing_slow_is_imported(make_model):
    made = make_model({"model_type": "llama"}, *COMPLETE)
    code = (
        "import sys; from qlora_exp.config.hydra_compose import compose; from qlora_exp.models import files; "
        f"files.check(compose(['method=lora', 'model.model_name_or_path={made}'])); "
        "sys.exit(bool({'torch', 'peft', 'trl', 'datasets'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=tiny_llama", "method.target_modules=[q_porj]"], "did you mean 'q_proj'"),
        (["model=tiny_llama", "method.target_modules=[v_proj,c_attn]"], "'c_attn' matches no module.*: q_proj, k_proj"),
        (["model=opt_125m", "+model.architecture={_name_or_path: facebook/opt-125m, model_type: opt}",
          "method.target_modules=[gate_proj]"], "'gate_proj' matches no module.*: q_proj, .*, fc1"),
        (["method.target_modules=[q_proj,upp_proj]"], "did you mean 'up_proj'"),
    ],
)  # fmt: skip
def test_misspelled_modules_are_refused_without_the_model(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        files.check(compose(["method=lora", *words]))


@pytest.mark.parametrize("targets", ["[q_proj,embed_tokens]", "[layers.0.self_attn.q_proj,mlp]", "'.*q_porj'", "mlp"])
def test_what_a_model_may_have_is_left_to_the_model(targets: str):
    files.check(compose(["model=tiny_llama", "method=lora", f"method.target_modules={targets}"]))


@pytest.mark.parametrize("family", files._LINEAR)
def test_linear_layers_of_a_family_are_those_of_its_models(family: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_exp.models.targets import linear_layers

    config = AutoConfig.for_model(family)
    config.update({"num_hidden_layers": 1, "layer_types": (getattr(config, "layer_types", None) or [])[:1] or None})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {name.rpartition(".")[2] for name in linear_layers(model)} == {*files._LINEAR[family]}
