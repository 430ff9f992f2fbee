"""What is learned is what the row says; what is left out or changed is counted."""

import datetime
import json
import logging
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.rows import ROWS, own_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data import cleaning
from qlora_exp.data.cleaning import clean
from qlora_exp.data.reading import pieces, sources
from qlora_exp.data.report import Report
from qlora_exp.data.rows import load_rows
from qlora_exp.utils.errors import DataError


def cleaned(path: str, **more) -> tuple[list[dict], Report]:
    config = own_dataset(path, **more)
    rows, report = clean(sources.read(config, path, "train"), config, path)
    return list(rows), report


CHAT = {"format": "chat", "messages_column": "messages"}


@pytest.mark.parametrize(
    ("value", "learned"),
    [
        ('"2024-07-16"', "2024-07-16"),
        ('" 2024-07-16T12:00:00+02:00\\n"', " 2024-07-16T12:00:00+02:00\n"),
        ("3", "3"),
        ("4.50", "4.50"),
        ("true", "true"),
        ('{"item": "pipe", "price": 2.5, "ok": true}', '{"item": "pipe", "price": 2.5, "ok": true}'),
        ('["red", "blue"]', '["red", "blue"]'),
        ('"NA"', "NA"),
    ],
)
def test_answer_is_learned_as_it_is_written(value: str, learned: str, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"prompt": "a", "completion": {value}}}\n{{"prompt": "b", "completion": 4.5}}\n')
    rows, report = cleaned(str(file))
    assert [row["completion"] for row in rows] == [learned, "4.5"]
    assert report.notes == {"completion is not text and is learned as JSON": 1 if value.startswith('"') else 2}


def test_context_keeps_its_blanks(write_jsonl):
    path = write_jsonl([{"prompt": "", "input": " code\n", "completion": "a"}, {"prompt": "p", "input": " "}])
    rows, _ = cleaned(path, input_column="input")
    assert [(row["prompt"], row["input"]) for row in rows] == [("", " code\n")]


@pytest.mark.parametrize("value", [datetime.datetime(2024, 7, 16), datetime.date(2024, 7, 16), b"x", float("nan")])
def test_parquet_value_without_a_written_form_is_rejected(value, tmp_path):
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": [None, value]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet, row 2: column 'completion': .* write it as text"):
        cleaned(str(tmp_path / "rows.parquet"))


def test_half_a_surrogate_pair_is_rejected(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "\\ud800"}')
    with pytest.raises(DataError, match="line 1: half of a surrogate pair"):
        cleaned(str(tmp_path / "rows.jsonl"))


# Left out


def test_rows_with_other_answers_are_no_duplicates(write_jsonl):
    rows = [{"prompt": f"p{n % 3}", "completion": f"a{n % 6}"} for n in range(12)]
    path = write_jsonl(rows)
    assert len(cleaned(path)[0]) == 6
    assert len(cleaned(path, drop_duplicates=True)[0]) == 3
    assert len(cleaned(path, drop_duplicates=False)[0]) == 12
    _, report = cleaned(path)
    ((level, line),) = report.lines("own")
    assert level == logging.WARNING
    assert line.startswith(
        "own: 6 of 12 rows (50%) left out: duplicates (such as line 7; dataset.drop_duplicates=false"
    )


def test_few_rows_left_out_are_no_warning(write_jsonl):
    _, report = cleaned(write_jsonl([*ROWS, {"prompt": "p", "completion": None, "id": 3}]))
    (level, line), (_, unused) = report.lines("own")
    assert (level, "1 of 21 rows (5%) left out: empty (such as line 21" in line) == (logging.INFO, True)
    assert unused == "own: columns that are not used: id"


def test_refusal_names_the_key_that_keeps_rows(write_jsonl):
    one_prompt = write_jsonl([{"prompt": "Write a haiku.", "completion": f"answer {n}"} for n in range(30)])
    with pytest.raises(DataError, match=r"28 leaks \(such as line .*dataset.drop_leaks=none keeps them"):
        load_rows(own_dataset(one_prompt, eval_size=2))
    assert len(load_rows(own_dataset(one_prompt, eval_size=2, drop_leaks="none")).train) == 28
    same = write_jsonl([ROWS[0]] * 5, "same.jsonl")
    with pytest.raises(DataError, match=r"4 duplicates \(such as line 2; dataset.drop_duplicates=false"):
        load_rows(own_dataset(same))


def test_rows_of_another_shape_are_counted(write_jsonl):
    other = [{"question": "q", "answer": "a"}] * 4
    rows, report = cleaned(write_jsonl([*ROWS, *other]))
    assert (len(rows), report.dropped["without the columns"]) == (20, 4)
    assert "such as line 21, which has question, answer and no prompt" in report.lines("own")[0][1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"version": 1, "data": [{"prompt": "a", "completion": "b"}]}',
            "If 'data' is the list of rows, write that list",
        ),
        ('{"prompt": "a", " completion": "b"}', "did you mean ' completion'"),
        (
            '{"conversations": [{"from": "human", "value": "a"}]}',
            "dataset.format=chat dataset.messages_column=conversations",
        ),
        (
            '{"instruction": "a", "input": "", "output": "b"}',
            "dataset.format=alpaca and the columns instruction, input",
        ),
        ('{"question": "a", "answer": "b"}', "dataset.prompt_column=question dataset.completion_column=answer?"),
        ('{"text": "a"}', "dataset.format=text"),
        ("[]", "it has no rows"),
    ],
)
def test_hint_at_missing_column(content: str, message: str, tmp_path):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=message):
        cleaned(str(tmp_path / "rows.json"))


# Dialogues

USER, ANSWER = {"role": "user", "content": "2024-01-08"}, {"role": "assistant", "content": "hi"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"default": None, "multipleOf": 0.01}}}]


def test_dialogue_and_tools_are_kept_whole(write_jsonl):
    first, second = [USER, CALL], [USER, CALL, {"role": "tool", "tool_call_id": "c", "content": "x"}, ANSWER, USER]
    rows, report = cleaned(write_jsonl([{"tools": TOOLS, "messages": first}, {"messages": second}]), **CHAT)
    assert [row["messages"] for row in rows] == [first, second[:-1]]
    assert [row["tools"] for row in rows] == [TOOLS, None]
    assert '"name": "f"' in rows[0]["completion"]
    assert report.notes == {"the turns after the last answer are not learned": 1}


def test_row_ends_with_its_last_answer_to_learn(write_jsonl):
    silent = ANSWER | {"weight": 0}
    path = write_jsonl([{"messages": turns} for turns in ([USER, silent, USER, ANSWER, USER, silent], [USER, silent])])
    (row,), report = cleaned(path, **CHAT)
    assert row["messages"] == [USER, ANSWER | {"train": False}, USER, ANSWER]
    assert report.dropped["empty"] == 1
    assert report.notes == {
        "the turns after the last answer are not learned": 1,
        "answers with weight 0 or train false are not learned": 2,
    }


def test_system_message_and_earlier_turns_may_have_columns(write_jsonl):
    system, turns = {"role": "system", "content": "Be kind."}, [USER, ANSWER]
    more = {"sys": "Be kind.", "old": [[USER["content"], ANSWER["content"]]]}
    path = write_jsonl(
        [{"prompt": "q", "completion": "a", "input": "more", **more}, {"prompt": "q", "completion": "b"}]
    )
    columns = {"format": "chat", "system_column": "sys", "history_column": "old", "input_column": "input"}
    (first, second), _ = cleaned(path, **columns)
    asked = {"role": "user", "content": "q\n\nmore"}
    assert first["messages"] == [system, *turns, asked, {"role": "assistant", "content": "a"}]
    assert (second["messages"], second["prompt"]) == (None, "q")
    whole = write_jsonl([{"messages": turns, **more}, {"messages": [system, *turns], "sys": "x"}], "whole.jsonl")
    with pytest.raises(DataError, match="line 2: the messages have a system message, which must be the first"):
        cleaned(whole, **CHAT, system_column="sys")
    (first, _), _ = cleaned(whole, **CHAT, history_column="old")
    assert first["messages"] == turns * 2
    silent = write_jsonl([{"prompt": "q", "completion": [ANSWER | {"weight": 0}], **more}], "silent.jsonl")
    read, report = cleaned(silent, **columns | {"input_column": None})
    assert (read, report.dropped["empty"]) == ([], 1)  # the answer before it is not learned instead
    assert report.notes == {"answers with weight 0 or train false are not learned": 1}


def test_own_system_message_is_noted_if_the_config_has_one(write_jsonl):
    path = write_jsonl([{"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}])
    assert cleaned(path, **CHAT)[1].notes == {}
    _, report = cleaned(path, **CHAT, system_message="Be kind.")
    assert report.notes == {"dataset.system_message is replaced by the row's own": 1}


def test_dialogue_is_read_from_json_text(tmp_path):
    text = json.dumps([USER, ANSWER]).replace('"', '""')
    (tmp_path / "rows.csv").write_text(f'messages,tools\n"{text}",\n')
    rows, _ = cleaned(str(tmp_path / "rows.csv"), **CHAT)
    assert (rows[0]["messages"], rows[0]["tools"]) == ([USER, ANSWER], None)


def test_parquet_dialogue_has_the_keys_that_its_messages_had(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"messages": [USER, CALL, ANSWER]}]), tmp_path / "rows.parquet")
    rows, _ = cleaned(str(tmp_path / "rows.parquet"), **CHAT)
    assert rows[0]["messages"] == [USER, CALL, ANSWER]


def test_prompt_and_completion_may_be_messages(write_jsonl):
    path = write_jsonl([{"prompt": [USER], "completion": [ANSWER]}, {"prompt": [USER], "completion": "yes"}])
    rows, _ = cleaned(path, format="chat")
    assert [row["messages"] for row in rows] == [[USER, ANSWER], [USER, {"role": "assistant", "content": "yes"}]]
    with pytest.raises(DataError, match="column 'prompt' is a list of messages, which needs dataset.format=chat"):
        cleaned(path)
    for place, wrong in enumerate(([USER, ANSWER], [ANSWER, {"role": "system", "content": "s"}, ANSWER])):
        path = write_jsonl([{"prompt": [USER], "completion": wrong}], f"{place}.jsonl")
        with pytest.raises(DataError, match="line 1: column 'completion' must begin with a message of the assistant"):
            cleaned(path, format="chat")


def test_all_answers_of_a_completion_of_several_messages_are_learned(write_jsonl):
    result, learned = {"role": "tool", "tool_call_id": "c", "content": "x"}, {"train": True}
    silent = ANSWER | {"weight": 0}
    path = write_jsonl(
        [
            {"prompt": [USER, ANSWER, USER], "completion": [CALL, result, ANSWER, USER], "tools": TOOLS},
            {"prompt": "q", "completion": [silent, USER, ANSWER]},
            {"prompt": "q", "completion": [silent, USER, silent]},
        ]
    )
    rows, report = cleaned(path, format="chat")
    asked = {"role": "user", "content": "q"}
    assert [row["messages"] for row in rows] == [
        [USER, ANSWER, USER, CALL | learned, result, ANSWER | learned],
        [asked, ANSWER | {"train": False}, USER, ANSWER | learned],
    ]
    assert [row["completion"] for row in rows] == ["hi", "hi"]
    assert report.dropped["empty"] == 1
    assert report.notes == {
        "all answers of a completion of several messages are learned": 3,
        "answers with weight 0 or train false are not learned": 2,
        "the turns after the last answer are not learned": 1,
    }
    _, report = cleaned(path, format="chat", drop_matching='"name": "f"')
    assert report.dropped["matching drop_matching"] == 1


def test_dialogue_without_answer_or_with_empty_message_is_left_out(write_jsonl):
    nothing = {"role": "user", "content": None}
    path = write_jsonl([{"messages": turns} for turns in ([USER], None, [nothing, ANSWER], [USER, ANSWER])])
    rows, report = cleaned(path, **CHAT)
    assert (len(rows), report.dropped["empty"]) == (1, 3)


def test_dialogues_are_no_duplicates_if_tools_differ(write_jsonl):
    path = write_jsonl([{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], "tools": TOOLS}] * 2)
    rows, report = cleaned(path, **CHAT)
    assert (len(rows), report.dropped["duplicates"]) == (2, 2)
    config = DatasetConfig(path=path, eval_path=path, drop_leaks="none", **CHAT)
    assert [leak.kind for leak in load_rows(config).leaks] == ["exact", "exact"]


@pytest.mark.parametrize("form", ["prompt_completion", "chat"])
def test_prompt_template_takes_the_values_of_its_columns(form: str, write_jsonl):
    rows = [
        {"q": "Why {a}?", "context": "  Because.", "completion": "x", "n": 1.50},
        {"q": "", "context": " ", "completion": "nothing is asked", "n": ""},
        {"q": "Who?", "context": None, "completion": "y", "n": [1]},
    ]
    read, report = cleaned(write_jsonl(rows), prompt_template="{context}\nQ{{{n}}}: {q}\nA:", format=form)
    assert [row["prompt"] for row in read] == ["  Because.\nQ{1.5}: Why {a}?\nA:", "\nQ{[1]}: Who?\nA:"]
    assert [row["completion"] for row in read] == ["x", "y"]
    assert (report.dropped["empty"], report.unused) == (1, [])
    with pytest.raises(DataError, match="no column 'question'; it has q, context"):
        cleaned(write_jsonl(rows), prompt_template="{question}")
    with pytest.raises(DataError, match=r"no column 'input' \(dataset.input_column\).* set dataset.input_column=null"):
        cleaned(write_jsonl(rows), prompt_column="q", input_column="input", format="prompt_completion")
    with pytest.raises(DataError, match="column 'q' is a list of messages, which needs"):
        cleaned(write_jsonl([{"q": [{"role": "user", "content": "a"}], "completion": "x"}]), prompt_template="{q}")


TEXTS = st.sampled_from(["same", "", " ", "[", "{", "\n", "\ufeff"])
VALUES = st.one_of(st.text(max_size=5), TEXTS, st.integers(), st.none())
LINES = st.builds(
    lambda prompt, completion, indent: json.dumps({"prompt": prompt, "completion": completion}, indent=indent),
    VALUES,
    VALUES,
    st.sampled_from([None, None, None, 1]),
)
PAIR = '{"prompt": "p", "completion": "c"}'
ODD = ["", "[", "]", '{"prompt": "p"}', f"[{PAIR}]", "{", '"text"', "\x85", PAIR.replace("p", "\\ud800")]


@given(
    lines=st.lists(st.one_of(LINES, LINES, LINES, st.sampled_from(ODD)), max_size=12),
    end=st.sampled_from(["\n", "\r\n", "\n\n", " "]),
    damaged=st.booleans(),
)
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_of_a_file_are_read_as_the_whole_file_is(lines: list[str], end: str, damaged: bool, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(end.join(lines).encode() + b"\xff" * damaged)

    def outcome() -> tuple:
        with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patched:
            patched.setenv("QLORA_EXP_CACHE", cache)
            try:
                rows, report = cleaned(str(file))
            except DataError as error:
                return (str(error),)
            return rows, report

    whole = outcome()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cleaning, "forks", lambda *_: 2)
        patched.setattr(cleaning, "in_order", lambda function, items, _: map(function, items))
        patched.setattr(pieces, "_PIECE", 20)
        assert outcome() == whole


def test_processes_clean_alike(write_jsonl, monkeypatch, tmp_path):
    rows = [{"prompt": f"p{n % 70}", "completion": n % 7 and "c"} for n in range(100)]
    path = write_jsonl(rows)
    whole = cleaned(path)
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cleaning, "forks", lambda *_: 2)
    monkeypatch.setattr(pieces, "_PIECE", 300)
    assert cleaned(path) == whole
    assert {reason: count for reason, count in whole[1].dropped.items() if count} == {"duplicates": 30}
