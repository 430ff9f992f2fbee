"""The messages of a run's journal: the fields that each kind must have, and what is replaced in them before writing."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from qlora_exp.utils.secrets import redacted

_PLACES = ("op", "uri", "folder")


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)
    op: str


class _Start(_Message):
    experiment: str
    uri: str
    run_name: str
    timestamp: int
    tags: dict[str, str]


class _Resume(_Message):
    tags: dict[str, str]


class _Texts(_Message):
    values: dict[str, str]


class _Metrics(_Message):
    step: int
    timestamp: int
    values: dict[str, float | bool]


class _File(_Message):
    path: str


class _Dataset(_Message):
    name: str
    digest: str
    source: str
    context: str
    rows: int


class _Model(_Message):
    folder: str
    name: str
    params: dict[str, str]
    step: int
    files: list[str] = []
    """Files that the folder had, relative to it; messages of older versions do not list them."""


class _View(_Message):
    key: str
    value: str


class _End(_Message):
    status: Literal["FINISHED", "FAILED", "KILLED"]
    outcome: str
    timestamp: int
    metrics: dict[str, float | bool]
    failure: str = ""
    seconds: float = 0.0


_SCHEMAS: Mapping[str, type[_Message]] = {
    "start": _Start,
    "resume": _Resume,
    "params": _Texts,
    "tags": _Texts,
    "metrics": _Metrics,
    "file": _File,
    "dataset": _Dataset,
    "model": _Model,
    "view": _View,
    "end": _End,
}
"""The fields that each `op` must have. An `op` of a newer version is not listed: its message needs no other field."""


def parsed(line: bytes, first: bool = False) -> dict[str, Any]:
    """Parse one line; the first line of a journal must be the `start` message, which says what the run is.

    Raises:
        ValueError: the line is not a valid message.
    """
    message: dict[str, Any] = from_json(line)
    op = _Message.model_validate(message).op
    _SCHEMAS.get(op, _Message).model_validate(message)
    if first and op != "start":
        raise ValueError("the first message of a journal must be a 'start' message")
    return message


def why_invalid(error: ValueError) -> str:
    """Say in one line what is wrong, without quoting the content that was read."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, item['loc']))!r}: {item['msg']}" for item in error.errors()[:3])
    return str(error)


def without_secrets(message: dict[str, Any]) -> dict[str, Any]:
    """Replace secrets in what a message says; places, which later messages are found by, stay as they are."""
    if message["op"] in ("metrics", "file", "view"):
        return message
    clean = {key: value if key in _PLACES else redacted(value) for key, value in message.items()}
    if "tags" in message:
        clean["tags"] |= {key: value for key, value in message["tags"].items() if key.startswith("process.")}
    return clean
