"""Read dialogues from a row: lists of messages with everything that a chat template may render, and tools.

What a message says is kept or refused by name. Does not depend on templates: `data.template_checks` does.
"""

import json
import re
from typing import Any

from qlora_exp.data.values import DECODER, as_text
from qlora_exp.utils.errors import DataError, did_you_mean

_LONGEST_LEFT_OUT = 10_000
"""Most characters that a template may put before an answer for being the last."""

Message = dict[str, Any]

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool", "function", "ipython", "observation")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
_SHAREGPT = {**_OTHER_NAMES, "chatgpt": "assistant", "function_call": "assistant", "observation": "tool"}
"""Roles of ShareGPT's messages (`from`) that have another name here."""
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
_WEIGHTS: dict[str, tuple[Any, Any]] = {"weight": (0, 1), "train": (False, True)}
"""Keys that say whether an answer is learned: OpenAI's and Axolotl's."""


def is_dialogue(value: Any) -> bool:
    """Return whether a value is a list of messages."""
    return is_rows(value) and all("role" in item or _is_sharegpt(item) for item in value)


def _is_sharegpt(item: dict[str, Any]) -> bool:
    return {"from", "value"} <= item.keys() and not {"role", "content"} & item.keys()


def parsed(value: Any) -> list[dict[str, Any]] | None:
    """Return a list of messages, or that of a JSON text; None if the value is something else."""
    value = _listed(value)
    return value if is_dialogue(value) else None


def _listed(value: Any) -> Any:
    """Return the list of objects of a JSON text; other values as they are."""
    if not isinstance(value, str) or not _LIST_OF_OBJECTS.match(value):  # most texts are no JSON
        return value
    try:
        return DECODER.decode(value)
    except (ValueError, RecursionError):
        return value


def is_rows(value: Any) -> bool:
    """Return whether a value is a list of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def messages(value: Any, column: str, where: str, fills_with_null: bool) -> list[Message]:
    """Return the messages of a column's value.

    Keys without a value are left out. Content is text, or None beside other keys. ShareGPT's `from` and `value` become
    role and content. An answer that is not to be learned (`weight: 0`, `train: false`) has `train: False`.

    Args:
        value: a list of messages, or its JSON text.
        column: name of the column, for errors.
        where: place of the row, for errors.
        fills_with_null: whether the source writes null for keys that a message does not have, at any depth.

    Raises:
        DataError: a message has no role or content, an unknown role, content that is not text, or a weight that is
            neither 0 nor 1.
    """
    filled = fills_with_null and not isinstance(value, str)
    listed = _parsed(value, column, where, "a list of messages with role and content")
    return [_message(item, f"{where}: {column}[{place}]", filled) for place, item in enumerate(listed)]


def tools(value: Any, where: str, fills_with_null: bool) -> list[dict[str, Any]]:
    """Return the tools of a row: a list of schemas, or its JSON text; empty if it has none.

    Raises:
        DataError: the value is something else.
    """
    listed: list[dict[str, Any]] = _parsed(value, "tools", where, "a list of schemas of functions")
    return _without_nulls(listed) if fills_with_null and not isinstance(value, str) else listed


def _parsed(value: Any, column: str, where: str, kind: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = DECODER.decode(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {column} must be {kind}, or its JSON text; this is no JSON: {error}") from error
    if not isinstance(value, list | None) or not all(isinstance(item, dict) for item in value or ()):
        raise DataError(f"{where}: {column} must be {kind}; this is {str(value)[:40]!r}")
    return value or []


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def history(value: Any, column: str, where: str, fills_with_null: bool) -> list[Message]:
    """Return the earlier turns of a row: pairs of a question and its answer, or messages, or the JSON text of these.

    Raises:
        DataError: the value is something else.
    """
    if isinstance(value, str):
        try:
            value = DECODER.decode(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {column} must be JSON text; this is no JSON: {error}") from error
    pairs = value if isinstance(value, list) else []
    if pairs and all(isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in pairs):
        roles = ("user", "assistant")
        value = [{"role": role, "content": text} for pair in value for role, text in zip(roles, pair, strict=True)]
    return messages(value, column, where, fills_with_null)


def calls(value: Any) -> list[dict[str, Any]] | None:
    """Return the tool calls that an answer consists of: a list of names and arguments, or its JSON text; else None."""
    value = _listed(value)
    if not is_rows(value) or any(item.keys() != {"name", "arguments"} for item in value):
        return None
    return [{"type": "function", "function": item} for item in value]


def with_arguments(dialogue: list[Message], as_objects: bool) -> list[Message]:
    """Return messages with the arguments of their tool calls as objects, or else as JSON text, where they can be."""
    convert = _as_object if as_objects else _as_json

    def converted(call: Any) -> Any:
        if not _is_call(call) or "arguments" not in call["function"]:
            return call
        return call | {"function": call["function"] | {"arguments": convert(call["function"]["arguments"])}}

    return [
        message | {"tool_calls": [*map(converted, message["tool_calls"])]} if calls_of(message) else message
        for message in dialogue
    ]


def _as_object(value: Any) -> Any:
    try:
        read = DECODER.decode(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, dict) else value


def _as_json(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


def arguments_of(dialogue: list[Message]) -> list[Any]:
    """Return the arguments of all tool calls of a dialogue."""
    return [call["function"].get("arguments") for message in dialogue for call in calls_of(message)]


def calls_of(message: Message) -> list[Any]:
    """Return the calls of functions of a message."""
    called = message.get("tool_calls")
    return [call for call in called if _is_call(call)] if isinstance(called, list) else []


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("function"), dict)


def _from_sharegpt(item: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a message of ShareGPT's with the keys of other messages; a call in its JSON text becomes a tool call."""
    role, value = item["from"], item["value"]
    message = {key: content for key, content in item.items() if key not in ("from", "value")}
    message["role"] = _SHAREGPT.get(str(role).casefold(), role)
    if role != "function_call":
        return message | {"content": value}
    try:
        call = DECODER.decode(value) if isinstance(value, str) else value
        function = {"name": call["name"], "arguments": call["arguments"]}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{where}: a function_call must be the JSON text of name and arguments: {error!r}") from error
    return message | {"content": None, "tool_calls": [{"type": "function", "function": function}]}


def _is_learned(item: dict[str, Any], where: str) -> bool:
    """Return whether an answer is to be learned, as its `weight` or `train` says; both are removed from the message.

    Messages of others are never learned.
    """
    stated: dict[str, bool] = {}
    for key, values in _WEIGHTS.items():
        if (value := item.pop(key, None)) is None:
            continue
        if not isinstance(value, bool | int | float) or value not in values:
            raise DataError(f"{where}: {key}={value!r} must be {values[0]} or {values[1]}")
        stated[key] = bool(value)
    if len({*stated.values()}) > 1:
        raise DataError(f"{where}: weight and train contradict each other")
    if item.get("role") != "assistant" and any(stated.values()):
        raise DataError(f"{where}: only answers of the assistant are learned; remove {' and '.join(stated)}")
    return all(stated.values())


def _message(item: dict[str, Any], where: str, filled: bool) -> Message:
    item = _from_sharegpt(item, where) if _is_sharegpt(item) else dict(item)
    learned = _is_learned(item, where)
    content = item.get("content")
    more = {key: value for key, value in item.items() if key not in ("role", "content") and value not in (None, [])}
    missing = {"role", "content"} - item.keys() - ({"content"} if more and "role" in item else set())
    if missing:
        raise DataError(
            f"{where}: a message needs role and content (or from and value); the first has {', '.join(item)}"
            f" and no {' or '.join(sorted(missing))}"
        )
    role = item["role"]
    if role not in ROLES:
        name = str(role).casefold()
        meant = f"; did you mean '{_OTHER_NAMES[name]}'?" if name in _OTHER_NAMES else did_you_mean(name, ROLES)
        if name in ROLES:
            meant = f"; did you mean '{name}'?"
        raise DataError(f"{where}: unknown role {role!r}{meant} Roles are {', '.join(ROLES)}")
    said_ = {"content": None if content is None else _content(content, where)} if "content" in item else {}
    message = {"role": role, **said_, **(_without_nulls(more) if filled else more)}
    return message if learned or role != "assistant" else message | {"train": False}


def learns(message: Message) -> bool:
    """Return whether a message is an answer that is to be learned."""
    return message["role"] == "assistant" and message.get("train") is not False


def learned(dialogue: list[Message]) -> list[int]:
    """Return the places of the answers that are learned: of those with `train: True`, or else of the last one."""
    answers = [place for place, message in enumerate(dialogue) if learns(message)]
    return [place for place in answers if dialogue[place].get("train")] or answers[-1:]


def _content(content: Any, where: str) -> str:
    if not isinstance(content, list):
        try:
            return as_text(content)
        except ValueError as error:
            raise DataError(f"{where}.content: {error}; write it as text in the file") from error
    for part in content:
        keys = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        if keys.keys() != {"type", "text"} or keys["type"] != "text" or not isinstance(keys["text"], str):
            raise DataError(
                f"{where}.content: the part {str(keys or part)[:60]} cannot be learned as text; parts must be "
                '{"type": "text", "text": "..."}, or the content a text'
            )
    return "".join(part["text"] for part in content)


def said(message: Message) -> str:
    """Return what a message says, as text: its content, and the other keys but the role as JSON."""
    more = {key: value for key, value in message.items() if key not in ("role", "content", "train")}
    return "\n".join(filter(None, [message.get("content"), json.dumps(more, ensure_ascii=False) if more else ""]))


def answer_after(prompt: str, whole: str, asked: Message, answer: Message) -> str | None:
    """Return the text of the last answer, to be learned after a prompt that the whole dialogue does not begin with.

    Some templates change what stands before a prompt's last message once there is an answer: Mistral's leave out the
    system message, gpt-oss' the thoughts between tool calls. The answer is what follows the end of the prompt, if that
    has the last message.

    Args:
        prompt: the dialogue up to the answer, with the mark of an answer.
        whole: the dialogue with the answer.
        asked: the message before the answer.
        answer: the answer.

    Returns:
        The text; None if it cannot be told.
    """
    shortest, longest = 0, len(prompt)
    while shortest < longest:  # the longest end of the prompt that is in the whole
        middle = (shortest + longest + 1) // 2
        shortest, longest = (middle, longest) if prompt[-middle:] in whole else (shortest, middle - 1)
    end = prompt[len(prompt) - shortest :]
    text = (asked.get("content") or "").strip()
    rest = whole[whole.rfind(end) + len(end) :]
    said = [(answer.get("content") or "").strip(), *(str(call["function"].get("name")) for call in calls_of(answer))]
    has_asked = text and any(form in end for form in (text, json.dumps(text, ensure_ascii=False)[1:-1]))
    return rest if has_asked and any(said) and all(words in rest for words in said) else None


def answer_within(whole: str, prompt: str, alone: str, message: Message) -> str | None:
    """Return the text of an answer as the whole dialogue has it after its prompt.

    Some templates put more at the beginning of the last answer than of the same one among others, such as an empty
    thought (Qwen3's).

    Args:
        whole: the dialogue through its last answer that is learned.
        prompt: the dialogue up to this answer, with the mark of an answer.
        alone: the text of this answer where the dialogue ends with it.
        message: the answer.

    Returns:
        The text; None if it is not there, or if something that the answer says is not.
    """
    begin = len(prompt)
    if not whole.startswith(prompt) or begin == len(whole):
        return None
    starts = (start for start, letter in enumerate(alone[:_LONGEST_LEFT_OUT]) if letter == whole[begin])
    kept = next((alone[start:] for start in starts if whole.startswith(alone[start:], begin)), "")
    texts = [value for key, value in message.items() if key != "role" and isinstance(value, str)]
    texts += [str(call["function"].get("name")) for call in calls_of(message)]
    return kept if kept == alone or (kept and all(text.strip() in kept for text in texts)) else None
