import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qlora_exp.config.conf_folder import conf_dir
from qlora_exp.config.overrides import GROUPS, quoted, readable
from qlora_exp.utils.errors import ConfigError


def test_groups_are_those_shipped():
    assert {folder.name for folder in conf_dir().iterdir() if folder.is_dir()} == {*GROUPS, "hydra"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method.r=8", "~method.bias", "+tracking.tags.a=b"], ["method.r=8", "~method.bias", "+tracking.tags.a=b"]),
        (["experiment=1", "model=true", "method=[lora]"], ["experiment='1'", "model='true'", "method='lora'"]),
        (["experiment=a", "method.r=2", "experiment=null"], ["method.r=2"]),
        (["sweep=null", "~experiment", "experiment=[]"], []),
        (["experiment=[a,b]", "method=a,b", "sweep=null,a"], ["experiment=[a,b]", "method=a,b", "sweep=null,a"]),
        (["x=", "x= a ", "training={max_steps: 1}"], ["x=", "x= a ", "training={max_steps: 1}"]),
    ],
)  # fmt: skip
def test_options_are_chosen_by_name_or_not_at_all(words: list[str], expected: list[str]):
    assert readable(words) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.r", "=8"], "'method.r' is not KEY=VALUE, with no blanks around '='"),
        (["=8"], "with no blanks"),
        (["method.r =8"], "with no blanks"),
        (["~method"], "method: a run needs an option of this group (without one, all parameters would be trained"),
        (["~method=qlora"], "choose one: method=OPTION"),
        (["model=null"], "model: a run needs an option"),
        (["training=[]"], "training: a run needs an option"),
        (["hydra/launcher=null"], "hydra/launcher: a run needs an option"),
        (["method=[lora,ia3]"], "for a sweep over them: -m method=lora,ia3"),
        (["dataset@unrelated=own"], "set the keys of unrelated instead"),
        (["ö=1"], "Hydra cannot read this override"),
        (["x={a:", "1}"], "a bracket is not closed; quote the whole override for the shell"),
        (["seed=choice(1,2"], "not a valid choice(...)"),
    ],
)
def test_override_that_would_mean_something_else_is_rejected(words: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        readable(words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("it's", "it's"),
        ("a#b", "a#b"),
        ("Señor", "Señor"),
        ("(x)", "(x)"),
        ("a=b", "a=b"),
        ("a\"b'c", "a\"b'c"),
        ("'open", "'open"),
        ("😀, b", "😀, b"),
        ('{"a": b}', {"a": "b"}),
        ("{owner: Señor}", {"owner": "Señor"}),
        ("[a b, ü, 1, null, true]", ["a b", "ü", 1, None, True]),
    ],
)
def test_hint_of_a_value_that_needs_quotes_can_be_pasted(value: str, meant: object):
    with pytest.raises(ConfigError, match="must be quoted: ") as error:
        readable([f"tracking.run_name={value}"])
    hints = str(error.value).partition("must be quoted: ")[2].split(" or, as values of a sweep, ")
    (word,) = shlex.split(hints[0])
    override = OverridesParser.create().parse_override(word)
    read = override.value()
    assert OmegaConf.to_container(OmegaConf.create({"read": read}))["read"] == meant
    if len(hints) > 1:
        (word,) = shlex.split(hints[1])
        assert OverridesParser.create().parse_override(word).is_choice_sweep()


@settings(max_examples=200)
@given(st.text(alphabet="a'\"$}=, ~ü#%\\", min_size=1))
def test_quoted_text_survives_the_override_grammar(name: str):
    text = f"/tmp/{name}"
    assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text
    if "\\" not in text:  # which the sweeper refuses: OmegaConf reads backslashes again
        parsed = OverridesParser.create().parse_override(f"key={quoted(text)}").value()
        assert OmegaConf.create({"key": parsed, "a": "wrong"}).key == text
