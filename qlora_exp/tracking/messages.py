"""The messages of a run's journal: the fields that each kind must have, and how one is written as a line and read.

A line ends with a checksum of what comes before it, because a changed bit can leave another valid message. Lines of
older versions have none.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from qlora_exp.utils.secrets import redacted
from qlora_exp.utils.units import MIB

LONGEST_LINE = 64 * MIB
"""A file of somebody else may have a line of any length, even a terabyte that takes no space on the disk."""
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


def line(message: dict[str, Any]) -> bytes:
    """Return a message as a line of the journal, without secrets and with its checksum."""
    # Folder names and arguments may have bytes that are not UTF-8: they become question marks.
    content = json.dumps(_without_secrets(message), ensure_ascii=False).encode("utf-8", "replace")
    return _with_checksum(content[:-1])


def _with_checksum(content: bytes) -> bytes:
    return content + b', "crc32": "%08x"}\n' % zlib.crc32(content)


def parsed(line: bytes, first: bool = False) -> dict[str, Any]:
    """Parse one line; the first line of a journal must be the `start` message, which says what the run is.

    Raises:
        ValueError: the line is not a valid message.
    """
    if not line.endswith(b"\n") and len(line) >= LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE // MIB} MiB")
    message: dict[str, Any] = from_json(line)
    op = _Message.model_validate(message).op
    if "crc32" in message and line != _with_checksum(line.rpartition(b', "crc32": ')[0]):
        raise ValueError('it was changed after it was written; restore the file, or remove "crc32" to use it as it is')
    message.pop("crc32", None)
    _SCHEMAS.get(op, _Message).model_validate(message)
    if first and op != "start":
        raise ValueError("the first message of a journal must be a 'start' message")
    return message


def why_invalid(error: ValueError) -> str:
    """Say in one line what is wrong, without quoting the content that was read."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, item['loc']))!r}: {item['msg']}" for item in error.errors()[:3])
    return str(error)


def _without_secrets(message: dict[str, Any]) -> dict[str, Any]:
    """Replace secrets in what a message says; places, which later messages are found by, stay as they are."""
    if message["op"] in ("metrics", "file", "view"):
        return message
    clean = {key: value if key in _PLACES else redacted(value) for key, value in message.items()}
    if "tags" in message:
        clean["tags"] |= {key: value for key, value in message["tags"].items() if key.startswith("process.")}
    return clean
