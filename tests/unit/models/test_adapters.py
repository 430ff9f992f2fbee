import math
import re
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.config.tables.peft_methods import FROM_ROWS
from qlora_exp.environment.device import Device, resolve
from qlora_exp.models import adapters
from qlora_exp.models.base import load_model, load_unquantized, model_config, skeleton
from qlora_exp.models.trained import freeze
from qlora_exp.planning.planner import as_it_runs, build_model
from qlora_exp.studies import probe
from qlora_exp.training.arguments import arguments
from qlora_exp.training.optimizers import KeepTrainableSet, lora_optimizer
from qlora_exp.utils.errors import ConfigError

ATTENTION = {
    "llama": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "opt": ["k_proj", "out_proj", "q_proj", "v_proj"],
    "qwen2": ["k_proj", "o_proj", "q_proj", "v_proj"],
}
MLP = {
    "llama": ["down_proj", "gate_proj", "up_proj"],
    "opt": ["fc1", "fc2"],
    "qwen2": ["down_proj", "gate_proj", "up_proj"],
}


def bare(family: str = "llama"):
    return skeleton(ModelConfig(model_name_or_path=f"random:{family}"))


def real(family: str = "llama"):
    return load_unquantized(ModelConfig(model_name_or_path=f"random:{family}"))


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_all_linear_adapts_attention_and_mlp_and_not_the_head(family: str):
    config = compose([f"model=tiny_{family}", "method=lora"])
    model = adapters.attach(real(family), adapters.peft_config(config, bare(family)), "float32")
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert adapted == {*ATTENTION[family], *MLP[family]}


@pytest.mark.parametrize(
    ("variant", "scaling", "magnitude"),
    [
        ("lora", 32 / 16, False),
        ("rslora", 32 / math.sqrt(16), False),
        ("dora", 32 / 16, True),
        ("dora_rslora", 8.0, True),
    ],
)
def test_lora_variant_sets_scaling_and_magnitude(variant: str, scaling: float, magnitude: bool):
    config = compose(["model=tiny_llama", "method=lora", f"lora_variant={variant}"])
    model = adapters.attach(real(), adapters.peft_config(config, bare()), "float32")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(scaling)
    assert any("magnitude" in name for name, _ in model.named_parameters()) == magnitude


@pytest.mark.parametrize(
    ("words", "factors"),
    [
        (["method=lora", "method.r=8", "method.lora_alpha=4"], [0.5]),
        (["method=lora", "lora_variant=rslora", "method.r=4", "method.lora_alpha=4"], [2.0]),
        (["method=lora", "method.r=8", "method.lora_alpha=8", "method.rank_pattern={q_proj: 2}"], [1.0, 4.0]),
        (["method=ia3"], []),
    ],
)
def test_scalings_are_those_of_the_layers(words: list[str], factors: list[float]):
    config = compose(["model=tiny_llama", *words])
    model = adapters.attach(real(), adapters.peft_config(config, bare()), "float32")
    assert adapters.scalings(model) == factors


def test_only_the_adapter_trains_in_its_dtype():
    config = compose(["model=tiny_llama", "method=lora"])
    model = adapters.attach(real().to(torch.bfloat16), adapters.peft_config(config, bare()), "float32")
    trainable = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert set(trainable.values()) == {torch.float32}


def test_full_fine_tuning_trains_every_parameter():
    model = adapters.attach(real(), adapters.peft_config(compose(["method=full"]), bare()), None)
    assert adapters.count_parameters(model)[0] == sum(p.numel() for p in model.parameters())


def test_keep_dtypes_restores_dtypes_and_values():
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with adapters.keep_dtypes(model):
        model.weight.data = model.weight.data.to(torch.bfloat16)
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, before)


def test_settings_rejected_by_peft_are_reported():
    config = compose(["method=lora", "method.layers_pattern=[layers]", "method.target_modules=[q_proj]"])
    with pytest.raises(ConfigError, match="PEFT refuses"):
        adapters.peft_config(config, bare())


def test_any_method_of_peft_works_by_name():
    config = compose(
        [
            "model=tiny_llama",
            "method=full",
            "method.name=ia3",
            "method.peft_type=IA3",
            "method.quantized_base=null",
        ]
    )
    model = adapters.attach(real(), adapters.peft_config(config, bare()), "float32")
    assert all("ia3_" in name for name, p in model.named_parameters() if p.requires_grad)


METHODS = [words for kind, words in probe.kinds().items() if kind != "LORA+qalora"]  # it needs GPTQ files
# Every third method is tried here, all by `nox -s thorough`.
TRIED = [
    pytest.param(words, marks=pytest.mark.thorough if place % 3 else (), id=probe.name_of(words))
    for place, words in enumerate(METHODS)
]


@pytest.mark.parametrize("words", [*TRIED, pytest.param(("method=lora", "optimizer=lorafa"), id="lorafa")])
def test_same_parameters_are_planned_and_trained_over_every_context(words: tuple[str, ...], tmp_path):
    quantized = "nf4" if "lora_variant=loftq" in words else "none"
    given = [*words, "model=tiny_llama", f"quantization={quantized}", "device=cpu"]
    if "method=trainable_tokens" in words:
        given.append("method.token_indices=[41,42]")
    config = compose(given)
    resolved = resolve(config, Device("cpu", "CPU", bf16=False, paging=False))
    start = config.lora_start
    base = load_model(config.model, config.quantization, resolved)
    settings: Any = adapters.peft_config(config, bare())
    if start in FROM_ROWS:  # rows choose values, and EVA's ranks
        settings.init_lora_weights = True
    model = adapters.attach(base, settings, "float32")
    freeze(model, config.method)
    lora_optimizer(model, config.optimizer, arguments(config, resolved, tmp_path))
    trained = adapters.trainable_set(model)
    frozen = "lora_B" if start == "mica" else "lora_A" if config.optimizer.lora_optimizer else "base_layer"
    assert trained
    assert not [name for name in trained if frozen in name and settings is not None]
    callback = KeepTrainableSet(model)
    with adapters.base_alone(model):
        pass
    assert adapters.trainable_set(model) == trained
    if isinstance(model, PeftModel):
        model.set_adapter("default")  # as when a checkpoint is loaded
    callback.on_train_begin()
    assert adapters.trainable_set(model) == trained
    count = adapters.count_parameters(model)[0]
    assert count == sum(parameter.numel() for name, parameter in model.named_parameters() if name in trained)
    if not config.optimizer.lora_optimizer:
        with as_it_runs(on_cuda=False):
            planned = build_model(config, resolved, model_config(config.model), 2)
        assert adapters.count_parameters(planned)[0] == count


@pytest.mark.parametrize(
    "words",
    [("method.modules_to_save=[lm_head]",), ("method=ia3",), ("method=prompt_tuning",), ("method=full",)],
    ids=str,
)
def test_tensors_that_a_folder_lacks_are_named(words, tmp_path):
    config = compose(["model=tiny_llama", "method=lora", *words])
    base = real()
    model = adapters.attach(base, adapters.peft_config(config, base), None)
    model.save_pretrained(tmp_path)
    assert adapters.missing_tensors(model, tmp_path) == []
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    lost = sorted(weights)[-1]
    save_file({name: one for name, one in weights.items() if name != lost}, file, {"format": "pt"})
    assert adapters.missing_tensors(model, tmp_path) == [lost]


def test_attaching_leaves_the_runs_config_as_it_is():
    """PEFT adds the names of tied layers to modules_to_save."""
    words = [
        "method.modules_to_save=[embed_tokens]",
        "method.ensure_weight_tying=true",
        "method.target_modules=[q_proj]",
    ]
    config = compose(["model=tiny_llama", "method=lora", *words])
    base = skeleton(config.model)
    base.config.tie_word_embeddings = True
    adapters.attach(base, adapters.peft_config(config, base), None)
    assert config.method.settings["modules_to_save"] == ["embed_tokens"]


@pytest.mark.parametrize("variant", ["pissa", "olora", "mica", "kasa", "corda", "lora_ga"])
def test_start_from_singular_vectors_needs_layers_as_wide_as_the_rank(variant: str):
    words = ["device=cpu", "model=tiny_llama", "model.model_name_or_path=random:qwen2_moe", "method=lora"]
    words += [f"lora_variant={variant}", "method.lora_dropout=0", "method.target_modules=[q_proj,shared_expert_gate]"]
    config = compose(words)
    model = skeleton(config.model)
    with pytest.raises(
        ConfigError, match=r"needs layers with no side below method.r=16, .*shared_expert_gate"
    ) as error:
        adapters.peft_config(config, model)
    (advice,) = re.findall(r"method\.exclude_modules=\S+\]", str(error.value))
    assert adapters.peft_config(compose([*words, advice]), model) is not None
    assert adapters.peft_config(compose([*words[:-1], "method.target_modules=attention"]), model) is not None
