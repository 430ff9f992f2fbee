from pathlib import Path

import pytest
import yaml

from qlora_exp.config.describe import presets
from qlora_exp.config.hydra_compose import compose, conf_dir


@pytest.mark.parametrize(
    ("group", "option"),
    [
        ("method", "qlora"),
        ("method", "loha"),
        ("lora_variant", "dora"),
        ("training", "long_rows"),
        ("optimizer", "sgd"),
    ],
)
def test_an_option_sets_what_a_run_with_it_has(group: str, option: str):
    config = compose([f"{group}={option}"]).model_dump()
    for key, value in presets.values_of(group, option).items():
        section, _, name = key.partition(".")
        assert config[section][name] == (float(value) if name == "learning_rate" else value)


def test_the_options_that_set_a_key_are_listed_by_value():
    groups = presets.setting("method.r")
    assert groups["method"]["16"][:1] == ["deft"]
    assert {"lora", "qlora"} <= {*groups["method"]["16"]}
    assert groups["sweep"]["4,8,16"] == ["rank_alpha_quant"]
    (variants,) = presets.setting("lora_variant.use_dora").values()
    assert {"dora", "dora_rslora"} <= {*variants["true"]}


def test_the_options_that_an_option_chooses_are_listed():
    assert presets.chosen_by("method", "qlora") == {"quantization": "nf4_double", "optimizer": "paged_adamw_32bit"}
    assert presets.chosen_by("method", "lora") == {}
    for group, names in presets.options().items():
        for name in names:
            chosen = presets.chosen_by(group, name).items()
            assert [(other, option) for other, option in chosen if option not in presets.options()[other]] == []


def test_only_the_files_that_may_set_a_key_are_read_and_none_is_missed():
    for key in ("training.max_steps", "method.target_modules", "dataset.path"):
        listed = {
            (group, name) for group, values in presets.setting(key).items() for each in values.values() for name in each
        }
        every = {(group, name) for group, names in presets.options().items() if "/" not in group for name in names}
        assert listed == {chosen for chosen in every if key in presets.values_of(*chosen)}


def test_types_of_methods_are_those_of_their_files():
    types = presets.peft_types()
    assert types["houlsby"] == "BOTTLENECK"
    assert "full" not in types
    own = yaml.safe_load(Path(conf_dir() / "method" / "vera.yaml").read_text("utf-8"))
    assert types["vera"] == own["method"]["peft_type"]
