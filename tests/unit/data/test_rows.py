import json

import pytest
from datasets import Dataset
from helpers.rows import ROWS, own_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data import sources
from qlora_exp.data.cleaning import clean
from qlora_exp.data.rows import fingerprint, load_rows, order
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
