import datetime

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from helpers.rows import ROWS, own_dataset

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.dataset import DatasetConfig, UnrelatedConfig
from qlora_exp.config.sections.mixture import MixtureConfig
from qlora_exp.data.reading import sources
from qlora_exp.data.rows import fingerprint, load_heldout, load_rows
from qlora_exp.utils.errors import DataError


def test_builtin_faq_has_its_rows():
    rows = load_rows(compose().dataset)
    assert len(rows.train) + len(rows.heldout) == 435
    assert not any("Zaragoza" in row["completion"] for row in rows.train)
    # Records of earlier versions have these fingerprints.
    assert (fingerprint(rows.train), fingerprint(rows.heldout)) == ("0aaa29b24165452d", "e5c76b2b5f706fc5")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_own_file_of_each_kind_is_read(kind: str, tmp_path):
    file = tmp_path / f"rows.{kind}"
    table = Dataset.from_list(ROWS)
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](file)
    rows = load_rows(own_dataset(str(file)))
    assert sorted(row["completion"] for part in (rows.train, rows.heldout) for row in part) == sorted(
        row["completion"] for row in ROWS
    )


@pytest.mark.slow
def test_reasoning_gym_scores_its_reference_answers_as_right():
    config = compose(["dataset=reasoning_gym", "dataset.reasoning_gym_size=20"]).dataset
    rows, score = load_rows(config), sources.scorer(config)
    assert all(score(row["completion"], row) == 1.0 for row in rows.heldout)
    assert score("certainly not a number", rows.heldout[0]) < 1.0


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
        ({"path": "someone/not-a-dataset"}, "cannot be fetched from the hub"),
    ],
)
def test_unreadable_source_is_rejected_with_its_reason(changes: dict, message: str, write_jsonl):
    with pytest.raises(DataError, match=message):
        load_rows(own_dataset(**({"path": write_jsonl(ROWS)} | changes)))


def test_empty_file_is_rejected(tmp_path):
    (tmp_path / "rows.csv").write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        load_rows(own_dataset(str(tmp_path / "rows.csv")))


def test_damaged_file_is_rejected(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion"')
    with pytest.raises(DataError, match="cannot be read as json"):
        load_rows(own_dataset(str(tmp_path / "rows.jsonl")))


def test_stream_is_read_no_further_than_needed(monkeypatch):
    read = []

    def rows():
        for number in range(10**9):
            read.append(number)
            yield {"prompt": f"q{number}", "completion": "a"}

    def load(*_arguments, streaming: bool, **_options):
        assert streaming
        return IterableDataset.from_generator(rows)

    monkeypatch.setattr(sources, "load_dataset", load)
    found = load_rows(own_dataset("org/name", streaming=True, max_train_rows=6, eval_size=2))
    assert (len(found.train), len(found.heldout)) == (6, 2)
    assert len(read) <= 13


def test_beginning_of_a_file_is_read_no_further_than_needed(write_jsonl, monkeypatch):
    path = write_jsonl([{"prompt": f"q{number}", "completion": "a"} for number in range(1000)])
    read, source = [], sources.read(own_dataset(path, streaming=True, max_train_rows=6, eval_size=2), path, "train")
    read = [row["prompt"] for _, row in source.rows(["prompt"])]
    assert read == [f"q{number}" for number in range(12)]
    whole = sources.read(own_dataset(path), path, "train")
    assert len(list(whole.rows(["prompt"]))) == 1000
    assert whole.key != source.key


def test_rows_of_several_files_have_the_place_in_theirs(tmp_path):
    (tmp_path / "b.csv").write_text("prompt;completion\nq2;a2")
    (tmp_path / "a.jsonl").write_text('{"prompt": "q1", "completion": "a1", "more": 1}')
    source = sources.read(own_dataset(str(tmp_path)), str(tmp_path), "train")
    assert source.columns == ["prompt", "completion", "more"]
    assert [(place, row["prompt"]) for place, row in source.rows(source.columns)] == [
        (f"{tmp_path}/a.jsonl, line 1", "q1"),
        (f"{tmp_path}/b.csv, line 2", "q2"),
    ]


def test_files_with_and_without_types_are_not_mixed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "a"}')
    Dataset.from_list(ROWS).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="b.parquet has columns with types and .*a.jsonl has not"):
        load_rows(own_dataset(str(tmp_path)))


def test_saved_dataset_is_read_from_its_folder(tmp_path):
    table = Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(tmp_path / "splits")
    one = load_rows(own_dataset(str(tmp_path / "one")))
    assert len(one.train) + len(one.heldout) == len(ROWS)
    splits = own_dataset(str(tmp_path / "splits"), eval_split="test", drop_leaks="none")
    assert splits.has_splits
    assert [len(load_rows(splits).train), len(load_rows(splits).heldout)] == [len(ROWS), 3]
    before = one.train["prompt"]
    for file in (tmp_path / "one").glob("*.arrow"):
        changed = file.read_bytes().replace(b"question", b"QUESTION")
        file.write_bytes(changed)
    assert load_rows(own_dataset(str(tmp_path / "one"))).train["prompt"] == [text.upper() for text in before]
    with pytest.raises(DataError, match="has no split 'dev'; it has train, test"):
        load_rows(own_dataset(str(tmp_path / "splits"), split="dev"))


def test_hub_dataset_is_read_with_its_types(monkeypatch):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    turns = [{"role": "user", "content": "q"}, call, {"role": "assistant", "content": "a"}]
    day = datetime.date(2024, 7, 16)
    hub = Dataset.from_list([{"m": turns, "p": "q", "at": day}, {"m": turns[:2], "p": "q", "at": day}])
    monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: hub)
    rows = load_rows(DatasetConfig(path="org/name", format="chat", messages_column="m", eval_size=1, drop_leaks="none"))
    assert sorted((part[0]["messages"] for part in (rows.train, rows.heldout)), key=len) == [turns[:2], turns]
    assert rows.report.unused == ["p", "at"]
    with pytest.raises(DataError, match="org/name, row 1: column 'at': 2024-07-16 is of the type date"):
        load_rows(own_dataset("org/name", prompt_column="p", completion_column="at"))


WRONG = {"path": "embedded:nothing"}


@pytest.mark.parametrize(
    ("read", "key"),
    [
        (lambda: load_rows(MixtureConfig(**WRONG)), "dataset.path"),
        (lambda: load_rows(MixtureConfig(eval_path="embedded:nothing")), "dataset.eval_path"),
        (lambda: load_rows(MixtureConfig(sources={"a": WRONG})), "dataset.sources.a.path"),
        (
            lambda: load_rows(MixtureConfig(sources={"a": {"path": sources.FAQ, "eval_path": "embedded:nothing"}})),
            "dataset.sources.a.eval_path",
        ),
        (lambda: load_heldout(UnrelatedConfig(**WRONG)), "unrelated.path"),
        (lambda: load_rows(MixtureConfig(), UnrelatedConfig(format="alpaca", **WRONG)), "unrelated.path"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_error_names_the_key_of_its_source(read, key: str):
    with pytest.raises(DataError, match=rf"^{key}: there is no 'embedded:nothing'"):
        read()


@pytest.mark.parametrize(("held_out", "key"), [({"split": "test"}, "split"), ({"eval_split": "test"}, "eval_split")])
def test_error_of_a_split_names_the_key_that_asks_for_it(held_out: dict, key: str, tmp_path):
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    columns = {"prompt_column": "prompt", "input_column": None, "completion_column": "completion"}
    with pytest.raises(DataError, match=rf"^dataset\.{key}: .* has no split 'test'"):
        load_rows(MixtureConfig(path=str(tmp_path / "saved"), format="prompt_completion", **columns, **held_out))
