import json

import pytest

from qlora_exp.data import dialogues
from qlora_exp.utils.errors import DataError

CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"town": "T", "day": None}}}


def messages(value, *, fills_with_null: bool = False) -> list[dict]:
    return dialogues.messages(value, "chat", "rows.jsonl, line 3", fills_with_null)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (
            {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
            {"content": "a b"},
        ),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, {"content": None, "tool_calls": [CALL]}),
        ({"role": "assistant", "tool_calls": [CALL], "name": None}, {"tool_calls": [CALL]}),
        ({"role": "assistant", "content": "a", "tool_calls": []}, {"content": "a"}),
        ({"role": "assistant", "content": "8", "reasoning_content": "r"}, {"content": "8", "reasoning_content": "r"}),
        ({"role": "tool", "content": {"n": 1}, "tool_call_id": "c"}, {"content": '{"n": 1}', "tool_call_id": "c"}),
        ({"role": "user", "content": None}, {"content": None}),
        ({"role": "user", "content": "a", "weight": 0, "train": False}, {"content": "a"}),
        ({"role": "assistant", "content": "a", "weight": 1, "train": None}, {"content": "a"}),
        ({"role": "assistant", "content": "a", "weight": 0.0}, {"content": "a", "train": False}),
        ({"role": "assistant", "content": "a", "train": False}, {"content": "a", "train": False}),
    ],
)
def test_everything_that_a_message_says_is_kept(given: dict, kept: dict):
    expected = [{"role": given["role"], **kept}]
    assert messages([given]) == messages(json.dumps([given])) == expected


def test_messages_of_sharegpt_are_those_of_others():
    call = {"name": "weather", "arguments": {"town": "T", "n": 1.10}}
    given = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q", "weight": 0},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "rain"},
        {"from": "GPT", "value": "a", "weight": 1},
        {"from": "user", "value": 3},
        {"from": "chatgpt", "value": "b", "weight": 0},
    ]
    assert dialogues.is_dialogue(given)
    assert (
        messages(given)
        == messages(json.dumps(given))
        == [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "3"},
            {"role": "assistant", "content": "b", "train": False},
        ]
    )


def test_earlier_turns_are_pairs_or_messages():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for given in ([["q", "a"]], '[["q", "a"]]', turns, json.dumps(turns)):
        assert dialogues.history(given, "history", "line 1", fills_with_null=False) == turns
    assert dialogues.history(None, "h", "", False) == dialogues.history([], "h", "", False) == []
    for wrong in ("q", [["q"]], ["q", "a"], [[{"role": "user"}, {"role": "assistant"}]]):
        with pytest.raises(DataError, match="line 1: history must be"):
            dialogues.history(wrong, "history", "line 1", False)


def test_number_in_json_text_keeps_its_digits():
    assert messages('[{"role": "user", "content": 1.10}]') == [{"role": "user", "content": "1.10"}]


def test_nulls_that_a_column_type_adds_are_left_out():
    given = {"role": "assistant", "content": "a", "tool_calls": [CALL], "name": None}
    arguments = messages([given], fills_with_null=True)[0]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"town": "T"}
    assert messages(json.dumps([given]), fills_with_null=True)[0]["tool_calls"] == [CALL]
    assert dialogues.tools([{"a": {"b": None, "c": 0}}], "", True) == [{"a": {"c": 0}}]
    assert dialogues.tools([{"a": {"b": None}}], "", False) == [{"a": {"b": None}}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [{"role": "Assistant", "content": "a"}],
            r"line 3: chat\[0\]: unknown role 'Assistant'; did you mean 'assistant'",
        ),
        ([{"role": "gpt", "content": "a"}], "unknown role 'gpt'; did you mean 'assistant'"),
        ([{"role": None, "content": "a"}], "unknown role None"),
        ([{"from": "human", "content": "a"}], r"needs role and content \(or from and value\).* no role"),
        ([{"from": "robot", "value": "a"}], "unknown role 'robot'"),
        ([{"from": "function_call", "value": "weather"}], "must be the JSON text of name and arguments"),
        ([{"role": "assistant", "content": "a", "weight": 0.5}], "weight=0.5 must be 0 or 1"),
        ([{"role": "assistant", "content": "a", "train": "no"}], "train='no' must be False or True"),
        ([{"role": "assistant", "content": "a", "train": True, "weight": 0}], "contradict each other"),
        ([{"role": "user", "content": "a", "weight": 1}], "only answers of the assistant are learned; remove weight"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": [{"type": "image", "url": "u"}]}], "'image'.* cannot be learned as text"),
        ([{"role": "user", "content": ["a"]}], "the part a cannot be learned"),
        ([{"role": "user", "content": float("nan")}], "not a finite number"),
        ("[{'role': 'user'}]", "this is no JSON"),
        ("hello", "this is no JSON"),
        ('[{"role": "user", "role": "tool"}]', "the key 'role' occurs twice"),
        (3, "must be a list of messages"),
        (["a"], "must be a list of messages"),
    ],
)
def test_message_that_cannot_be_kept_is_rejected(given, message: str):
    with pytest.raises(DataError, match=message):
        messages(given)


def test_said_includes_calls():
    assert dialogues.said({"role": "user", "content": "a"}) == "a"
    assert "weather" in dialogues.said({"role": "assistant", "content": None, "tool_calls": [CALL]})


def test_arguments_of_calls_are_objects_or_text():
    def called(arguments: object) -> list[dict]:
        return [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        ]

    for arguments in ({"a": "é"}, '{"a": "é"}'):
        assert dialogues.with_arguments(called(arguments), as_objects=True) == called({"a": "é"})
        assert dialogues.with_arguments(called(arguments), as_objects=False) == called('{"a": "é"}')
    for other in ("[1]", "{", '{"a": 1, "a": 2}', None, 3):
        assert (
            dialogues.with_arguments(called(other), True)
            == dialogues.with_arguments(called(other), False)
            == called(other)
        )
    unusual = [
        {"role": "assistant", "tool_calls": value} for value in (None, "x", [None], [{"name": "f"}], [{"function": {}}])
    ]
    assert dialogues.with_arguments(unusual, True) == dialogues.with_arguments(unusual, False) == unusual


def test_list_of_calls_is_told_from_other_lists():
    call = {"name": "f", "arguments": {"a": 1}}
    assert dialogues.calls([call]) == dialogues.calls(json.dumps([call])) == [{"type": "function", "function": call}]
    for other in ("f", "[", "[{", [], "[]", [{"name": "f"}], [call | {"id": 1}], "[1]", None):
        assert dialogues.calls(other) is None


def test_json_text_of_messages_is_a_dialogue():
    turns = [{"role": "user", "content": "q"}]
    assert dialogues.parsed(turns) == dialogues.parsed(f" {json.dumps(turns)}") == turns
    for other in ("q", "[", "[{", '[{"a": 1}]', [], {}, None):
        assert dialogues.parsed(other) is None
