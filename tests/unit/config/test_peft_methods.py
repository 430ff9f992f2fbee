import dataclasses

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from qlora_exp.config import peft_methods
from qlora_exp.config.hydra_compose import compose, options
from qlora_exp.utils.errors import ConfigError

KNOWN = sorted(str(name.value) for name in PEFT_TYPE_TO_CONFIG_MAPPING)


def test_methods_of_the_installed_peft_are_listed():
    assert set(KNOWN) <= set(peft_methods.methods())


@pytest.mark.parametrize("peft_type", KNOWN)
def test_settings_are_the_fields_of_pefts_dataclass(peft_type: str):
    fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]) if field.init}
    assert set(peft_methods.settings(peft_type)) == fields - peft_methods._NOT_SETTINGS


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


@pytest.mark.slow
def test_every_method_of_peft_has_an_option_or_a_reason_against():
    """Or is as new as the installed PEFT: then it works by name."""
    files = {compose([f"method={name}"]).method.peft_type for name in options("method")}
    assert set(peft_methods.methods()) == (files - {None}) | peft_methods._NEEDS_MORE.keys()


def test_unknown_method_is_rejected_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'LORA'"):
        peft_methods.settings("LORAA")
