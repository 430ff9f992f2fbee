"""What a run has to tell MLflow, on disk before it is sent: a file that only grows, and how far it was delivered.

The journal is also the truth about a run on this disk: how it ended, or that its process is gone.
Knows nothing of MLflow.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

FILE = "journal.jsonl"
CONFIG_FILE = "qlora_exp.yaml"
LOCK_FILE = "environment.txt"
"""Every installed package, as pip's constraints."""
_STATE = "delivered.json"


def write_atomically(file: Path, text: str) -> None:
    """Replace `file` in one step: whoever reads it sees all of the old or all of the new text."""
    part = file.with_name(f"{file.name}.part")
    with part.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)


class Journal:
    """The messages of one run, in order, one JSON object a line; one process at a time may hold it.

    Raises:
        Timeout: another process holds it (filelock's).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / FILE
        self._lock = FileLock(folder / "journal.lock")
        self._lock.acquire(timeout=1)  # `is_held` has it for a moment
        _cut_torn_line(self.file)
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
        self._lock.release()

    def append(self, message: dict[str, Any]) -> None:
        """Add a message; on disk when this returns. A metric may be lost with the power, not with the process.

        Raises:
            OSError: the disk does not take it; the journal is as it was.
        """
        try:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(message, ensure_ascii=False) + "\n")
                if message["op"] != "metrics":
                    lines.flush()
                    os.fsync(lines.fileno())
        except OSError:
            _cut_torn_line(self.file)
            raise

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
    """The whole messages from `offset` on, each with the offset behind it; nothing if there is no file."""
    if not file.is_file():
        return
    with file.open("rb") as lines:
        lines.seek(offset)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield json.loads(line), offset


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics in `folder` as they came: `step`, `timestamp` (ms) and the values."""
    found = (message for message, _ in read(folder / FILE) if message["op"] == "metrics")
    return [{"step": one["step"], "timestamp": one["timestamp"], **one["values"]} for one in found]


def last_message(folder: Path) -> dict[str, Any] | None:
    """The newest whole message in `folder`, None if there is no journal; fast however long it is."""
    file = folder / FILE
    if not file.is_file():
        return None
    with file.open("rb") as lines:
        size = lines.seek(0, os.SEEK_END)
        block = 8192
        while True:
            lines.seek(max(0, size - block))
            whole = lines.read().rpartition(b"\n")[0]
            if b"\n" in whole or block >= size:
                last = whole.rpartition(b"\n")[2]
                return json.loads(last) if last else None
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
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def run_id(folder: Path, uri: str) -> str | None:
    """MLflow's id of the run in `folder` at `uri`; None if that store was not told yet."""
    return _states(folder).get(uri, {}).get("run_id")


def is_held(folder: Path) -> bool:
    """Whether a living process is writing the journal in `folder`."""
    if not (folder / "journal.lock").is_file():
        return False
    lock = FileLock(folder / "journal.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
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
