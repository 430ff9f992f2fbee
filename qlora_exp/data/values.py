"""Read JSON without loss, and write values as text: text unchanged, anything else as JSON."""

import json
import math
from collections import Counter
from decimal import Decimal
from typing import Any


class Number(float):
    """A number that keeps how it is written, such as 1.10 or 1e5."""

    text: str

    def __new__(cls, text: str) -> "Number":
        """Keep `text`, which is a JSON number."""
        number = super().__new__(cls, text)
        number.text = text
        return number


class Unreadable:
    """A value of a table that Python cannot hold, such as a map with a key twice."""

    def __init__(self, why: str) -> None:
        self.why = why


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((name, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r} occurs twice in one object")
    return values


DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_float=Number,
    parse_int=lambda text: Number(text) if text == "-0" else int(text),
)
"""Reads JSON so that numbers keep how they are written; refuses an object with a key twice (`ValueError`)."""


def as_text(value: Any) -> str:
    """Return text as it is, None as an empty text, and any other value as JSON.

    Raises:
        ValueError: JSON cannot express the value: a date, bytes, a number that is not finite, or it cannot be read.
    """
    if value is None:
        return ""
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    if value is None or isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_json(str(key))}: {_json(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_json, value))}]"
    if isinstance(value, Number):
        return value.text
    if isinstance(value, int | float | Decimal) and math.isfinite(value):
        return str(value)
    kind = "not a finite number" if isinstance(value, float | Decimal) else f"of the type {type(value).__name__}"
    unreadable = f"a value cannot be read: {value.why}" if isinstance(value, Unreadable) else ""
    raise ValueError(unreadable or f"{str(value)[:40]} is {kind}, which has no form in JSON")
