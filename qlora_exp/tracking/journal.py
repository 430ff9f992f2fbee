"""Write a run's messages to disk before they are sent to MLflow: an append-only file, and how much of it was delivered.

The journal also decides what is true about a run on this disk: how it ended, or that its process is gone.
This module does not use MLflow.

Every line is checked when it is read. If a line is damaged, a `JournalError` names the file and the line. The messages
before it are sent; the line and those after it are not, and every `sync` fails with the same error: a run without some
of its messages would look complete in MLflow. Once the line is corrected or deleted, `sync` sends the rest.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, model_validator

from qlora_exp.config import values
from qlora_exp.tracking import messages
from qlora_exp.tracking.messages import parsed, why_invalid
from qlora_exp.utils.errors import JournalError, TrackingError
from qlora_exp.utils.files import not_a_link, open_inside, write_atomically
from qlora_exp.utils.units import MIB

FILE = "journal.jsonl"
CONFIG_FILE = values.CONFIG_FILE
LOCK_FILE = "environment.txt"
"""All installed packages with their versions, as a constraints file for pip."""
_STATE = "delivered.json"
PARENT_TAG = "mlflow.parentRunId"
"""Tag with the id of the sweep's run in a job's run."""
ELSEWHERE_TAG = "sweep.elsewhere."
"""Start of the tags of a sweep's run with the ids of jobs that were done before, outside the sweep."""
_BLOCK = MIB


class _LeftOut(BaseModel):
    model_config = ConfigDict(strict=True)
    why: str
    count: int


class _State(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    offset: NonNegativeInt
    run_id: str = ""
    experiment_id: str = ""
    creating: bool = False
    verified: NonNegativeInt = 0
    """Offset up to which everything was read back from MLflow."""
    left_out: dict[str, _LeftOut] = {}
    """What MLflow refuses for good, and files that are gone."""
    lost: bool = False
    """Whether lines that MLflow has received are gone from the journal."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.offset and not self.run_id:
            raise ValueError("something was received, but by which run is missing")
        return self


_STATES = TypeAdapter(dict[str, _State])


class Journal:
    """Messages of one run, in order, one JSON object per line. One process at a time can lock the journal.

    Raises:
        Timeout: another process has locked it (filelock's exception).
        JournalError: the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / FILE
        self._lock = FileLock(folder / "journal.lock")
        self._own: BinaryIO | None = None
        """The file, open for as long as the journal is locked: until then no other file can get its inode number."""
        try:
            self._lock.acquire(timeout=1)  # not 0: another process may be in `is_locked`, which locks it for a moment
            _cut_torn_line(self.file)
            if self.file.is_file():
                self._own = self.file.open("rb")
        except Timeout:
            raise
        except OSError as error:
            self._lock.release()
            raise JournalError(f"{folder}: {error.strerror or error}") from error
        self.uri = ""
        """The MLflow store in use."""
        self.state: dict[str, Any] = {}
        """What the MLflow store in use has received: `offset` in bytes, and what it answered, such as `run_id`."""

    def use(self, uri: str) -> None:
        """Select the MLflow store to deliver to; each store has its own `state`."""
        self.uri, self.state = uri, received(self.folder, uri)
        size = self.file.stat().st_size if self.file.is_file() else 0
        if self.state["offset"] > size:  # a power failure may have removed lines from the file that were already sent
            self.state |= {"offset": size, "lost": True}

    def close(self) -> None:
        """Release the lock, so that another process can use the journal."""
        if self._own is not None:
            self._own.close()
        self._lock.release()

    def discard(self) -> None:
        """Remove what was written, and release the lock: the run was refused before it began."""
        for name in (FILE, _STATE, "journal.lock"):  # a process that waits for the lock will find its file gone
            (self.folder / name).unlink(missing_ok=True)
        self.close()

    def check(self) -> None:
        """Check that the file is still the one that this process writes.

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
        """Append a message, without secrets; it is on disk when this returns.

        Metrics are not synced to the disk: a power failure can lose them, the death of the process cannot.

        Raises:
            JournalError: the folder is gone.
            OSError: the message could not be written; the journal is unchanged.
        """
        self.check()
        try:
            with open(self.file, "ab", opener=not_a_link) as lines:
                lines.write(messages.line(message))
                if message["op"] != "metrics":
                    lines.flush()
                    os.fsync(lines.fileno())
        except OSError:
            _cut_torn_line(self.file)
            raise
        self._own = self._own or self.file.open("rb")

    def messages(self) -> Iterator[dict[str, Any]]:
        """Iterate over all messages, oldest first."""
        return (message for message, _ in read(self.file))

    def undelivered(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Iterate over the messages that MLflow has not received, each with the offset to save once it is sent."""
        return read(self.file, self.state["offset"])

    def save_state(self, **facts: Any) -> None:
        """Save how much MLflow has received (`offset`), or what it answered."""
        self.state |= facts
        write_atomically(self.folder / _STATE, json.dumps(_states(self.folder) | {self.uri: self.state}))

    def reset_delivery(self) -> None:
        """Reset the state of the MLflow store in use to "nothing received", because the store has lost the run.

        `creating` lets the run be searched for before it is created again, in case the store was only mistaken.
        """
        self.state = {"offset": 0, "creating": True}
        self.save_state()


def read(file: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Iterate over the complete messages from `offset` on, each with the offset of its end; none if there is no file.

    Raises:
        JournalError: a message is damaged; those before it were already yielded.
    """
    with _opened(file) as lines:
        if lines is None:
            return
        lines.seek(offset)
        while line := lines.readline(messages.LONGEST_LINE):
            if not line.endswith(b"\n") and len(line) < messages.LONGEST_LINE:
                return
            try:
                message = parsed(line, first=offset == 0)
            except ValueError as error:
                lines.seek(0)
                ends, passed = 0, 0
                while passed < offset and (block := lines.read(min(_BLOCK, offset - passed))):
                    ends, passed = ends + block.count(b"\n"), passed + len(block)
                raise JournalError(f"{file}, line {ends + 1}: {why_invalid(error)}") from error
            offset += len(line)
            yield message, offset


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO | None]:
    """Open a file of an output folder for reading; None if it does not exist.

    Raises:
        JournalError: it exists and cannot be read.
    """
    try:
        if file.is_file():
            with open_inside(file.parent, file.name) as content:
                yield content
        elif file.exists():
            raise JournalError(f"{file}: not a file; remove what is there")
        else:
            yield None
    except OSError as error:
        raise JournalError(f"{file}: {error.strerror or error}") from error


def metrics(folder: Path) -> list[dict[str, Any]]:
    """List the metrics of the run in `folder` in the order of logging: `step`, `timestamp` (ms) and the values."""
    messages = (message for message, _ in read(folder / FILE) if message["op"] == "metrics")
    return [{"step": message["step"], "timestamp": message["timestamp"], **message["values"]} for message in messages]


def last_message(folder: Path) -> dict[str, Any] | None:
    """Return the newest complete message in `folder`, None if there is no journal. Reads only the end of the file.

    Raises:
        JournalError: the message is damaged.
    """
    file = folder / FILE
    with _opened(file) as lines:
        if lines is None:
            return None
        size = lines.seek(0, os.SEEK_END)
        block = 8192
        while True:
            lines.seek(max(0, size - block))
            complete, newline, _ = lines.read().rpartition(b"\n")
            if block > messages.LONGEST_LINE and b"\n" not in complete:
                raise JournalError(f"{file}, last line: longer than {messages.LONGEST_LINE // MIB} MiB")
            if b"\n" in complete or block >= size:
                if not newline:
                    return None
                try:
                    return parsed(complete.rpartition(b"\n")[2] + newline)
                except ValueError as error:
                    raise JournalError(f"{file}, last line: {why_invalid(error)}") from error
            block *= 8


def has_ended(last: dict[str, Any]) -> bool:
    """Check whether the run with this last message has ended for good; a killed run can be resumed."""
    return bool(last["op"] == "end" and last["outcome"] != "killed")


def is_delivered(folder: Path, uri: str | None = None) -> bool:
    """Check whether the run in `folder` has ended and MLflow was seen to have all of it; true without a journal.

    `uri` is the MLflow store to check; default: the one that the run was started with.
    """
    last = last_message(folder)
    if last is None or last["op"] != "end":
        return last is None
    begin, _ = next(read(folder / FILE))
    state, size = received(folder, uri or begin["uri"]), (folder / FILE).stat().st_size
    return bool(state["offset"] == state.get("verified") == size) and not state.get("left_out")


def store_of_newest(folders: Iterable[Path]) -> str | None:
    """Return the store that the newest run below these folders was started with; None if no run can be read."""
    files = [file for folder in folders for file in folder.rglob(FILE)]
    for file in sorted(files, key=lambda file: file.lstat().st_mtime, reverse=True):
        with suppress(JournalError, OSError, StopIteration):
            begin, _ = next(read(file))
            return str(begin["uri"])
    return None


def require_whole(folder: Path) -> None:
    """Check that the journal of a run that had ended has all lines that MLflow was seen to have.

    Raises:
        JournalError: lines are missing at its end: the run would look as if it had not ended, or never begun.
    """
    file = folder / FILE
    size = file.stat().st_size if file.is_file() else 0
    if any(state.get("verified", 0) > size for state in _states(folder).values()):
        raise JournalError(f"{file}: lines at its end are gone, which MLflow has received; restore the file")


def _states(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what each MLflow store has received, by URI of the store."""
    file = folder / _STATE
    with _opened(file) as text:
        try:
            states = {} if text is None else _STATES.validate_json(text.read(messages.LONGEST_LINE))
        except ValueError as error:
            hint = "if you delete this file, `qlora-exp sync` sends the complete run again, as a new MLflow run"
            raise JournalError(f"{file}: {why_invalid(error)}; {hint}") from error
    return {uri: state.model_dump(exclude_unset=True) for uri, state in states.items()}


def received(folder: Path, uri: str) -> dict[str, Any]:
    """Return what the MLflow store at `uri` has received of the run in `folder`: see `Journal.state`."""
    return _states(folder).get(uri, {"offset": 0})


def run_id(folder: Path, uri: str) -> str | None:
    """Return MLflow's id of the run in `folder` at `uri`; None if nothing was sent to that store yet."""
    return received(folder, uri).get("run_id")


def parent_run_id(folder: Path, tags: Mapping[str, str], uri: str) -> str | None:
    """Return the id at `uri` of the sweep to which the run in `folder` belongs; None if its folder is not there.

    Args:
        folder: the run's output folder.
        tags: tags of the run when it started.
        uri: the MLflow store.

    Raises:
        TrackingError: the sweep was not sent to this store yet, or what is in its folder cannot be read.
    """
    sweep = Path(os.path.abspath(folder)).parent
    try:
        sweep_tags: dict[str, str] = next((message["tags"] for message, _ in read(sweep / FILE)), {})
        if "sweep.keys" not in sweep_tags or sweep_tags.get("sweep") != tags.get("sweep"):
            return None
        parent_id = run_id(sweep, uri)
    except JournalError as error:  # it must not look like an error of this run's folder
        raise TrackingError(f"the sweep of this job cannot be read: {error}") from error
    if parent_id is None:
        raise TrackingError(f"the sweep of this job is not in the store yet; send it first: `qlora-exp sync {sweep}`")
    return parent_id


def is_locked(folder: Path) -> bool:
    """Check whether a running process has locked the journal in `folder`.

    Raises:
        JournalError: the lock file cannot be accessed.
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
    """Remove an incomplete last line that a kill or a power failure left: it was never sent."""
    if not file.is_file():
        return
    with open(file, "rb+", opener=not_a_link) as lines:
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
            if size - end > messages.LONGEST_LINE:
                raise OSError(errno.EFBIG, "a line is too long")
        lines.truncate(0)
