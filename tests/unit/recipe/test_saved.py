"""Adapters that runs train on from, and what is refused, before any weights are loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import set_seed

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.tables import compatibility, peft_methods
from qlora_exp.environment.device import Device, resolve
from qlora_exp.models import adapters, base
from qlora_exp.recipe import saved
from qlora_exp.studies import probe
from qlora_exp.tracking import run_key
from qlora_exp.utils.errors import ConfigError, ModelError

WORDS = ["device=cpu", "model=tiny_llama", "method=lora"]
CPU = Device("cpu", "CPU", bf16=False, paging=False)


@pytest.fixture
def adapter(trained_adapters, tmp_path) -> Path:
    """Give a copy of a saved adapter, which a test may change."""
    return shutil.copytree(trained_adapters(), tmp_path / "adapter")


def found(folder: Path | str, *words: str) -> saved.FirstAdapter:
    first = saved.first_adapter(compose([*WORDS, *words, f"model.adapter={folder}"]))
    assert first is not None
    return first


def rewrite(folder: Path, old: str, new: str) -> None:
    file = folder / "qlora_exp.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.r=4"], "r is 16 there and 4 here; to train on from it: method.r=16$"),
        (["method.lora_alpha=1", "method.r=2"], "method.lora_alpha=32 method.r=16$"),
        (["method.target_modules=q_v"], r"target_modules is \[.*'up_proj'.*: method.target_modules=all-linear$"),
        (["method.modules_to_save=[embed_tokens]"], "modules_to_save is None there.*: method.modules_to_save=null$"),
        (["method.trainable_token_indices=[1,2]"], r"\[1, 2\] here.*: method.trainable_token_indices=null$"),
        (["method.layers_to_transform=[1]", "method.target_modules=[q_proj]"], "method.layers_to_transform=null"),
        (["lora_variant=dora"], "use_dora is False there and True here.*: lora_variant=lora$"),
        (["lora_variant=rslora"], "use_rslora is False there.*: lora_variant=lora$"),
        (["lora_variant=pissa"], "init_lora_weights is True there and pissa here.*: lora_variant=lora$"),
        (["method=qlora", "lora_variant=loftq"], "init_lora_weights is True there and loftq here"),
        (["method=ia3"], "an adapter of method=lora, and this run has method=ia3: use method=lora$"),
    ],
)
def test_adapter_with_other_settings_is_refused_with_the_words_that_fit(words, message, trained_adapters):
    with pytest.raises(ConfigError, match=f"(?s)^model.adapter=.*{message}"):
        found(trained_adapters(), *words)


@pytest.mark.thorough
def test_adapters_of_variants_are_asked_for_as_they_are_saved(trained_adapters):
    pissa = trained_adapters("lora_variant=pissa", "lora_variant.use_rslora=true")
    with pytest.raises(ConfigError, match="r is 32 there and 16 here") as error:
        found(pissa, "lora_variant=pissa")
    words = str(error.value).partition("to train on from it: ")[2].split()
    assert words[0] == "lora_variant=lora"
    found(pissa, *words)
    with pytest.raises(ConfigError, match=": lora_variant=dora$"):
        found(trained_adapters("lora_variant=dora"))
    eva = trained_adapters("lora_variant=eva", "lora_variant.init_rows=4")
    ranks = json.loads((eva / "adapter_config.json").read_text())["rank_pattern"]
    assert ranks
    assert found(eva, "lora_variant=eva").ranks["rank_pattern"] == ranks


def test_what_does_not_shape_the_adapter_may_differ(trained_adapters, tiny_tokenizer, mlflow_uri):
    linear = "method.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
    words = ["method.lora_dropout=0.3", "training.learning_rate=0.1", linear, f"tracking.uri={mlflow_uri}"]
    first = found(trained_adapters(), *words)
    assert first.run_id
    assert [*first.differences(compose([*WORDS, *words]), tiny_tokenizer)] == []
    other = compose(["model=tiny_llama", "method=qlora", "dataset.format=prompt_completion"])
    quantization, prompts = first.differences(other, tiny_tokenizer)
    assert "its base was stored as none, this run's is stored as nf4_double" in quantization
    assert prompts == "prompt format: it was trained with alpaca, prompt_completion now"
    chat, kind = (compose([*WORDS, "dataset.format=chat", *more]) for more in ([], ["dataset.system_message=Be kind."]))
    line = next(replace(first, recorded=chat).differences(kind, tiny_tokenizer))
    assert line == "prompt format: it was trained with chat, another system message or template"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=tiny_opt", "method.target_modules=null"], "random:opt .* is not the base .*: use model.model_name_or"),
        (["model.random_config={hidden_size: 32}"], "random:llama .* is not the base that it was trained on"),
    ],
)
def test_adapter_of_another_base_is_refused(words, message, trained_adapters):
    with pytest.raises(ModelError, match=message):
        found(trained_adapters(), *words)


def test_adapter_of_a_changed_folder_or_another_revision_is_refused(adapter, tiny_model):
    folder = tiny_model("llama")
    words = ["model=hub", f"model.model_name_or_path={folder}"]
    (adapter / run_key.BASE_FILE).write_text(json.dumps({"version": "a" * 40}))
    with pytest.raises(ModelError, match=f"use model.model_name_or_path=random:llama model.revision={'a' * 40}$"):
        found(adapter, *words)
    (adapter / run_key.BASE_FILE).write_text(json.dumps({"version": run_key.model_version(folder, None)}))
    (adapter / "qlora_exp.yaml").write_text(
        (adapter / "qlora_exp.yaml").read_text().replace("random:llama", "./moved")  # the same files, elsewhere
    )
    found(adapter, *words)
    (adapter / run_key.BASE_FILE).unlink()  # as older versions saved it: the name decides
    with pytest.raises(ModelError, match=r"\(version None\): use model.model_name_or_path=./moved$"):
        found(adapter, *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks", [{"(a+)+$": 4}, *(pytest.param(ranks, marks=pytest.mark.thorough) for ranks in ({"a": "4"}, [4]))]
)
def test_ranks_that_are_no_numbers_by_layer_are_refused(ranks, trained_adapters, tmp_path):
    eva = shutil.copytree(trained_adapters("lora_variant=eva", "lora_variant.init_rows=4"), tmp_path / "eva")
    file = eva / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank_pattern": ranks}))
    with pytest.raises(ModelError, match="rank_pattern must have a number for each layer"):
        found(eva, "lora_variant=eva")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "model.adapter: .*there is no such folder"),
        (lambda folder: (folder / "qlora_exp.yaml").unlink(), "not a model that a run saved"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "not a complete model"),
        (lambda folder: (folder / "qlora_exp.yaml").write_text("&a [*a]"), "qlora_exp.yaml is damaged"),
        (
            lambda folder: rewrite(folder, "format: alpaca", "format: auto"),
            "dataset.format=auto does not say how it is read",
        ),
        (
            lambda folder: [
                rewrite(folder, "path: none", "path: embedded:python_docs"),
                rewrite(folder, "format: text", "format: auto"),
            ],
            "unrelated.format=auto does not say how it is read",
        ),
        (lambda folder: (folder / "trainer_state.json").write_text("{}"), "is a checkpoint: training.resume_from_chec"),
        (
            lambda folder: (folder / "adapter_config.json").unlink(),
            "is a complete model, not an adapter: use model.model_name_or_path=",
        ),
    ],
)
def test_what_is_no_adapter_is_refused(change, message, adapter):
    change(adapter)
    with pytest.raises(ModelError, match=message):
        found(adapter)


def test_key_of_a_run_depends_on_its_adapter(adapter):
    config = compose([*WORDS, f"model.adapter={adapter}"])
    plain = run_key.digests(compose(WORDS))
    before = run_key.digests(config)
    assert {name for name in before if before[name] != plain.get(name)} == {"config", "adapter"}
    file = adapter / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    after = run_key.digests(config)
    assert {name for name in after if before[name] != after[name]} == {"adapter"}
    shutil.rmtree(adapter)
    assert run_key.digests(config)["adapter"] == "missing"


def kinds():
    """List methods; all are tried by `nox -s thorough`."""
    usual = ("IA3", "OFT", "PREFIX_TUNING", "PROMPT_TUNING", "VERA", "TRAINABLE_TOKENS", "LORA+dora", "LORA+mica")
    for kind, words in probe.kinds().items():
        if kind not in ("FULL", "FREEZE", "LISA", "LORA+qalora"):  # QA-LoRA needs GPTQ files
            yield pytest.param(words, id=kind, marks=() if kind in usual else pytest.mark.thorough)


@pytest.mark.parametrize("stored", ["plain", "4bit"])
@pytest.mark.parametrize("words", kinds())
def test_adapter_that_is_trained_on_is_the_saved_one(words: tuple[str, ...], stored: str, tmp_path: Path):
    """Its logits, and the gradients of each parameter, are those of the model that was saved, and of plain PEFT's."""
    with compatibility.ignored():
        try:
            config = probe.trial_config(words, stored)
        except ConfigError as error:
            pytest.skip(str(error))
        kind = compatibility.kind_of(config.method.kind, config.lora_variant.name)
    if compatibility.refusal(kind, stored, "trains"):
        pytest.skip("it does not train on this base")
    if peft_methods.moves_base_weights(config.lora_start):
        pytest.skip("it is saved as a plain LoRA")
    resolved = resolve(config, CPU)
    settings = adapters.peft_config(config, base.skeleton(config.model))

    def attached(seed: int) -> PeftModel:
        set_seed(seed)
        model = base.load_model(config.model, config.quantization, resolved)
        return adapters.attach(model, settings, resolved.adapter_dtype)

    def outputs(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.train()
        set_seed(5)
        ids = torch.arange(40, 56)[None]
        result = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        result.loss.backward()
        named = model.named_parameters()
        return result.logits.detach(), {name: value.grad for name, value in named if value.requires_grad}

    # MonteCLoRA draws the noise of its first steps when it is attached.
    seeds = (1, 1, 1) if "lora_variant=monteclora" in words else (1, 2, 3)
    first = attached(seeds[0])
    for parameter in first.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    first.save_pretrained(tmp_path)
    again = attached(seeds[1])
    adapters.load_weights(again, tmp_path)
    judges = [first]
    if not settings.is_prompt_learning:  # plain PEFT does not train on from prompts
        set_seed(seeds[2])
        model = base.load_model(config.model, config.quantization, resolved)
        judges.append(PeftModel.from_pretrained(model, tmp_path, is_trainable=True))
    logits, gradients = outputs(again)
    for judge in judges:
        expected, expected_gradients = outputs(judge)
        same = torch.equal(logits, expected) and gradients.keys() == expected_gradients.keys()
        close = same and all(
            value is other is None or torch.equal(value, other)
            for value, other in ((gradients[name], expected_gradients[name]) for name in gradients)
        )
        refused = peft_methods.cannot_train_on(config.method.peft_type or "", config.peft_settings)
        assert close or refused


def test_weights_of_another_adapter_are_refused(tmp_path: Path):
    def attached(*words: str) -> PeftModel:
        config = compose([*WORDS, *words])
        model = base.load_unquantized(config.model)
        return adapters.attach(model, adapters.peft_config(config, model), None)

    attached("method.r=4", "method.target_modules=[q_proj,v_proj]").save_pretrained(tmp_path)
    for words, message in (
        (["method.r=8", "method.target_modules=[q_proj,v_proj]"], "does not fit random:llama|size mismatch"),
        (["method.r=4", "method.target_modules=[q_proj,v_proj,k_proj]"], "lacks 4 tensors"),
        (["method.r=4", "method.target_modules=[q_proj]"], "4 tensors have no place in this run's adapter"),
    ):
        with pytest.raises(ModelError, match=message):
            adapters.load_weights(attached(*words), tmp_path)


@pytest.mark.parametrize("line", ["fp16: true", "bf16: true", "activation_offloading: true"])
def test_models_trained_on_a_gpu_load_on_a_cpu(line: str, adapter: Path):
    name = line.partition(":")[0]
    rewrite(adapter, f"  {name}: {'false' if 'offload' in name else 'auto'}", f"  {line}")
    config = saved.saved_config(str(adapter), adapter, "cpu")
    assert not resolve(config, CPU).fp16
