"""Rows are recognized as what they are, or refused with the words that say how to read them."""

import copy
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from helpers.rows import composed
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.config.sections.dataset import UnrelatedConfig
from qlora_exp.config.sections.mixture import MixtureConfig
from qlora_exp.data import label_audit, tokenization
from qlora_exp.data.end_of_turn import end_of_turn
from qlora_exp.data.prompts import chat_template
from qlora_exp.data.reading.recognize import recognize, recognized, recognized_each
from qlora_exp.data.rows import load_rows
from qlora_exp.tracking.run_key import digests
from qlora_exp.utils.errors import ConfigError, DataError

OWN = {
    "name": "own",
    "format": "auto",
    "prompt_column": "prompt",
    "input_column": None,
    "completion_column": "completion",
}
"""What conf/dataset/own.yaml says."""
USER, ANSWER = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}
HUMAN, GPT = {"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "5"}
SCHEMA = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
CALLED, RESULT = {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "5"}


def own(path: str = "rows.jsonl", **more: Any) -> Config:
    return composed("model=tiny_llama").model_copy(update={"dataset": MixtureConfig(path=path, **(OWN | more))})


def settings(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    numbered = [(f"line {number}", row) for number, row in enumerate(rows, 1)]
    return recognize(numbered, own(**more).dataset, "rows.jsonl").settings


# Files from the wild: what is learned of their first row


def lines(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(file)


def openai(folder: Path) -> str:
    turns = [USER, CALLED | {"weight": 0}, RESULT, ANSWER | {"weight": 1}]
    return lines(folder / "a.jsonl", [{"messages": turns, "tools": SCHEMA, "parallel_tool_calls": False}] * 2)


def sharegpt(folder: Path) -> str:
    file = folder / "a.json"
    file.write_text(json.dumps([{"id": f"n{n}", "conversations": [HUMAN, GPT]} for n in range(2)], indent=1))
    return str(file)


def alpaca_with_history(folder: Path) -> str:
    row = {"instruction": "And 1 more?", "input": "", "output": "6", "system": "Add.", "history": [["2+3?", "5"]]}
    return lines(folder / "a.jsonl", [row] * 2)


def axolotl(folder: Path) -> str:
    return lines(folder / "a.jsonl", [{"system": "Add.", "conversations": [HUMAN, GPT | {"weight": 1}]}] * 2)


def trl(folder: Path) -> str:
    return lines(folder / "a.jsonl", [{"prompt": [USER], "completion": [ANSWER]}] * 2)


def trl_with_calls(folder: Path) -> str:
    earlier = [USER, ANSWER | {"content": "4"}, USER]
    return lines(folder / "a.jsonl", [{"prompt": earlier, "completion": [CALLED, RESULT, ANSWER], "tools": SCHEMA}] * 2)


def pairs(folder: Path) -> str:
    return lines(folder / "a.jsonl", [{"prompt": "2+3=", "completion": "5", "id": 1}] * 2)


def questions_of_excel(folder: Path) -> str:
    file = folder / "a.csv"
    file.write_text('Question;Answer;Topic\r\n"2+3; or 5?";05;"sums"\r\nb;c;d\r\n', "utf-8-sig")
    return str(file)


def parquet_with_json(folder: Path) -> str:
    pq.write_table(pa.table({"id": [1, 2], "chat": [json.dumps([USER, ANSWER])] * 2}), folder / "a.parquet")
    return str(folder / "a.parquet")


def compressed_text(folder: Path) -> str:
    (folder / "a.jsonl.zst").write_bytes(pa.compress(b'{"text": "2+3=5"}\n"more"\n', "zstd", asbytes=True))
    return str(folder / "a.jsonl.zst")


def saved_to_disk(folder: Path) -> str:
    Dataset.from_dict({"question": ["2+3?"] * 2, "answer": [5] * 2}).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def ultrachat(folder: Path) -> str:
    rows = [{"prompt": "2+3?", "prompt_id": "x", "messages": [USER, ANSWER, USER, {**ANSWER, "content": "Still 5"}]}]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows * 2)).encode()))
    return str(folder / "a.jsonl.gz")


def guanaco(folder: Path) -> str:
    return lines(folder / "a.jsonl", [{"text": "### Human: 2+3?### Assistant: 5"}] * 2)


def xlam(folder: Path) -> str:
    tools = [{"name": "add", "description": "", "parameters": {"a": {"type": "int"}}}]
    calls = [{"name": "add", "arguments": {"a": 2, "b": 3}}]
    row = {"id": 0, "query": "2+3?", "answers": json.dumps(calls), "tools": json.dumps(tools)}
    return lines(folder / "a.jsonl", [row] * 2)


def preferences(folder: Path) -> str:
    row = {"prompt": "2+3?", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "6"}], "score": 0.1}
    return lines(folder / "a.jsonl", [row] * 2)


TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURN = "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nAdd.<|im_end|>\n"
CALLED_TEXT = '<call>{"name": "add", "arguments": {"a": 2, "b": 3}}</call>'
CHAT = {"format": "chat", "messages_column": "messages"}
WILD: list[tuple[Any, dict[str, Any], str]] = [
    (
        openai,
        CHAT,
        f"{json.dumps(SCHEMA)}\n{TURN}{CALLED_TEXT}<|im_end|>\n"
        "<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n[[5<|im_end|>\n]]",
    ),
    (sharegpt, CHAT | {"messages_column": "conversations"}, f"{TURN}[[5<|im_end|>\n]]"),
    (
        alpaca_with_history,
        {
            "format": "chat",
            "prompt_column": "instruction",
            "completion_column": "output",
            "input_column": "input",
            "history_column": "history",
            "system_column": "system",
        },
        f"{SYSTEM}{TURN}5<|im_end|>\n<|im_start|>user\nAnd 1 more?<|im_end|>\n<|im_start|>assistant\n[[6<|im_end|>\n]]",
    ),
    (
        axolotl,
        {"format": "chat", "messages_column": "conversations", "system_column": "system"},
        f"{SYSTEM}{TURN}[[5<|im_end|>\n]]",
    ),
    (trl, {"format": "chat"}, f"{TURN}[[5<|im_end|>\n]]"),
    (
        trl_with_calls,
        {"format": "chat"},
        f"{json.dumps(SCHEMA)}\n{TURN}4<|im_end|>\n{TURN}[[{CALLED_TEXT}<|im_end|>\n]]"
        "<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n[[5<|im_end|>\n]]",
    ),
    (pairs, {"format": "prompt_completion"}, "2+3=[[5<|im_end|>]]"),
    (
        questions_of_excel,
        {"format": "prompt_completion", "prompt_column": "Question", "completion_column": "Answer"},
        "2+3; or 5?[[05<|im_end|>]]",
    ),
    (parquet_with_json, CHAT | {"messages_column": "chat"}, f"{TURN}[[5<|im_end|>\n]]"),
    (compressed_text, {"format": "text"}, "[[2+3=5<|im_end|>]]"),
    (
        saved_to_disk,
        {"format": "prompt_completion", "prompt_column": "question", "completion_column": "answer"},
        "2+3?[[5<|im_end|>]]",
    ),
    (ultrachat, CHAT, f"{TURN}5<|im_end|>\n{TURN}[[Still 5<|im_end|>\n]]"),
    (guanaco, {"format": "text"}, "[[### Human: 2+3?### Assistant: 5<|im_end|>]]"),
    (
        xlam,
        {"format": "chat", "prompt_column": "query", "completion_column": "answers"},
        '[{"name": "add", "description": "", "parameters": {"a": {"type": "int"}}}]\n'
        f"{TURN}[[{CALLED_TEXT}<|im_end|>\n]]",
    ),
    (preferences, CHAT | {"messages_column": "chosen"}, f"{TURN}[[5<|im_end|>\n]]"),
]


@pytest.mark.parametrize(("write", "chosen", "learned"), WILD, ids=lambda value: getattr(value, "__name__", ""))
def test_file_from_the_wild_is_recognized_and_audited(write, chosen, learned, tmp_path, tiny_tokenizer, caplog):
    caplog.set_level(logging.INFO)
    asked = own(write(tmp_path), eval_size=1, drop_duplicates=False, drop_leaks="none")
    config = recognized(asked)
    assert config.dataset == MixtureConfig.model_validate(asked.dataset.model_dump() | chosen)
    (line,) = [line for line in caplog.messages if "recognized" in line]
    assert all(f"dataset.{key}={value}" in line for key, value in chosen.items())
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    rows = load_rows(config.dataset)
    row = min([*rows.train, *rows.heldout], key=lambda row: row["place"])
    tokens = Dataset.from_list([tokenization.encoder(config, tokenizer)(row)])
    end = end_of_turn(tokenizer, chat_template(config.dataset, tokenizer))
    assert label_audit.audit(tokens, 1000, tokenizer, end).sample == learned


# Choices


PAIR = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"instruction": "i", "input": "", "output": "o", "text": "all"},
            {"format": "alpaca", "input_column": "input"},
        ),
        ({"instruction": "i", "output": "o"}, {"format": "alpaca", "input_column": None}),
        ({"instruction": "i", "input": "", "output": "o", "prompt": "all"}, {"prompt_column": "instruction"}),
        ({"instruction": "i", "input": "", "output": "o", "history": [], "system": ""}, {"format": "alpaca"}),
        (
            {"instruction": "i", "context": "c", "response": "r"},
            {"format": "prompt_completion", "input_column": "context"},
        ),
        ({"instruction": "i", "context": "", "response": "r"}, {"input_column": "context"}),  # later rows may have one
        ({"input": "i", "output": "o"}, {"prompt_column": "input", "input_column": None}),
        ({"question": "q", "answer": 3, "system_prompt": "s"}, {"format": "chat", "system_column": "system_prompt"}),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            {"format": "prompt_completion", "completion_column": "chosen"},
        ),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
            {"format": "chat", "completion_column": "chosen"},
        ),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, {"messages_column": "chosen"}),
        ({"prompt": json.dumps([USER]), "completion": "c"}, {"format": "chat", "prompt_column": "prompt"}),
        ({"messages": [USER, ANSWER], "prompt": "p", "completion": None}, {"messages_column": "messages"}),
        ({"content": "text"}, {"format": "text", "text_column": "content"}),
        ({"title": "t", "text": "x", "url": "u"}, {"text_column": "text"}),
    ],
)
def test_columns_are_recognized_by_their_names_and_values(row: dict, expected: dict):
    assert expected.items() <= settings(row).items()


KNOWN = {
    "messages": {"messages": [USER, ANSWER], "tools": SCHEMA},
    "ShareGPT": {"conversations": [HUMAN, GPT], "system": "s"},
    "Alpaca": {"instruction": "i", "input": "x", "output": "o"},
    "pairs": {"question": "q", "answer": "a"},
    "preferences": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "text": {"text": "t"},
}
OTHERS = st.dictionaries(
    st.text("xyz_", min_size=1, max_size=4), st.sampled_from(["words", 3, 0.5, None, "", True, ["a"], {"k": 1}, b"\0"])
)


@given(name=st.sampled_from([*KNOWN]), others=OTHERS, data=st.data())
@hypothesis_settings(max_examples=60, deadline=None)
def test_other_columns_and_their_order_change_nothing(name: str, others: dict, data: st.DataObject):
    row = KNOWN[name] | others
    shuffled = dict(data.draw(st.permutations([*row.items()])))
    upper = {key.upper() if key in KNOWN[name] and key != "tools" else key: value for key, value in row.items()}
    expected = settings(KNOWN[name])
    assert settings(row, shuffled) == settings(shuffled) == expected
    assert {str(value).casefold() for value in settings(upper).values()} == {
        str(v).casefold() for v in expected.values()
    }


@pytest.mark.parametrize(
    ("more", "row", "expected"),
    [
        ({"prompt_column": "a", "completion_column": "b"}, {"a": "1", "b": "2", "messages": [USER, ANSWER]}, "a b"),
        ({"completion_column": "solution"}, {"question": "q", "solution": "s", "answer": "a"}, "question solution"),
        ({"prompt_template": "{a} {question}"}, {"a": "1", "question": "2", "answer": "3"}, "answer"),
        ({"messages_column": "b"}, {"a": [USER, ANSWER], "b": [USER, ANSWER]}, "b"),
        ({"text_column": "prompt"}, PAIR, "prompt"),
        ({"system_message": "Be kind."}, PAIR, "chat"),
        ({"system_column": "who"}, PAIR | {"who": "me"}, "who"),
    ],
)
def test_what_the_user_names_is_kept(more: dict, row: dict, expected: str):
    assert {*expected.split()} <= {*settings(row, **more).values()}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**PAIR, "messages": [USER, ANSWER]}], "line 1 is read by .*completion.*; line 1 is read by .*=messages"),
        (
            [PAIR, {"conversations": [HUMAN, GPT]}],
            "line 1 is read by .*=prompt_completion.*; line 2 is .*=conversations",
        ),
        ([{"question": "q", "answer": "a", "solution": "s"}], "completion_column=answer.*completion_column=solution"),
        ([{"a": [USER, ANSWER], "b": [USER, ANSWER]}], "messages_column=a.*messages_column=b"),
        ([{"Question": "Q", "question": "q", "answer": "a"}], "prompt_column=Question.*prompt_column=question"),
        ([{**PAIR, "label": False}], "line 1: the column label says which answers are good; keep the rows"),
        ([USER], "each row is one message; write the messages of a dialogue into one list"),
        ([{"prompt": "p"}], "there are prompts and no answers"),
        ([{"chosen": "c", "rejected": "r"}], "preferences without prompts"),
        (
            [{"context": "c", "question": "q", "answers": {"text": ["a"]}}],
            r"\(other\): there are prompts and no answers of",
        ),
        ([{"foo": "f", "bar": 3}], r"foo \(text\), bar \(number\): they have other names; set dataset.format"),
        ([], "it has no rows"),
    ],
)
def test_rows_that_fit_no_format_or_several_are_refused(rows: list[dict], message: str):
    with pytest.raises(DataError, match=message):
        settings(*rows)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", " ", "user", "[{", '[{"role": 1}]']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "from", "value"]), inner),
    max_leaves=6,
)
NAMES = st.sampled_from(["prompt", "Completion", "input", "output", "instruction", "messages", "chosen", "rejected"])


@given(rows=st.lists(st.dictionaries(NAMES | st.sampled_from(["text", "label", "history", "tools", ""]), JSON)))
@hypothesis_settings(max_examples=60, deadline=None)
def test_any_rows_are_recognized_or_refused(rows: list[dict]):
    try:
        found = settings(*rows)
    except DataError:
        return
    MixtureConfig.model_validate(OWN | {"path": "rows.jsonl"} | found)
    assert all(
        value in {name for row in rows for name in row} for key, value in found.items() if key != "format" and value
    )


def test_files_of_a_folder_must_have_one_format(tmp_path):
    lines(tmp_path / "a.jsonl", [PAIR] * 3)
    lines(tmp_path / "b.jsonl", [{"messages": [USER, ANSWER]}] * 3)
    with pytest.raises(DataError, match=r"a.jsonl, line 1 is read by .*; .*b.jsonl, line 1 is read by"):
        recognized(own(str(tmp_path)))


# Where it is settled


def test_recognized_run_is_the_run_with_the_same_keys(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = sharegpt(tmp_path)
    explicit = own(path, format="chat", messages_column="conversations")
    first, second, third = recognized_each([own(path), own(path), explicit])
    assert first == second == third == explicit
    assert digests(first) == digests(explicit)
    assert len([line for line in caplog.messages if "recognized" in line]) == 1


def test_unrelated_text_is_recognized_too(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path, keys = sharegpt(tmp_path), {"format": "chat", "messages_column": "conversations"}

    def beside(dataset: Config, **more: Any) -> Config:
        unrelated = {"path": path, "prompt_column": "prompt", "input_column": None, "completion_column": "completion"}
        return dataset.model_copy(update={"unrelated": UnrelatedConfig.model_validate(unrelated | more)})

    explicit = beside(composed("model=tiny_llama"), **keys)
    assert recognized(beside(composed("model=tiny_llama"), format="auto")) == explicit
    assert f"{path}: rows recognized as ShareGPT" in caplog.text
    assert "unrelated.messages_column=conversations" in caplog.text
    both = beside(own(path), format="auto")
    settled = recognized(both)
    assert digests(settled) == digests(beside(own(path, **keys), **keys))
    assert recognized(settled) is settled
    with pytest.raises(DataError, match=r"unrelated\.format=auto recognizes no format"):
        recognized(beside(both, format="auto", path=lines(tmp_path / "b.jsonl", [{"prompt": "p"}])))
    with pytest.raises(ConfigError, match=r"unrelated\.text_column"):
        recognized(beside(both, format="auto", text_column="mine", messages_column="conversations"))


def test_key_that_does_not_go_with_the_rows_is_refused(tmp_path):
    config = own(pairs(tmp_path))
    training = config.training.model_copy(update={"assistant_only_loss": True})
    with pytest.raises(ConfigError, match=r"assistant_only_loss needs dataset.format=chat.*; own: rows recognized as"):
        recognized(config.model_copy(update={"training": training}))
    with pytest.raises(ConfigError, match="dataset.prompt_column=q would change nothing: messages_column has it all"):
        recognized(own(sharegpt(tmp_path), messages_column="conversations", prompt_column="q"))


def test_named_column_that_no_row_has_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"dataset.messages_column: .* has no column 'conversation'; did you mean"):
        recognized(own(sharegpt(tmp_path), messages_column="conversation"))


def test_messages_about_a_source_name_its_keys(tmp_path, caplog):
    def mixed(format_, **keys):
        source = {"path": str(sharegpt(tmp_path)), "format": "auto", **keys}
        return own("none", format=format_, sources={"a": source})

    with caplog.at_level("INFO"):
        recognized(mixed("chat"))
    assert "dataset.sources.a.format=chat dataset.sources.a.messages_column=conversations" in caplog.text
    with pytest.raises(ConfigError, match=r"dataset.format=text is how .* no source has this format"):
        recognized(mixed("text"))
    with pytest.raises(DataError, match=r"dataset.sources.a.path: no file missing.jsonl"):
        recognized(mixed("chat", path="missing.jsonl"))


def test_row_of_another_shape_is_named_with_its_place(tmp_path):
    rows = [{"messages": [USER, ANSWER | {"content": str(n)}]} for n in range(1100)]
    path = lines(tmp_path / "a.jsonl", [*rows, {"comment": "none"}])
    report = load_rows(recognized(own(path, drop_leaks="none")).dataset).report
    assert report.examples["without the columns"] == "line 1101, which has comment and no messages"
    path = lines(tmp_path / "b.jsonl", [*rows, {"messages": [{"role": "human", "content": "x"}]}])
    with pytest.raises(DataError, match="line 1101: messages.0.: unknown role 'human'; did you mean 'user'"):
        load_rows(recognized(own(path)).dataset)


def test_each_source_of_a_mixture_is_recognized(write_jsonl):
    dialogue = {"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]}
    kinds = {
        "said": ("chat", dialogue),
        "plain": ("text", {"text": "2+3=5"}),
        "pairs": ("alpaca", {"instruction": "2+3?", "input": "", "output": "5"}),
    }
    paths = {name: write_jsonl([row, row], f"{name}.jsonl") for name, (_, row) in kinds.items()}

    def mixed(*names: str, **keys: str):
        words = [f"dataset.sources.{name}.path={paths[name]}" for name in names]
        return compose(["dataset=own", *words, *(f"dataset.{key}={value}" for key, value in keys.items())])

    settled = recognized(mixed("said", "plain")).dataset
    assert {name: part.format for name, part in settled.parts.items()} == {"plain": "text", "said": "chat"}
    assert settled.format == "chat"  # plain text has no prompt
    assert recognized(mixed("plain")).dataset.format == "text"
    with pytest.raises(ConfigError, match="several formats, alpaca and chat; add dataset.sources.pairs.format=auto"):
        recognized(mixed("pairs", "said"))
    auto = {f"sources.{name}.format": "auto" for name in ("pairs", "said")}
    assert recognized(mixed("pairs", "said", format="alpaca", **auto)).dataset.format == "alpaca"
