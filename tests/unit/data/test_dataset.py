import json
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data import dataset, label_audit, sources
from qlora_exp.data.dataset import IGNORED
from qlora_exp.utils.errors import ConfigError, DataError

TEXT = st.text(min_size=1, max_size=60, alphabet=st.characters(blacklist_categories=("Cs",))).filter(str.strip)
ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)]


def own(path: str, **more) -> DatasetConfig:
    fields = {"format": "prompt_completion", "prompt_column": "prompt", "completion_column": "completion"}
    return DatasetConfig(path=path, input_column=None, **(fields | more))


def tokenized(rows: list[dict], tokenizer, *overrides: str) -> Dataset:
    return dataset.tokenize(Dataset.from_list(rows), compose(overrides), tokenizer)


# Reading


def test_the_embedded_faq_has_its_known_rows():
    rows = dataset.load_rows(compose().dataset)
    assert len(rows.train) + len(rows.heldout) == 435
    assert not any("Zaragoza" in row["completion"] for row in rows.train)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_own_files(kind: str, tmp_path):
    file = tmp_path / f"rows.{kind}"
    table = Dataset.from_list(ROWS)
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](file)
    rows = dataset.load_rows(own(str(file)))
    assert sorted(row["completion"] for part in (rows.train, rows.heldout) for row in part) == sorted(
        row["completion"] for row in ROWS
    )


def test_reasoning_gym_scores_its_own_answers():
    config = compose(["dataset=reasoning_gym", "dataset.reasoning_gym_size=20"]).dataset
    rows, score = dataset.load_rows(config), sources.scorer(config)
    assert all(score(row["completion"], row) == 1.0 for row in rows.heldout)
    assert score("certainly not a number", rows.heldout[0]) < 1.0


def test_dialogues_end_with_the_last_answer(jsonl):
    turns = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("user", "thanks"))]
    path = jsonl([{"chat": [{**turns[0], "content": f"q{i}"}, *turns[1:]]} for i in range(4)])
    rows = dataset.load_rows(DatasetConfig(path=path, format="chat", messages_column="chat"))
    assert rows.train[0]["completion"] == "a"
    assert len(rows.train[0]["messages"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "nowhere.jsonl"}, "no file nowhere.jsonl"),
        ({"prompt_column": "instruction"}, "no column 'instruction'; it has prompt, completion"),
        ({"drop_matching": "answer"}, "rows to split"),
        ({"eval_size": 20}, "only 20 rows"),
        ({"eval_path": "gone.csv"}, "no file gone.csv"),
        ({"path": "reasoning_gym:chain_summ"}, "did you mean 'chain_sum'"),
        ({"path": "embedded:faq"}, "no 'embedded:faq'"),
        ({"path": "someone/not-a-dataset"}, "the hub did not give it"),
    ],
)
def test_a_source_that_cannot_be_read_is_explained(changes: dict, message: str, jsonl):
    with pytest.raises(DataError, match=message):
        dataset.load_rows(own(**({"path": jsonl(ROWS)} | changes)))


def test_an_empty_file_is_explained(tmp_path):
    (tmp_path / "rows.csv").write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        dataset.load_rows(own(str(tmp_path / "rows.csv")))


def test_dialogues_of_another_shape_are_explained(jsonl):
    path = jsonl([{"chat": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}] * 4)
    with pytest.raises(DataError, match="needs role and content; the first has from, value"):
        dataset.load_rows(DatasetConfig(path=path, format="chat", messages_column="chat"))


def test_a_damaged_file_is_explained(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion"')
    with pytest.raises(DataError, match="cannot be read as json"):
        dataset.load_rows(own(str(tmp_path / "rows.jsonl")))


# Cleaning and splitting


def test_empty_repeated_and_unwanted_rows_are_left_out_and_counted(jsonl):
    bad = [
        {"prompt": "p", "completion": " "},
        {"prompt": None, "completion": "x"},
        ROWS[0],
        {"prompt": "q", "completion": "SPAM"},
    ]
    rows = dataset.load_rows(own(jsonl(ROWS + bad), drop_matching="SPAM"))
    assert rows.dropped == {"empty": 2, "matching drop_matching": 1, "duplicates": 1, "leaks": 0}
    assert len(rows.train) + len(rows.heldout) == len(ROWS)


@given(size=st.floats(0.01, 0.9), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_a_split_is_disjoint_complete_and_the_same_for_one_seed(size: float, seed: int, tmp_path_factory):
    file = tmp_path_factory.mktemp("split") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = own(str(file), eval_size=size, split_seed=seed)
    first, again = dataset.load_rows(config), dataset.load_rows(config)
    train, heldout = (set(part["prompt"]) for part in (first.train, first.heldout))
    assert not train & heldout
    assert len(train | heldout) == len(ROWS)
    assert dataset.fingerprint(first.train) == dataset.fingerprint(again.train)


def test_the_fingerprint_sees_every_row(jsonl):
    changed = [*ROWS[:-1], {"prompt": "question 19", "completion": "other"}]
    assert dataset.fingerprint(Dataset.from_list(ROWS)) != dataset.fingerprint(Dataset.from_list(changed))
    assert dataset.fingerprint(Dataset.from_list(ROWS)) != dataset.fingerprint(Dataset.from_list(ROWS[::-1]))
    assert dataset.fingerprint(Dataset.from_list(ROWS)) == dataset.fingerprint(sources._read_file(Path(jsonl(ROWS))))


def test_row_limits_and_a_heldout_file(jsonl):
    rows = dataset.load_rows(
        own(jsonl(ROWS, "a.jsonl"), eval_path=jsonl(ROWS[:5], "b.jsonl"), max_train_rows=3, max_eval_rows=2)
    )
    assert (len(rows.train), len(rows.heldout)) == (3, 2)


# Tokens and labels


@given(prompt=TEXT, completion=TEXT)
@settings(max_examples=25, deadline=None)
def test_exactly_the_answer_and_eos_carry_loss(prompt: str, completion: str, tokenizer):
    row = tokenized([{"prompt": prompt, "input": "", "completion": completion}], tokenizer)[0]
    learned = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(learned[:-1]) == completion
    assert learned[-1] == tokenizer.eos_token_id
    assert row["labels"][: row["prompt_length"]] == [IGNORED] * row["prompt_length"]
    assert [x for x, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED] == learned


def test_loss_on_the_prompt_too_if_asked(tokenizer):
    row = tokenized(
        [{"prompt": "p", "input": "", "completion": "c"}], tokenizer, "training.completion_only_loss=false"
    )[0]
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize("style", ["alpaca", "chat"])
def test_the_audit_shows_what_is_learned(style: str, tokenizer):
    tokens = tokenized([{"prompt": "why?", "input": "", "completion": "because"}], tokenizer, f"dataset.format={style}")
    audit = label_audit.audit(tokens, 512, tokenizer)
    assert "[[because<|im_end|>" in audit.sample
    assert "why?" in audit.sample.split("[[")[0]
    assert (audit.rows, audit.eos_learned_share, audit.truncated_rows_share) == (1, 1.0, 0.0)
    assert audit.supervised_share == audit.supervised_tokens / audit.tokens


def test_the_audit_counts_rows_that_are_cut(tokenizer):
    rows = [{"prompt": "p", "input": "", "completion": "c" * n} for n in (5, 500)] + [
        {"prompt": "p" * 600, "input": "", "completion": "c"}
    ]
    audit = label_audit.audit(tokenized(rows, tokenizer), 300, tokenizer)
    assert audit.truncated_rows_share == pytest.approx(2 / 3)
    assert audit.dropped_rows_share == pytest.approx(1 / 3)
    assert audit.eos_learned_share == pytest.approx(1 / 3)


def test_learning_from_nothing_is_refused(tokenizer):
    tokens = tokenized([{"prompt": "p" * 100, "input": "", "completion": "c"}], tokenizer)
    with pytest.raises(DataError, match="no token of the 1 training rows carries loss"):
        label_audit.audit(tokens, 50, tokenizer)
    with pytest.raises(DataError, match="no held-out row"):
        dataset.cut(Dataset.from_list([{"prompt": "p"}]), tokens, 50)


def test_cutting_keeps_text_and_tokens_together(tokenizer):
    rows = [
        {"prompt": "p" * 600, "input": "", "completion": "gone"},
        {"prompt": "p", "input": "", "completion": "kept"},
    ]
    text, tokens = dataset.cut(Dataset.from_list(rows), tokenized(rows, tokenizer), 300)
    assert text["completion"][:] == ["kept"]
    assert len(tokens) == 1


def test_rows_are_tokenized_once_for_all_runs(config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path / "cache"))
    rows = dataset.load_rows(config().dataset).train
    first = dataset.tokenize(rows, config(), tokenizer)
    monkeypatch.setattr(dataset, "_tokenize", lambda *_: pytest.fail("tokenized again"))
    again = dataset.tokenize(rows, config("seed=1", "method.r=4", "training.max_length=77"), tokenizer)
    assert again.to_list() == first.to_list()
    for change in ("dataset.format=prompt_completion", "training.completion_only_loss=false"):
        with pytest.raises(pytest.fail.Exception, match="tokenized again"):
            dataset.tokenize(rows, config(change), tokenizer)
    with pytest.raises(pytest.fail.Exception, match="tokenized again"):
        dataset.tokenize(rows.select(range(3)), config(), tokenizer)


def test_unrelated_text_is_the_same_every_time_and_all_of_it_counts(config, tokenizer):
    checked = config("unrelated=python_docs", "training.max_length=100000")
    found = dataset.load_heldout(checked.unrelated)
    rows, tokens = dataset.unrelated(found, checked, tokenizer)
    assert rows["completion"][:] == dataset.load_heldout(checked.unrelated)["completion"][:]
    assert len(rows) == 8
    assert all(len(text) >= 1000 for text in rows["completion"])
    assert all(label != dataset.IGNORED for labels in tokens["labels"] for label in labels)
    _, shorter = dataset.unrelated(found, config("unrelated=python_docs", "training.max_length=50"), tokenizer)
    assert {len(labels) for labels in shorter["labels"]} == {50}


def test_unrelated_text_may_be_a_file_of_ones_own(config, tokenizer, jsonl):
    path = jsonl([{"text": f"passage {number}"} for number in range(6)])
    checked = config(f"unrelated.path={path}", "unrelated.eval_size=3")
    rows, _ = dataset.unrelated(dataset.load_heldout(checked.unrelated), checked, tokenizer)
    assert len(rows) == 3


LEAKING = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(4)]


@pytest.mark.parametrize(("drop", "left"), [("none", 5), ("exact", 4), ("near", 3)])
def test_training_rows_that_give_a_held_out_row_away_are_left_out(drop: str, left: int, jsonl):
    text = "one two three four five six seven eight nine ten"
    train = [*LEAKING[:3], {"prompt": "Question  3!", "completion": "?"}, {"prompt": "a", "completion": text}]
    heldout = [LEAKING[3], {"prompt": "b", "completion": text}]
    path, eval_path = jsonl(train, "train.jsonl"), jsonl(heldout, "heldout.jsonl")
    rows = dataset.load_rows(own(path, eval_path=eval_path, drop_leaks=drop))
    assert len(rows.train) == left
    assert len(rows.heldout) == 2
    assert sorted(one.kind for one in rows.leaks) == ["exact", "near"]
    assert rows.dropped["leaks"] == 5 - left


def test_leaks_are_counted_and_told(run, jsonl, caplog):
    path = jsonl([{"prompt": f"q {number}", "completion": "a"} for number in range(8)], "train.jsonl")
    eval_path = jsonl([{"prompt": "Q 3", "completion": "b"}], "heldout.jsonl")
    words = [f"dataset.path={path}", f"dataset.eval_path={eval_path}", "dataset.input_column=null"]
    words += ["dataset.prompt_column=prompt", "dataset.completion_column=completion", "evaluation=loss_only"]
    result = run("method=lora", *words)
    assert result.metrics["leaks/exact"] == 1
    assert "1 training rows ask what a held-out row asks" in caplog.text
    assert json.loads((result.output_dir / "leaks.json").read_text())[0]["kind"] == "exact"


def test_every_answer_of_a_dialogue_carries_loss(config, tokenizer, jsonl):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "2+3?"), ("assistant", "5")]
    dialogue = {"chat": [{"role": role, "content": content} for role, content in turns]}
    path = jsonl([dialogue, {"chat": [*dialogue["chat"][:1], {"role": "assistant", "content": "no"}]}])
    words = [f"dataset.path={path}", "dataset.format=chat", "dataset.messages_column=chat", "dataset.input_column=null"]
    found = []
    for every in ("true", "false"):
        checked = config(*words, f"training.assistant_only_loss={every}", "dataset.eval_size=1")
        rows = dataset.load_rows(checked.dataset)
        whole = rows.train if len(rows.train[0]["messages"]) == 4 else rows.heldout
        (row,) = dataset.tokenize(whole, checked, tokenizer)
        found.append(tokenizer.decode([label for label in row["labels"] if label != dataset.IGNORED]))
        assert tokenizer.decode(row["input_ids"][: row["prompt_length"]]).endswith("<|im_start|>assistant\n")
    assert found == ["hello<|im_end|>\n5<|im_end|>\n", "5<|im_end|>\n"]


@pytest.mark.parametrize(
    "words", [["dataset.format=alpaca"], ["dataset.format=chat", "training.completion_only_loss=false"]]
)
def test_loss_on_the_assistant_alone_needs_a_dialogue(words: list[str]):
    with pytest.raises(ConfigError, match="assistant_only_loss needs"):
        compose([*words, "training.assistant_only_loss=true"])


def test_a_stream_is_read_no_further_than_needed(monkeypatch):
    read = []

    def rows():
        for number in range(10**9):
            read.append(number)
            yield {"prompt": f"q{number}", "completion": "a"}

    def load(*_arguments, streaming: bool, **_options):
        assert streaming
        return IterableDataset.from_generator(rows)

    monkeypatch.setattr(sources, "load_dataset", load)
    found = dataset.load_rows(own("org/name", streaming=True, max_train_rows=6, eval_size=2))
    assert (len(found.train), len(found.heldout)) == (6, 2)
    assert len(read) <= 13


@pytest.mark.parametrize("words", [["dataset.eval_size=10"], ["dataset.max_train_rows=10"]])
def test_a_stream_must_know_where_to_stop(words: list[str]):
    with pytest.raises(ConfigError, match="streaming needs to know when to stop"):
        compose(["dataset=own", "dataset.path=org/name", "dataset.streaming=true", *words])


def test_rows_are_on_disk_and_made_once(jsonl):
    config = own(jsonl([{"prompt": f"q{n}", "completion": "a"} for n in range(9)]))
    first, second = dataset.load_rows(config), dataset.load_rows(config)
    assert first.train.cache_files == second.train.cache_files != []
    assert dataset.fingerprint(first.train) == dataset.fingerprint(second.train)
    other_split = dataset.load_rows(config.model_copy(update={"split_seed": 1, "name": "other"}))
    assert other_split.train.cache_files == first.train.cache_files
    assert dataset.fingerprint(other_split.train) != dataset.fingerprint(first.train)


def test_rows_are_shuffled_and_split_as_datasets_does_it():
    rows = Dataset.from_list([{"n": number} for number in range(50)])
    shuffled = dataset.order(50, 7)
    assert shuffled == rows.shuffle(seed=7)["n"][:]
    parts = rows.train_test_split(test_size=5, seed=7)
    assert (shuffled[:5], shuffled[5:]) == (parts["test"]["n"][:], parts["train"]["n"][:])
