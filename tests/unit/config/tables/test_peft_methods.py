import json

import peft
import pytest
from helpers.scripts import script
from omegaconf import OmegaConf

from qlora_exp.config.conf_folder import conf_dir
from qlora_exp.config.tables import declared_types, peft_help, peft_methods
from qlora_exp.utils.errors import ConfigError


def test_the_file_is_what_the_installed_peft_declares():
    """If this fails, PEFT has changed: run `nox -s library-settings` and read the diff."""
    assert script("library_settings").written_methods() == peft_methods.FILE.read_text("utf-8")
    assert script("library_settings").written_help() == peft_help.FILE.read_text("utf-8")


def test_every_type_in_the_file_becomes_a_validator():
    for peft_type in peft_methods.methods():
        for name in peft_methods.settings(peft_type):
            peft_methods._validator(peft_type, name)


def test_a_refusal_says_if_another_peft_is_installed_than_the_file_was_made_for(monkeypatch):
    assert "installed is" not in peft_methods.check("method", "LORA", {"newer": 1})[0]
    monkeypatch.setattr(declared_types, "version", lambda _: "0.21.99")
    made_for = json.loads(peft_methods.FILE.read_text("utf-8"))["peft"]
    problem = peft_methods.check("method", "LORA", {"newer": 1})[0]
    assert f"settings are those of PEFT {made_for}; installed is 0.21.99" in problem
    with pytest.raises(ConfigError, match=r"installed is 0\.21\.99"):
        peft_methods.settings("LORAA")


@pytest.mark.parametrize(
    ("peft_type", "given", "problem"),
    [
        ("ADALORA", {"init_r": 0}, "must be positive"),
        ("BOTTLENECK", {"non_linearity": "mish"}, "'relu', 'gelu', 'silu' or 'tanh'"),
        ("LORA", {"eva_config": 3}, "valid dictionary"),
        ("LORA", {"layers_to_transform": ["q"]}, "valid integer"),
        ("LORA", {"rank_pattern": []}, "valid dictionary"),
        ("LORA", {"layer_replication": [[0, "2"]]}, "valid integer"),
        ("P_TUNING", {"encoder_reparameterization_type": {}}, "valid string"),
        ("LORA", {"modules_to_save": "lm_head"}, "valid list"),
    ],
)
def test_types_with_parts_are_checked(peft_type: str, given: dict, problem: str):
    assert problem in peft_methods.check("method", peft_type, given)[0]


def test_tuples_are_given_as_lists():
    assert peft_methods.check("method", "LORA", {"layer_replication": [[0, 2], [1, 2]]}) == []


@pytest.mark.parametrize("name", ["r", "lora_alpha", "use_dora", "bias"])
def test_pefts_own_defaults_are_accepted(name: str):
    assert peft_methods.check("method", "LORA", {name: getattr(peft.LoraConfig(), name)}) == []


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"r": "8"}, "valid integer"),
        ({"r": True}, "valid integer"),
        ({"use_dora": 1}, "valid boolean"),
        ({"target_modules": 3}, "target_modules"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "no such setting"),
        ({"task_type": "SEQ_CLS"}, "no such setting"),
    ],
)
def test_invalid_setting_is_named(given: dict, problem: str):
    assert problem in peft_methods.check("method", "LORA", given)[0]


@pytest.mark.parametrize("peft_type", sorted(peft_methods._NEEDS_MORE))
def test_method_that_needs_more_than_rows_is_rejected(peft_type: str):
    assert peft_type in peft_methods.methods()
    assert f"method.peft_type: {peft_type} " in peft_methods.check("method", peft_type, {})[0]


def test_every_method_of_peft_has_an_option_or_a_reason_against():
    """Or is as new as the installed PEFT: then it works by name."""
    files = {OmegaConf.load(file).method.get("peft_type") for file in conf_dir().glob("method/*.yaml")}
    assert set(peft_methods.methods()) == (files - {None}) | peft_methods._NEEDS_MORE.keys()


def test_unknown_method_is_rejected_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'LORA'"):
        peft_methods.settings("LORAA")
