"""Write values of data files as text: text unchanged, anything else as JSON. Depends on nothing else."""

import json
import math
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


def as_text(value: Any) -> str:
    """Return text as it is, None as an empty text, and any other value as JSON.

    Raises:
        ValueError: JSON cannot express the value: a date, bytes, a number that is not finite.
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
    raise ValueError(f"{str(value)[:40]} is {kind}, which has no form in JSON")
