import json

import pytest
from datasets import Dataset
from helpers.rows import ROWS, own_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_exp.config.sections.dataset import DatasetConfig, UnrelatedConfig
from qlora_exp.config.sections.mixture import MixtureConfig
from qlora_exp.data import mixture
from qlora_exp.data.cleaning import clean
from qlora_exp.data.reading import sources
from qlora_exp.data.rows import fingerprint, load_heldout, load_rows, order
from qlora_exp.utils.errors import DataError

# Reading


def test_dialogue_ends_with_its_last_answer(write_jsonl):
    turns = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("user", "thanks"))]
    path = write_jsonl([{"chat": [{**turns[0], "content": f"q{i}"}, *turns[1:]]} for i in range(4)])
    rows = load_rows(DatasetConfig(path=path, format="chat", messages_column="chat"))
    assert rows.train[0]["completion"] == "a"
    assert len(rows.train[0]["messages"]) == 2


def test_dialogue_with_other_fields_is_rejected(write_jsonl):
    path = write_jsonl([{"chat": [{"speaker": "human", "text": "hi"}, {"speaker": "gpt", "text": "ho"}]}] * 4)
    with pytest.raises(DataError, match=r"needs role and content \(or from and value\); the first has speaker, text"):
        load_rows(DatasetConfig(path=path, format="chat", messages_column="chat"))


# Cleaning and splitting


def test_empty_duplicate_and_unwanted_rows_are_dropped_and_counted(write_jsonl):
    bad = [
        {"prompt": "p", "completion": " "},
        {"prompt": None, "completion": "x"},
        ROWS[0],
        {"prompt": "q", "completion": "SPAM"},
    ]
    rows = load_rows(own_dataset(write_jsonl(ROWS + bad), drop_matching="SPAM"))
    assert rows.dropped == {"empty": 2, "matching drop_matching": 1, "duplicates": 1, "leaks": 0}
    assert len(rows.train) + len(rows.heldout) == len(ROWS)


@given(size=st.floats(0.01, 0.9), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_split_is_disjoint_complete_and_deterministic(size: float, seed: int, tmp_path_factory):
    file = tmp_path_factory.mktemp("split") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = own_dataset(str(file), eval_size=size, split_seed=seed)
    first, again = load_rows(config), load_rows(config)
    train, heldout = (set(part["prompt"]) for part in (first.train, first.heldout))
    assert not train & heldout
    assert len(train | heldout) == len(ROWS)
    assert fingerprint(first.train) == fingerprint(again.train)


def test_fingerprint_depends_on_every_row(write_jsonl):
    changed = [*ROWS[:-1], {"prompt": "question 19", "completion": "other"}]
    assert fingerprint(Dataset.from_list(ROWS)) != fingerprint(Dataset.from_list(changed))
    assert fingerprint(Dataset.from_list(ROWS)) != fingerprint(Dataset.from_list(ROWS[::-1]))
    path = write_jsonl(ROWS)
    read, _ = clean(sources.read(own_dataset(path), path, "train"), own_dataset(path), path)
    assert fingerprint(read) == fingerprint(Dataset.from_list([{**row, "input": ""} for row in ROWS]))


def test_row_limits_and_held_out_file_are_respected(write_jsonl):
    rows = load_rows(
        own_dataset(
            write_jsonl(ROWS, "a.jsonl"), eval_path=write_jsonl(ROWS[:5], "b.jsonl"), max_train_rows=3, max_eval_rows=2
        )
    )
    assert (len(rows.train), len(rows.heldout)) == (3, 2)


LEAKING = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(4)]


@pytest.mark.parametrize(("drop", "left"), [("none", 5), ("exact", 4), ("near", 3)])
def test_leaking_training_rows_are_dropped(drop: str, left: int, write_jsonl):
    text = "one two three four five six seven eight nine ten"
    train = [*LEAKING[:3], {"prompt": "Question  3!", "completion": "?"}, {"prompt": "a", "completion": text}]
    heldout = [LEAKING[3], {"prompt": "b", "completion": text}]
    path, eval_path = write_jsonl(train, "train.jsonl"), write_jsonl(heldout, "heldout.jsonl")
    rows = load_rows(own_dataset(path, eval_path=eval_path, drop_leaks=drop))
    assert len(rows.train) == left
    assert len(rows.heldout) == 2
    assert sorted(one.kind for one in rows.leaks) == ["exact", "near"]
    assert rows.dropped["leaks"] == 5 - left


@given(size=st.floats(0.01, 0.9), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_validation_rows_are_apart_from_training_and_held_out_rows(size: float, seed: int, tmp_path_factory):
    file = tmp_path_factory.mktemp("split") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = own_dataset(str(file), eval_size=0.25, validation_size=size, split_seed=seed)
    on_heldout, on_validation = load_rows(config), load_rows(config.model_copy(update={"evaluate_on": "validation"}))
    assert fingerprint(on_heldout.train) == fingerprint(on_validation.train)
    train, heldout, validation = (
        set(part["prompt"]) for part in (on_heldout.train, on_heldout.heldout, on_validation.heldout)
    )
    assert len(train) + len(heldout) + len(validation) == len(train | heldout | validation) == len(ROWS)
    without = load_rows(own_dataset(str(file), eval_size=0.25, split_seed=seed))
    assert set(without.heldout["prompt"]) == heldout


@pytest.mark.parametrize(("drop", "left"), [("none", (6, 2)), ("exact", (4, 1)), ("near", (3, 1))])
def test_leaks_among_all_three_parts_are_dropped(drop: str, left: tuple, write_jsonl):
    text = "one two three four five six seven eight nine ten"
    path = write_jsonl([{"prompt": f"p{number}", "completion": str(number)} for number in range(8)], "rows.jsonl")
    config = own_dataset(path, validation_size=2, eval_path=path)
    train, validation = (load_rows(config.model_copy(update={"drop_leaks": "none", **more})) for more in (
        {}, {"evaluate_on": "validation"}))  # fmt: skip
    rows = {row["prompt"]: dict(row) for row in (*train.train, *validation.heldout)}
    (one, two), (first, second, third, *others) = validation.heldout["prompt"], train.train["prompt"]
    rows[first]["prompt"] = rows[one]["prompt"] + "!"  # a training row with the question of a validation row
    rows[second]["completion"] = rows[one]["completion"] = text
    heldout = [{"prompt": rows[two]["prompt"], "completion": "x"}, {"prompt": third, "completion": "y"}]
    written = [rows[f"p{number}"] for number in range(8)]
    config = own_dataset(
        write_jsonl(written, "changed.jsonl"), validation_size=2, eval_path=write_jsonl(heldout, "heldout.jsonl"),
        drop_leaks=drop,
    )  # fmt: skip
    found = load_rows(config.model_copy(update={"evaluate_on": "validation"}))
    assert (len(found.train), len(found.heldout)) == left
    assert len(load_rows(config).heldout) == 2
    assert found.dropped["leaks"] == (0 if drop == "none" else 8 - sum(left))
    parts = sorted((leak.parts, leak.kind) for leak in found.leaks)
    assert parts == [
        ("training, held-out", "exact"), ("training, validation", "exact"), ("training, validation", "near"),
        ("validation, held-out", "exact"),
    ]  # fmt: skip
    assert {*others} <= {*found.train["prompt"]}


@pytest.mark.parametrize(("size", "message"), [(15, "only 15 rows"), (40, "only 15 rows")])
def test_too_few_rows_for_validation_are_refused(size: int, message: str, write_jsonl):
    with pytest.raises(DataError, match=rf"dataset\.validation_size={size}: {message}"):
        load_rows(own_dataset(write_jsonl(ROWS), eval_size=5, validation_size=size))


def test_cleaned_rows_are_cached_on_disk(write_jsonl):
    config = own_dataset(write_jsonl([{"prompt": f"q{n}", "completion": "a"} for n in range(9)]))
    first, second = load_rows(config), load_rows(config)
    assert first.train.cache_files == second.train.cache_files != []
    assert fingerprint(first.train) == fingerprint(second.train)
    other_split = load_rows(config.model_copy(update={"split_seed": 1, "name": "other"}))
    assert other_split.train.cache_files == first.train.cache_files
    assert fingerprint(other_split.train) != fingerprint(first.train)


def test_shuffle_and_split_equal_those_of_datasets():
    rows = Dataset.from_list([{"n": number} for number in range(50)])
    shuffled = order(50, 7)
    assert shuffled == rows.shuffle(seed=7)["n"][:]
    parts = rows.train_test_split(test_size=5, seed=7)
    assert (shuffled[:5], shuffled[5:]) == (parts["test"]["n"][:], parts["train"]["n"][:])


# Several sources

TALK = [{"chat": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": f"hi {n}"}]}
        for n in range(30)]  # fmt: skip
TEXT = [{"text": f"Story number {n} is about {n * 3} dwarfs and a king."} for n in range(40)]
ASKED = {"format": "prompt_completion", "prompt_column": "prompt", "completion_column": "completion",
         "input_column": None}  # fmt: skip


@pytest.fixture
def mixed(write_jsonl):
    """Configure a mixture of rows of three formats, changed by the given keys of it and of its sources."""
    files = {"asked": (ROWS, {}), "talk": (TALK, {"format": "chat", "messages_column": "chat"}),
             "story": (TEXT, {"format": "text"})}  # fmt: skip
    own = {name: {"path": write_jsonl(rows, f"{name}.jsonl"), **keys} for name, (rows, keys) in files.items()}

    def mix(*names: str, more: dict | None = None, **keys) -> MixtureConfig:
        sources = {name: own[name] | (more or {}).get(name, {}) for name in names}
        return MixtureConfig(**(ASKED | {"sources": sources} | keys))

    return mix


def texts(rows: Dataset, source: str) -> list[str]:
    return [row["completion"] for row in rows if row["source"] == source]


def test_sources_of_other_formats_are_mixed(mixed):
    rows = load_rows(mixed("talk", "asked", "story"))
    assert rows.portions == {
        "asked": mixture.Portion(18, 18, 2), "story": mixture.Portion(36, 36, 4), "talk": mixture.Portion(27, 27, 3),
    }  # fmt: skip
    epoch = rows.epoch(rows.train)
    assert len(epoch) == 81
    assert {row["source"]: row["messages"] is not None for row in epoch} == {
        "asked": False, "story": False, "talk": True,
    }  # fmt: skip
    assert {row["source"] for row in epoch.select(range(5))} == {"asked", "story", "talk"}  # spread evenly
    assert {row["source"] for row in rows.heldout.select(range(4))} == {"asked", "story", "talk"}


@given(others=st.sets(st.sampled_from(["talk", "story"])), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_source_is_split_the_same_whatever_it_is_mixed_with(others: set[str], seed: int, mixed):
    rows = load_rows(mixed("asked", *others, split_seed=seed))
    alone = load_rows(own_dataset(mixed("asked").sources["asked"]["path"], split_seed=seed))
    if not others:
        assert "source" not in rows.train.column_names
        assert rows.order is None
        assert fingerprint(rows.train) == fingerprint(alone.train)
        assert fingerprint(rows.heldout) == fingerprint(alone.heldout)
        return
    assert texts(rows.heldout, "asked") == alone.heldout["completion"][:]
    assert texts(rows.epoch(rows.train), "asked") == alone.train["completion"][:]


def test_order_of_the_names_does_not_matter(mixed):
    one, other = (load_rows(mixed(*names)) for names in (("asked", "talk"), ("talk", "asked")))
    assert fingerprint(one.epoch(one.train)) == fingerprint(other.epoch(other.train))
    assert fingerprint(one.heldout) == fingerprint(other.heldout)


def test_rows_are_limited_and_repeated_for_each_source(mixed):
    more = {"asked": {"weight": 0.5, "max_train_rows": 5, "max_eval_rows": 1}, "talk": {"weight": 0.5}}
    rows = load_rows(mixed("asked", "talk", more=more))
    assert rows.portions == {"asked": mixture.Portion(5, 5, 1), "talk": mixture.Portion(27, 5, 3)}
    again = load_rows(mixed("asked", "talk", more=more, stopping="all_exhausted"))
    assert again.portions == {"asked": mixture.Portion(5, 27, 1), "talk": mixture.Portion(27, 27, 3)}
    assert len(again.train) == 32  # each row once
    assert len(again.epoch(again.train)) == 54
    assert texts(again.epoch(again.train), "asked")[:5] == texts(rows.epoch(rows.train), "asked")
    limited = load_rows(mixed("asked", "talk", max_train_rows=4))
    assert [portion.trained for portion in limited.portions.values()] == [4, 4]


def test_leaks_and_repeated_rows_are_found_among_all_sources(mixed, write_jsonl):
    held_out = [{"prompt": "hello there", "completion": "x"}, {"prompt": "new", "completion": "y"}]
    test = write_jsonl(held_out, "test.jsonl")
    rows = [{"prompt": "Hello there!", "completion": "leaks"}, {"prompt": "question 3", "completion": "answer 3"},
            {"prompt": "question 4", "completion": "other"}, {"prompt": "own", "completion": "z"}]  # fmt: skip
    other = {"path": write_jsonl(rows, "other.jsonl"), "eval_path": test}
    asked = mixed("asked").sources["asked"] | {"eval_path": test}

    def loaded(**more):
        return load_rows(MixtureConfig(**ASKED, sources={"asked": asked, "other": other | more}))

    found = loaded()
    assert sorted(texts(found.train, "other")) == ["other", "z"]
    assert (found.dropped["leaks"], found.dropped["duplicates"]) == (1, 1)
    assert found.report.examples == {"leaks": "other, line 1", "duplicates": "other, line 2"}
    assert len(texts(loaded(drop_duplicates=False).train, "other")) == 3
    assert texts(loaded(drop_duplicates=True).train, "other") == ["z"]


def test_replayed_text_is_not_what_measures_forgetting(mixed, write_jsonl):
    general = UnrelatedConfig(path=write_jsonl(TEXT, "general.jsonl"), eval_size=8)
    rows = load_rows(mixed("asked", replay=0.4), general)
    assert rows.portions["replay"] == mixture.Portion(32, 12, 0)
    replayed, held_out = texts(rows.epoch(rows.train), "replay"), load_heldout(general)["completion"][:]
    assert len(replayed) == 12
    assert not {*replayed} & {*held_out}
    assert {*rows.heldout["source"]} == {"asked"}


@pytest.mark.parametrize("several", [True, False])
def test_text_that_measures_forgetting_is_not_trained_on(several: bool, mixed, write_jsonl):
    general = UnrelatedConfig(path=write_jsonl(TEXT, "general.jsonl"), eval_size=8)
    story = mixed("asked", "story") if several else mixed("story", format="text")
    rows = load_rows(story, general)
    assert not {*rows.train["completion"]} & {*load_heldout(general)["completion"]}
    assert rows.dropped["leaks"] == len(rows.leaks) > 0
    assert {leak.parts for leak in rows.leaks} == {"training, unrelated"}


def test_source_without_rows_is_named(mixed, write_jsonl):
    few = {"asked": {"path": write_jsonl(ROWS[:2], "few.jsonl"), "drop_matching": "0"}}
    with pytest.raises(DataError, match=r"dataset\.sources\.asked\.eval_size=0\.1: only 1 rows to split"):
        load_rows(mixed("asked", "story", more=few))
    same = {"asked": {"eval_path": mixed("asked").sources["asked"]["path"]}}
    with pytest.raises(DataError, match=r"dataset\.sources: no rows of asked are left for training or for evaluation"):
        load_rows(mixed("asked", "story", more=same))


def test_validation_rows_are_split_off_each_source(mixed):
    config = mixed("asked", "story", validation_size=0.2)
    on_heldout, on_validation = load_rows(config), load_rows(config.model_copy(update={"evaluate_on": "validation"}))
    assert fingerprint(on_heldout.epoch(on_heldout.train)) == fingerprint(on_validation.epoch(on_validation.train))
    assert {name: portion.heldout for name, portion in on_validation.portions.items()} == {"asked": 4, "story": 7}
    assert not {*on_validation.heldout["completion"]} & {*on_heldout.heldout["completion"]}


def test_sources_are_streamed_up_to_their_own_limits(mixed):
    more = {"asked": {"max_train_rows": 4}}
    rows = load_rows(mixed("asked", "story", more=more, streaming=True, max_train_rows=6, eval_size=2))
    assert rows.portions == {"asked": mixture.Portion(4, 4, 2), "story": mixture.Portion(6, 6, 2)}
    assert rows.report.read == 9 + 12  # half as many again
