import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_exp.config import hydra_compose as config_module
from qlora_exp.config.hydra_compose import check_command, compose, conf_dir, options
from qlora_exp.config.validate import from_dict
from qlora_exp.config.values import flatten, to_yaml
from qlora_exp.utils.errors import ConfigError

GROUPS = [
    "model",
    "quantization",
    "lora_variant",
    "optimizer",
    "dataset",
    "training",
    "evaluation",
    "tracking",
    "method",
]
GIVEN = {
    "hub": ["model.model_name_or_path=org/name"],
    "own": ["dataset.path=x.jsonl"],
    "server": ["tracking.uri=http://h"],
}


def test_composing_imports_no_torch():
    code = "import sys; from qlora_exp.config.hydra_compose import compose; compose(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("choice", [f"{group}={option}" for group in GROUPS for option in options(group)])
def test_every_option_of_every_group_composes(choice: str):
    option = choice.split("=")[1]
    plain = choice in ("quantization=none", "method=lora") or choice.startswith("lora_variant=")
    stored = {"lora_variant=loftq": "nf4", "lora_variant=qalora": "gptq"}
    quantized = [f"quantization={stored[choice]}"] if choice in stored else []
    assert compose([*(["method=lora"] if plain else []), *quantized, choice, *GIVEN.get(option, [])])


def test_method_chooses_its_quantization_and_optimizer():
    assert compose(["method=qlora"]).quantization.name == "nf4_double"
    assert compose(["method=qlora"]).optimizer.optim == "paged_adamw_32bit"
    assert compose(["method=lora"]).quantization.name == "none"


def test_the_command_line_wins_over_the_method_and_the_experiment():
    assert compose(["method=qlora", "quantization=int8"]).quantization.name == "int8"
    assert compose(["experiment=smollm2_faq_qlora", "quantization=fp4"]).quantization.name == "fp4"
    assert compose(["experiment=smollm2_faq_qlora", "method.r=3"]).method.settings["r"] == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantizaton=nf4"], "did you mean 'quantization'"),
        (["training.learning_rat=1"], "did you mean 'training.learning_rate'"),
        (["+training.max_step=1"], "did you mean 'training.max_steps'"),
        (["+sed=1"], "did you mean 'seed'"),
        (["hydra.launcher.tasks=1"], "+hydra.launcher.tasks=VALUE adds one"),
        (["method.lora_alpa=1"], "did you mean 'lora_alpha'"),
        (["lora_variant.use_dorra=true"], "did you mean 'use_dora'"),
        (["quantization=nf5"], "Shipped options: awq, fp4"),
        (["experiment=smollm2_faq_lorra"], "did you mean 'smollm2_faq_lora'"),
        (["training.learning_rate=abc"], "training.learning_rate: Input should be a valid number"),
        (["training.max_steps=1.5"], "training.max_steps"),
        (["training.learning_rate=nan"], "training.learning_rate"),
        (["method.r=0"], "method.r: must be positive"),
        (["method.r=abc"], "method.r: Input should be a valid integer"),
        (["method.lora_alpha=-1"], "method.lora_alpha: must be positive"),
        (["method.lora_dropout=1.0"], "method.lora_dropout"),
        (["method.bias=some"], "method.bias: Input should be 'none', 'all' or 'lora_only'"),
        (["method.peft_type=LORRA"], "did you mean 'LORA'"),
        (["method=full", "quantization=nf4"], "cannot train a base stored as nf4"),
        (["method=qlora", "quantization=none"], "needs a quantized base"),
        (["method=full", "lora_variant=dora"], "needs a LoRA method"),
        (["method=full", "+method.r=8"], "takes no PEFT settings"),
        (["method.use_dora=true", "lora_variant=dora"], "set in both"),
        (["training.load_best_model_at_end=true"], "load_best_model_at_end"),
        (["training.early_stopping_patience=2"], "early_stopping_patience"),
        (["training.bf16=true", "training.fp16=true"], "exclude each other"),
        (["training.max_steps=0"], "max_steps"),
        (["training.resume_from_checkpoint=nowhere"], "no folder nowhere"),
        (["dataset.system_message=hi"], "format=chat"),
        (["model=hub"], "model_name_or_path"),
        (["device=mps"], "does not run on mps"),
        (["tracking.uri=http://me:secret@host"], "MLFLOW_TRACKING_PASSWORD"),
        (["seed=-1"], "seed"),
    ],
)
def test_a_wrong_config_is_refused_with_what_and_where(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("flags", [["--config-dir", "own"], ["--config-dir=own"], ["-cd", "own"]])
def test_a_command_is_checked_with_the_users_own_options(flags: list[str], tmp_path):
    (tmp_path / "own" / "training").mkdir(parents=True)
    (tmp_path / "own" / "training" / "mine.yaml").write_text("max_steps: 0\n")
    with pytest.raises(ConfigError, match="max_steps must be positive"):
        check_command([*flags, "training=mine"])


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as error:
        compose(["seed=-1", "training.learning_rate=0", "method.r=0"])
    assert len(str(error.value).splitlines()) == 3


@given(
    r=st.integers(1, 512),
    alpha=st.integers(1, 512),
    rate=st.floats(1e-7, 1.0),
    seed=st.integers(0, 2**32 - 1),
    message=st.none() | st.text(min_size=1, alphabet=st.characters(blacklist_categories=("Cs", "Cc"))),
)
@settings(max_examples=30, deadline=None)
def test_a_config_survives_yaml(r: int, alpha: int, rate: float, seed: int, message: str | None):
    values = compose().model_dump(mode="json")
    values["method"] |= {"r": r, "lora_alpha": alpha}
    values["training"]["learning_rate"] = rate
    values["dataset"] |= {"format": "chat", "system_message": message}
    config = from_dict(values | {"seed": seed})
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


def test_flatten_gives_dotted_keys():
    flat = flatten(compose())
    assert flat["method.r"] == 16
    assert flat["evaluation.metrics"] == ["rouge", "exact_match"]
    assert not any(isinstance(value, dict) and value for value in flat.values())


def test_a_users_folder_adds_options(tmp_path):
    (tmp_path / "mine" / "dataset").mkdir(parents=True)
    (tmp_path / "mine" / "dataset" / "poems.yaml").write_text("path: poems.csv\nformat: text\ntext_column: poem\n")
    assert compose(["dataset=poems"], config_dir=tmp_path / "mine").dataset.text_column == "poem"


def test_shipped_folder_is_found():
    assert (conf_dir() / "method" / "qlora.yaml").is_file()


def test_a_missing_folder_is_an_error(monkeypatch):
    monkeypatch.setattr(config_module, "__file__", "/nowhere/qlora_exp/config.py")
    with pytest.raises(ConfigError, match="incomplete"):
        conf_dir()
