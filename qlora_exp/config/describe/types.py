"""Write types and ranges as a user would write and read their values."""

from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

_WORDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most", "min_length": "not empty", "pattern": ""}


def spelled(kind: Any) -> str:
    """Write a type: `int | null`, or the values of a literal: `no | steps | epoch`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return spelled(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(spelled, inner)))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(spelled, inner))}]"
    return "null" if kind is NoneType else "any" if kind is Any else getattr(kind, "__name__", str(kind))


def limits(kind: Any, metadata: Iterable[Any] = ()) -> str:
    """Write the range of a type, such as `at least 0 and below 1`; empty if there is none.

    Args:
        kind: the type, whose parts may be annotated with ranges.
        metadata: what pydantic knows of the type itself.
    """
    own = [" ".join(words).strip() for words in _bounds(metadata)]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return limits(inner[0], [*metadata, *inner[1:]])
    if origin in (Union, UnionType):
        parts = {spelled(part): bounds for part in inner if (bounds := limits(part))}
        return "; ".join(f"{name} {bounds}" if len(parts) > 1 else bounds for name, bounds in parts.items())
    return " and ".join(own)


def _bounds(metadata: Iterable[Any]) -> Iterator[tuple[str, str]]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
            continue
        for name, word in _WORDS.items():
            if word and (bound := getattr(item, name, None)) is not None:
                yield (word, "") if name == "min_length" else (word, f"{bound:,}" if bound < 10**6 else f"{bound}")


def shown_value(value: Any) -> str:
    """Write a value as in an override: null, true, and text without quotes."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown_value(item)}" for key, item in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)
