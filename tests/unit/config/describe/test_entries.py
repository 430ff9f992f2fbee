import re

import pytest

from qlora_exp.config.describe import entries, notes, presets
from qlora_exp.config.describe.units import UNITS
from qlora_exp.config.tables import peft_methods, sft_arguments

DECLARED = [
    *(entry for section in entries.sections() for entry in entries.of_section(section)),
    *entries.sft_config(),
]


def test_every_key_has_a_meaning():
    assert [entry.key for entry in DECLARED if len(entry.meaning) < 10 and entry.key != "unrelated.format"] == []
    assert {*sft_arguments.MEANINGS} == {*sft_arguments.ACCEPTED}


def test_every_setting_of_every_method_has_a_meaning():
    settings = [(name, kind) for kind in peft_methods.trainable() for name in peft_methods.of_options(kind)]
    assert len(settings) > 400
    assert [(name, kind) for name, kind in settings if not entries.setting(name, kind).meaning] == []


def test_units_and_notes_are_about_keys_that_exist():
    assert {*UNITS} <= {entry.key for entry in DECLARED}
    assert {*notes.NOTES} <= {*peft_methods.of_options("LORA")}


def test_every_advice_says_what_it_rests_on():
    given = [*notes.LEARNING_RATE, *(advice for note in notes.NOTES.values() for advice in note.advice)]
    assert [advice.text for advice in given if (advice.basis == "rule of thumb") == bool(advice.source)] == []


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("training.max_length", "above 0"),
        ("seed", "at least 0 and below 4294967296"),
        ("dataset.eval_size", "float above 0 and below 1; int above 0"),
        ("optimizer.adam_beta1", "at least 0 and below 1"),
        ("sweep.fuse", "at least 2"),
        ("search.metrics", "not empty"),
        ("model.dtype", ""),
    ],
)
def test_ranges_are_those_of_the_schema(key: str, expected: str):
    assert next(entry.range for entry in DECLARED if entry.key == key) == expected


def test_a_setting_that_peft_ignores_is_not_described():
    assert "loha" not in entries.methods_with("use_rslora")
    with pytest.raises(KeyError):
        entries.setting("r", "ADALORA")


def test_every_option_says_what_it_is():
    options = [(group, name) for group, names in presets.options().items() for name in names if group != "model"]
    assert [chosen for chosen in options if not re.match(r"\S.{9}", presets.comment(*chosen))] == []
