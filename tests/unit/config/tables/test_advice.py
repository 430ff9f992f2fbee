from pathlib import Path

import pytest

from qlora_exp.config.tables import advice
from qlora_exp.config.validate import known_keys

ROOT = Path(__file__).parents[4]


def test_advice_is_on_keys_that_exist():
    assert {*advice.ADVICE} <= {*known_keys()}


@pytest.mark.parametrize("key", advice.ADVICE)
def test_advice_names_its_source(key: str):
    for each in advice.on(key):
        assert each.basis == "rule of thumb" or each.source
        if each.basis == "measured here":
            assert (ROOT / each.source).is_file()


def test_settings_of_peft_have_the_same_advice_in_both_sections():
    assert advice.on("lora_variant.r") == advice.on("method.r") != ()
    assert advice.on("training.seed") == ()
