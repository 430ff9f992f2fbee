"""Sources of a mixture: what each takes from its section, and mistakes in them, each refused in one line."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.mixture import MixtureConfig, source_keys, twice
from qlora_exp.config.validate import from_dict
from qlora_exp.config.values import flatten, result_values, to_yaml, without_places
from qlora_exp.utils.errors import ConfigError

A, B = ("dataset.sources.a.path=a.jsonl", "dataset.sources.b.path=b.jsonl")
WEIGHTS = ("dataset.sources.a.weight=0.25", "dataset.sources.b.weight=0.75")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([A, B, WEIGHTS[0]], "dataset.sources.b.weight: must be given, as other sources have weights"),
        ([A, B, WEIGHTS[0], "dataset.sources.b.weight=1"], "the weights sum to 1.25, and must sum to 1, as shares do: "
         "a=0.2 b=0.8"),
        ([A, B, WEIGHTS[0], "dataset.sources.b.weight=0"], "dataset.sources.b.weight=0: must be a number above 0"),
        ([A, B, WEIGHTS[0], "dataset.sources.b.weight=-1"], "dataset.sources.b.weight=-1: must be a number above 0"),
        ([A, B, WEIGHTS[0], "dataset.sources.b.weight=inf"], "dataset.sources.b.weight=inf: must be a number above 0"),
        ([A, B, WEIGHTS[0], "dataset.sources.b.weight=nan"], "dataset.sources.b.weight=nan: must be a number above 0"),
        ([A, f"dataset.sources.a.weight=1{400 * '0'}"], "must be a number above 0"),
        ([A, "dataset.sources.a.eval_size=0"], "dataset.sources.a.eval_size: Input should be greater than 0"),
        ([A, "dataset.sources.a.weight=true"], "dataset.sources.a.weight=True: must be a number above 0"),
        ([A, "dataset.sources.a.weight=much"], "dataset.sources.a.weight=much: must be a number above 0"),
        ([A, B, *WEIGHTS, "dataset.mixing_temperature=2"], "weights of sources both say"),
        ([A, "dataset.mixing_temperature=0.5"], "dataset.mixing_temperature: Input should be greater than or equal"),
        ([A, "dataset.stopping=never"], "dataset.stopping: Input should be 'first_exhausted' or 'all_exhausted'"),
        ([A, "dataset.replay=1.5"], "dataset.replay: Input should be less than 1"),
        ([A, "dataset.replay=0.1", "unrelated=none"], "takes rows of the unrelated text, and there is none"),
        ([A, "dataset.sources.a.wieght=1"], "a.wieght: a source has no such key; did you mean 'weight'"),
        ([A, "dataset.sources.a.split_seed=1"], "all sources share it: set dataset.split_seed"),
        ([A, "dataset.sources.a.max_train_rows=0"], "dataset.sources.a.max_train_rows: Input should be greater than 0"),
        (
            [A, "dataset.sources.a.messages_column=m", "dataset.sources.a.format=text"],
            "dataset.sources.a: messages_column needs format=chat",
        ),
        (["dataset.sources.a.max_train_rows=3"], "dataset.sources.a.path: must be given"),
        (["dataset.sources.a=rows.jsonl"], "dataset.sources.a: Input should be a valid dictionary, got 'rows.jsonl'"),
        (["dataset.sources=[a.jsonl]"], "dataset.sources: must be a mapping of names to values, such as"),
        (["dataset.sources.replay.path=a.jsonl"], "'replay' cannot be a name"),
        (["dataset.sources={x y: {path: a.jsonl}}"], "'x y' cannot be a name"),
        ([A, "dataset.sources.a.format=text"], "no source has this format: set dataset.format=text"),
        (["dataset.path=none"], "dataset.path: must name rows; name each of several: dataset.sources.NAME.path"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_mistake_is_refused_in_one_line(words: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        compose(["dataset=own", *words])
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_source_takes_from_the_section_what_fits_it():
    dataset = MixtureConfig(
        path="org/rows", subset="main", split="all", eval_split="test", format="chat", messages_column="said",
        system_message="Hello.", drop_matching="SPAM", max_train_rows=9,
        sources={
            "same": {"max_train_rows": 5}, "other": {"path": "rows.jsonl"},
            "plain": {"path": "text.jsonl", "format": "text", "eval_size": 3, "drop_matching": None},
            "asked": {"prompt_template": "{q}"}, "split": {"eval_path": "other.jsonl"},
        },
    )  # fmt: skip
    parts = dataset.parts
    assert [*parts] == ["asked", "other", "plain", "same", "split"]
    assert (parts["same"].subset, parts["same"].split, parts["same"].eval_split) == ("main", "all", "test")
    assert (parts["same"].max_train_rows, parts["other"].max_train_rows) == (5, 9)
    assert (parts["other"].subset, parts["other"].split, parts["other"].eval_split) == (None, "train", None)
    assert (parts["other"].messages_column, parts["other"].system_message) == ("said", "Hello.")
    plain = parts["plain"]
    assert (plain.messages_column, plain.system_message, plain.drop_matching, plain.eval_size) == (None, None, None, 3)
    assert (parts["asked"].messages_column, parts["asked"].system_message) == (None, "Hello.")
    assert (parts["split"].eval_path, parts["split"].eval_split) == ("other.jsonl", None)
    assert all(part.name == name for name, part in parts.items())
    assert dataset.paths == ["org/rows", "rows.jsonl", "text.jsonl", "other.jsonl"]
    assert dataset.not_taken == set()


def test_keys_of_a_source_are_those_of_a_dataset():
    assert {"path", "format", "prompt_template", "max_train_rows", "weight", "streaming"} <= {*source_keys()}
    assert not {"name", "split_seed", "sources"} & {*source_keys()}


@given(weights=st.lists(st.floats(1e-6, 1), min_size=1, max_size=8))
def test_weights_are_accepted_exactly_if_they_sum_to_one(weights: list[float]):
    def mixed(values: list[float]) -> MixtureConfig:
        named = {f"s{n}": {"path": f"{n}.jsonl", "weight": value} for n, value in enumerate(values)}
        return MixtureConfig(sources=named)

    shares = [weight / sum(weights) for weight in weights]
    assert sum(mixed(shares).weights.values()) == pytest.approx(1)
    with pytest.raises(ValidationError, match="must sum to 1"):
        mixed([*shares, 0.01])


def test_record_keeps_what_the_user_wrote_and_names_each_key():
    config = compose(["dataset=own", A, B, *WEIGHTS, "dataset.sources.b.input_column=null"])
    assert from_dict(yaml.safe_load(to_yaml(config))) == config
    flat = {key: value for key, value in flatten(config).items() if key.startswith("dataset.sources")}
    assert flat == {
        "dataset.sources.a.path": "a.jsonl", "dataset.sources.a.weight": 0.25, "dataset.sources.b.path": "b.jsonl",
        "dataset.sources.b.weight": 0.75, "dataset.sources.b.input_column": None,
    }  # fmt: skip


def test_config_without_sources_has_the_key_of_older_records():
    values = compose([]).model_dump(mode="json")
    new = {"sources", "mixing_temperature", "stopping", "replay"}
    assert not new & result_values(values)["dataset"].keys()
    older = {**values, "dataset": {key: value for key, value in values["dataset"].items() if key not in new}}
    assert result_values(older) == result_values(values)
    assert not [key for key in flatten(compose([])) if key.startswith("dataset.sources")]


def test_number_of_sources_is_limited():
    """A record must not take long to be refused."""
    with pytest.raises(ValidationError, match="101 sources; at most 100 are mixed"):
        MixtureConfig(sources={f"s{n}": {"path": "rows.jsonl"} for n in range(101)})


def test_paths_of_sources_are_not_shared():
    config = compose(["dataset=own", "dataset.sources.a.path=/home/me/a.jsonl", "dataset.sources.a.prompt_column=/x"])
    shared = without_places(config.model_dump(mode="json"))["dataset"]["sources"]
    assert shared == {"a": {"path": "./a.jsonl", "prompt_column": "/x"}}
    assert without_places(flatten(config))["dataset.sources.a.path"] == "./a.jsonl"


def test_equal_sources_are_found():
    sources = {"a": {"path": "x.jsonl"}, "b": {"path": "y.jsonl"}, "c": {"path": "x.jsonl", "prompt_column": "p"}}
    assert twice(MixtureConfig(sources=sources)) == []
    assert twice(MixtureConfig(sources=sources | {"d": {"path": "y.jsonl"}})) == ["b", "d"]
