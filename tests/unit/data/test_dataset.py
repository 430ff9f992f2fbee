import json
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.rows import ROWS, TEXT, own_dataset, tokenized
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data import dataset, sources
from qlora_exp.data.dataset import IGNORED
from qlora_exp.utils.errors import DataError

# Reading


def test_dialogue_ends_with_its_last_answer(write_jsonl):
    turns = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("user", "thanks"))]
    path = write_jsonl([{"chat": [{**turns[0], "content": f"q{i}"}, *turns[1:]]} for i in range(4)])
    rows = dataset.load_rows(DatasetConfig(path=path, format="chat", messages_column="chat"))
    assert rows.train[0]["completion"] == "a"
    assert len(rows.train[0]["messages"]) == 2


def test_dialogue_with_other_fields_is_rejected(write_jsonl):
    path = write_jsonl([{"chat": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}] * 4)
    with pytest.raises(DataError, match="needs role and content; the first has from, value"):
        dataset.load_rows(DatasetConfig(path=path, format="chat", messages_column="chat"))


# Cleaning and splitting


def test_empty_duplicate_and_unwanted_rows_are_dropped_and_counted(write_jsonl):
    bad = [
        {"prompt": "p", "completion": " "},
        {"prompt": None, "completion": "x"},
        ROWS[0],
        {"prompt": "q", "completion": "SPAM"},
    ]
    rows = dataset.load_rows(own_dataset(write_jsonl(ROWS + bad), drop_matching="SPAM"))
    assert rows.dropped == {"empty": 2, "matching drop_matching": 1, "duplicates": 1, "leaks": 0}
    assert len(rows.train) + len(rows.heldout) == len(ROWS)


@given(size=st.floats(0.01, 0.9), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_split_is_disjoint_complete_and_deterministic(size: float, seed: int, tmp_path_factory):
    file = tmp_path_factory.mktemp("split") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = own_dataset(str(file), eval_size=size, split_seed=seed)
    first, again = dataset.load_rows(config), dataset.load_rows(config)
    train, heldout = (set(part["prompt"]) for part in (first.train, first.heldout))
    assert not train & heldout
    assert len(train | heldout) == len(ROWS)
    assert dataset.fingerprint(first.train) == dataset.fingerprint(again.train)


def test_fingerprint_depends_on_every_row(write_jsonl):
    changed = [*ROWS[:-1], {"prompt": "question 19", "completion": "other"}]
    assert dataset.fingerprint(Dataset.from_list(ROWS)) != dataset.fingerprint(Dataset.from_list(changed))
    assert dataset.fingerprint(Dataset.from_list(ROWS)) != dataset.fingerprint(Dataset.from_list(ROWS[::-1]))
    assert dataset.fingerprint(Dataset.from_list(ROWS)) == dataset.fingerprint(
        sources._read_file(Path(write_jsonl(ROWS)))
    )


def test_row_limits_and_held_out_file_are_respected(write_jsonl):
    rows = dataset.load_rows(
        own_dataset(
            write_jsonl(ROWS, "a.jsonl"), eval_path=write_jsonl(ROWS[:5], "b.jsonl"), max_train_rows=3, max_eval_rows=2
        )
    )
    assert (len(rows.train), len(rows.heldout)) == (3, 2)


# Tokens and labels


@given(prompt=TEXT, completion=TEXT)
@settings(max_examples=25, deadline=None)
def test_only_answer_and_eos_carry_loss(prompt: str, completion: str, tiny_tokenizer):
    row = tokenized([{"prompt": prompt, "input": "", "completion": completion}], tiny_tokenizer)[0]
    learned = [label for label in row["labels"] if label != IGNORED]
    assert tiny_tokenizer.decode(learned[:-1]) == completion
    assert learned[-1] == tiny_tokenizer.eos_token_id
    assert row["labels"][: row["prompt_length"]] == [IGNORED] * row["prompt_length"]
    assert [x for x, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED] == learned


def test_prompt_carries_loss_on_request(tiny_tokenizer):
    row = tokenized(
        [{"prompt": "p", "input": "", "completion": "c"}], tiny_tokenizer, "training.completion_only_loss=false"
    )[0]
    assert row["labels"] == row["input_ids"]


def test_cut_keeps_text_and_tokens_aligned(tiny_tokenizer):
    rows = [
        {"prompt": "p" * 600, "input": "", "completion": "gone"},
        {"prompt": "p", "input": "", "completion": "kept"},
    ]
    text, tokens = dataset.cut(Dataset.from_list(rows), tokenized(rows, tiny_tokenizer), 300)
    assert text["completion"][:] == ["kept"]
    assert len(tokens) == 1


def test_tokenized_rows_are_cached(make_config, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path / "cache"))
    rows = dataset.load_rows(make_config().dataset).train
    first = dataset.tokenize(rows, make_config(), tiny_tokenizer)
    monkeypatch.setattr(dataset, "_tokenize", lambda *_: pytest.fail("tokenized again"))
    again = dataset.tokenize(rows, make_config("seed=1", "method.r=4", "training.max_length=77"), tiny_tokenizer)
    assert again.to_list() == first.to_list()
    for change in ("dataset.format=prompt_completion", "training.completion_only_loss=false"):
        with pytest.raises(pytest.fail.Exception, match="tokenized again"):
            dataset.tokenize(rows, make_config(change), tiny_tokenizer)
    with pytest.raises(pytest.fail.Exception, match="tokenized again"):
        dataset.tokenize(rows.select(range(3)), make_config(), tiny_tokenizer)


def test_unrelated_text_is_deterministic_and_fully_supervised(make_config, tiny_tokenizer):
    checked = make_config("unrelated=python_docs", "training.max_length=100000")
    found = dataset.load_heldout(checked.unrelated)
    rows, tokens = dataset.unrelated(found, checked, tiny_tokenizer)
    assert rows["completion"][:] == dataset.load_heldout(checked.unrelated)["completion"][:]
    assert len(rows) == 8
    assert all(len(text) >= 1000 for text in rows["completion"])
    assert all(label != dataset.IGNORED for labels in tokens["labels"] for label in labels)
    _, shorter = dataset.unrelated(
        found, make_config("unrelated=python_docs", "training.max_length=50"), tiny_tokenizer
    )
    assert {len(labels) for labels in shorter["labels"]} == {50}


def test_unrelated_text_is_read_from_a_file(make_config, tiny_tokenizer, write_jsonl):
    path = write_jsonl([{"text": f"passage {number}"} for number in range(6)])
    checked = make_config(f"unrelated.path={path}", "unrelated.eval_size=3")
    rows, _ = dataset.unrelated(dataset.load_heldout(checked.unrelated), checked, tiny_tokenizer)
    assert len(rows) == 3


LEAKING = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(4)]


@pytest.mark.parametrize(("drop", "left"), [("none", 5), ("exact", 4), ("near", 3)])
def test_leaking_training_rows_are_dropped(drop: str, left: int, write_jsonl):
    text = "one two three four five six seven eight nine ten"
    train = [*LEAKING[:3], {"prompt": "Question  3!", "completion": "?"}, {"prompt": "a", "completion": text}]
    heldout = [LEAKING[3], {"prompt": "b", "completion": text}]
    path, eval_path = write_jsonl(train, "train.jsonl"), write_jsonl(heldout, "heldout.jsonl")
    rows = dataset.load_rows(own_dataset(path, eval_path=eval_path, drop_leaks=drop))
    assert len(rows.train) == left
    assert len(rows.heldout) == 2
    assert sorted(one.kind for one in rows.leaks) == ["exact", "near"]
    assert rows.dropped["leaks"] == 5 - left


def test_assistant_only_loss_covers_every_answer(make_config, tiny_tokenizer, write_jsonl):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "2+3?"), ("assistant", "5")]
    dialogue = {"chat": [{"role": role, "content": content} for role, content in turns]}
    path = write_jsonl([dialogue, {"chat": [*dialogue["chat"][:1], {"role": "assistant", "content": "no"}]}])
    words = [f"dataset.path={path}", "dataset.format=chat", "dataset.messages_column=chat", "dataset.input_column=null"]
    found = []
    for every in ("true", "false"):
        checked = make_config(*words, f"training.assistant_only_loss={every}", "dataset.eval_size=1")
        rows = dataset.load_rows(checked.dataset)
        whole = rows.train if len(rows.train[0]["messages"]) == 4 else rows.heldout
        (row,) = dataset.tokenize(whole, checked, tiny_tokenizer)
        found.append(tiny_tokenizer.decode([label for label in row["labels"] if label != dataset.IGNORED]))
        assert tiny_tokenizer.decode(row["input_ids"][: row["prompt_length"]]).endswith("<|im_start|>assistant\n")
    assert found == ["hello<|im_end|>\n5<|im_end|>\n", "5<|im_end|>\n"]


def test_cleaned_rows_are_cached_on_disk(write_jsonl):
    config = own_dataset(write_jsonl([{"prompt": f"q{n}", "completion": "a"} for n in range(9)]))
    first, second = dataset.load_rows(config), dataset.load_rows(config)
    assert first.train.cache_files == second.train.cache_files != []
    assert dataset.fingerprint(first.train) == dataset.fingerprint(second.train)
    other_split = dataset.load_rows(config.model_copy(update={"split_seed": 1, "name": "other"}))
    assert other_split.train.cache_files == first.train.cache_files
    assert dataset.fingerprint(other_split.train) != dataset.fingerprint(first.train)


def test_shuffle_and_split_equal_those_of_datasets():
    rows = Dataset.from_list([{"n": number} for number in range(50)])
    shuffled = dataset.order(50, 7)
    assert shuffled == rows.shuffle(seed=7)["n"][:]
    parts = rows.train_test_split(test_size=5, seed=7)
    assert (shuffled[:5], shuffled[5:]) == (parts["test"]["n"][:], parts["train"]["n"][:])
