import subprocess
import sys

import pytest

from qlora_exp.config import hydra_compose
from qlora_exp.config.hydra_compose import check_command, compose, conf_dir, grid, options
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


@pytest.mark.slow
@pytest.mark.parametrize("choice", [f"{group}={option}" for group in GROUPS for option in options(group)])
def test_every_option_composes(choice: str):
    option = choice.split("=")[1]
    plain = choice in ("quantization=none", "method=lora") or choice.startswith("lora_variant=")
    stored = {"lora_variant=loftq": "nf4", "lora_variant=qalora": "gptq"}
    quantized = [f"quantization={stored[choice]}"] if choice in stored else []
    assert compose([*(["method=lora"] if plain else []), *quantized, choice, *GIVEN.get(option, [])])


def test_method_sets_default_quantization_and_optimizer():
    assert compose(["method=qlora"]).quantization.name == "nf4_double"
    assert compose(["method=qlora"]).optimizer.optim == "paged_adamw_32bit"
    assert compose(["method=lora"]).quantization.name == "none"


def test_command_line_overrides_method_and_experiment():
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
        (["quantization=nf5"], "Shipped options: awq, fp4"),
        (["experiment=smollm2_faq_lorra"], "did you mean 'smollm2_faq_lora'"),
    ],
)
def test_unknown_key_or_option_is_rejected_with_a_suggestion(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert message in str(error.value)


def test_keys_inside_free_mappings_need_no_plus():
    words = ["model.random_config.hidden_size=32", "model.architecture={model_type: llama}", "tracking.tags.team=a"]
    config = compose(["model=tiny_llama", *words, "+tracking.tags.more=b"])
    assert config.model.random_config == {"hidden_size": 32}
    assert config.model.architecture == {"model_type": "llama"}
    assert config.tracking.tags == {"team": "a", "more": "b"}


@pytest.mark.parametrize("flags", [["--config-dir", "own"], ["--config-dir=own"], ["-cd", "own"]])
def test_command_is_checked_with_the_users_options(flags: list[str], tmp_path):
    (tmp_path / "own" / "training").mkdir(parents=True)
    (tmp_path / "own" / "training" / "mine.yaml").write_text("max_steps: 0\n")
    with pytest.raises(ConfigError, match="max_steps must be positive"):
        check_command([*flags, "training=mine"])


def test_users_config_folder_adds_options(tmp_path):
    (tmp_path / "mine" / "dataset").mkdir(parents=True)
    (tmp_path / "mine" / "dataset" / "poems.yaml").write_text("path: poems.csv\nformat: text\ntext_column: poem\n")
    assert compose(["dataset=poems"], config_dir=tmp_path / "mine").dataset.text_column == "poem"


def test_shipped_config_folder_is_found():
    assert (conf_dir() / "method" / "qlora.yaml").is_file()


def test_missing_config_folder_is_an_error(monkeypatch):
    monkeypatch.setattr(hydra_compose, "__file__", "/nowhere/qlora_exp/config/hydra_compose.py")
    with pytest.raises(ConfigError, match="incomplete"):
        conf_dir()


def test_grid_expands_lists_and_named_sweeps():
    assert grid(["method.r=4,8", "seed=1"]) == [["method.r=4", "seed=1"], ["method.r=8", "seed=1"]]
    named = grid(["sweep=rank_scaling", "method.r=2,4"])
    assert len(named) == 4
    assert all("sweep=rank_scaling" in words for words in named)  # what the sweep sets besides is theirs too
    with pytest.raises(ConfigError, match="no option 'rank_scalling'"):
        grid(["sweep=rank_scalling"])
