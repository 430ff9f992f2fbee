"""What a run has to tell MLflow, on disk before it is sent: a file that only grows, and how far it was delivered.

The journal is also the truth about a run on this disk: how it ended, or that its process is gone.
Knows nothing of MLflow.

Every line is checked when it is read, and whatever is wrong with it is a `JournalError` that names file and line. What
comes before a damaged line is sent. The line and what follows stay unsent, and every `sync` fails with the place: a run
without some of its messages would look whole in MLflow. Once the line is mended or deleted, `sync` sends the rest.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError
from pydantic_core import from_json

from qlora_exp.utils.errors import JournalError
from qlora_exp.utils.files import write_atomically

FILE = "journal.jsonl"
CONFIG_FILE = "qlora_exp.yaml"
LOCK_FILE = "environment.txt"
"""Every installed package, as pip's constraints."""
_STATE = "delivered.json"


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


_FORMS: Mapping[str, type[_Message]] = {
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
"""What a message must have; one that only a newer version has a form for needs an `op`."""


class _State(BaseModel):
    model_config = ConfigDict(strict=True)
    offset: NonNegativeInt
    run_id: str = ""
    experiment_id: str = ""
    creating: bool = False


_STATES = TypeAdapter(dict[str, _State])


def _message(line: bytes, first: bool = False) -> dict[str, Any]:
    """One line as a message; the first must say what the run is.

    Raises:
        ValueError: it is none.
    """
    message: dict[str, Any] = from_json(line)
    op = _Message.model_validate(message).op
    _FORMS.get(op, _Message).model_validate(message)
    if first and op != "start":
        raise ValueError("not the start of a run")
    return message


def _why(error: ValueError) -> str:
    """What is wrong, in one line without what was read."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc']))!r}: {one['msg']}" for one in error.errors()[:3])
    return str(error)


class Journal:
    """The messages of one run, in order, one JSON object a line; one process at a time may hold it.

    Raises:
        Timeout: another process holds it (filelock's).
        JournalError: the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / FILE
        self._lock = FileLock(folder / "journal.lock")
        self._own: BinaryIO | None = None
        """The file, open as long as the journal is held: no other file can get its number on the disk."""
        try:
            self._lock.acquire(timeout=1)  # `is_held` has it for a moment
            _cut_torn_line(self.file)
            if self.file.is_file():
                self._own = self.file.open("rb")
        except Timeout:
            raise
        except OSError as error:
            self._lock.release()
            raise JournalError(f"{folder}: {error.strerror or error}") from error
        self._uri = ""
        self.state: dict[str, Any] = {}
        """What the store in use has: `offset` in bytes, and what delivering found out, such as `run_id`."""

    def use(self, uri: str) -> None:
        """Deliver to this store; each has its own `state`."""
        self._uri, self.state = uri, {"offset": 0} | _states(self.folder).get(uri, {})
        size = self.file.stat().st_size if self.file.is_file() else 0
        self.state["offset"] = min(self.state["offset"], size)  # the power may have taken what was sent already

    def close(self) -> None:
        """Let another process hold it."""
        if self._own is not None:
            self._own.close()
        self._lock.release()

    def check(self) -> None:
        """That the file is still the one that this process writes.

        Raises:
            JournalError: the folder was deleted, or another run is in its place.
        """
        try:
            if self._own is None or os.path.samestat(self.file.stat(), os.fstat(self._own.fileno())):
                return
        except (FileNotFoundError, NotADirectoryError):
            pass
        raise JournalError(f"{self.folder}: the output folder was deleted or replaced while the run wrote into it")

    def append(self, message: dict[str, Any]) -> None:
        """Add a message; on disk when this returns. A metric may be lost with the power, not with the process.

        Raises:
            JournalError: the folder is gone.
            OSError: the disk does not take it; the journal is as it was.
        """
        self.check()
        try:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(message, ensure_ascii=False) + "\n")
                if message["op"] != "metrics":
                    lines.flush()
                    os.fsync(lines.fileno())
        except OSError:
            _cut_torn_line(self.file)
            raise
        self._own = self._own or self.file.open("rb")

    def messages(self) -> Iterator[dict[str, Any]]:
        """Every message, oldest first."""
        return (message for message, _ in read(self.file))

    def undelivered(self) -> Iterator[tuple[dict[str, Any], int]]:
        """What MLflow has not got yet, each with the offset to note once it has."""
        return read(self.file, self.state["offset"])

    def note(self, **facts: Any) -> None:
        """Keep what MLflow has got (`offset`), or what it answered."""
        self.state |= facts
        write_atomically(self.folder / _STATE, json.dumps(_states(self.folder) | {self._uri: self.state}))

    def forget(self) -> None:
        """That the store in use has got anything: it has lost the run."""
        self.state = {"offset": 0}
        self.note()


def read(file: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole messages from `offset` on, each with the offset behind it; nothing if there is no file.

    Raises:
        JournalError: one is damaged; those before it were given.
    """
    with _opened(file) as lines:
        if lines is None:
            return
        lines.seek(offset)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            try:
                message = _message(line, first=offset == 0)
            except ValueError as error:
                lines.seek(0)
                number = lines.read(offset).count(b"\n") + 1
                raise JournalError(f"{file}, line {number}: {_why(error)}") from error
            offset += len(line)
            yield message, offset


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO | None]:
    """A file of an output folder to read; None if there is none.

    Raises:
        JournalError: it is there and cannot be read.
    """
    try:
        if file.is_file():
            with file.open("rb") as found:
                yield found
        elif file.exists():
            raise JournalError(f"{file}: not a file")
        else:
            yield None
    except OSError as error:
        raise JournalError(f"{file}: {error.strerror or error}") from error


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics in `folder` as they came: `step`, `timestamp` (ms) and the values."""
    found = (message for message, _ in read(folder / FILE) if message["op"] == "metrics")
    return [{"step": one["step"], "timestamp": one["timestamp"], **one["values"]} for one in found]


def last_message(folder: Path) -> dict[str, Any] | None:
    """The newest whole message in `folder`, None if there is no journal; fast however long it is.

    Raises:
        JournalError: it is damaged.
    """
    file = folder / FILE
    with _opened(file) as lines:
        if lines is None:
            return None
        size = lines.seek(0, os.SEEK_END)
        block = 8192
        while True:
            lines.seek(max(0, size - block))
            whole, newline, _ = lines.read().rpartition(b"\n")
            if b"\n" in whole or block >= size:
                if not newline:
                    return None
                try:
                    return _message(whole.rpartition(b"\n")[2])
                except ValueError as error:
                    raise JournalError(f"{file}, last line: {_why(error)}") from error
            block *= 8


def is_over(last: dict[str, Any]) -> bool:
    """Whether the run with this last message ended by itself; a killed one goes on where it was."""
    return bool(last["op"] == "end" and last["outcome"] != "killed")


def is_settled(folder: Path, uri: str | None = None) -> bool:
    """Whether the run in `folder` has ended and MLflow, at `uri` or where it was begun, has everything of it."""
    last = last_message(folder)
    if last is None or last["op"] != "end":
        return last is None
    begin, _ = next(read(folder / FILE))
    has = _states(folder).get(uri or begin["uri"], {"offset": 0})
    return bool(has["offset"] == (folder / FILE).stat().st_size)


def _states(folder: Path) -> dict[str, dict[str, Any]]:
    """What each store has, by its URI."""
    file = folder / _STATE
    with _opened(file) as text:
        try:
            states = {} if text is None else _STATES.validate_json(text.read())
        except ValueError as error:
            again = "without this file `qlora-exp sync` sends all of the run, as a new one"
            raise JournalError(f"{file}: {_why(error)}; {again}") from error
    return {uri: state.model_dump(exclude_unset=True) for uri, state in states.items()}


def run_id(folder: Path, uri: str) -> str | None:
    """MLflow's id of the run in `folder` at `uri`; None if that store was not told yet."""
    return _states(folder).get(uri, {}).get("run_id")


def is_held(folder: Path) -> bool:
    """Whether a living process is writing the journal in `folder`.

    Raises:
        JournalError: that cannot be seen.
    """
    lock = FileLock(folder / "journal.lock")
    try:
        if not (folder / "journal.lock").is_file():
            return False
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError as error:
        raise JournalError(f"{folder}: {error.strerror or error}") from error
    lock.release()
    return False


def _cut_torn_line(file: Path) -> None:
    """Cut off a last line that a kill or a power cut left unfinished: it was never sent."""
    if not file.is_file():
        return
    with file.open("rb+") as lines:
        size = lines.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 8192)
            lines.seek(start)
            newline = lines.read(end - start).rfind(b"\n")
            if newline >= 0:
                lines.truncate(start + newline + 1)
                return
            end = start
        lines.truncate(0)
