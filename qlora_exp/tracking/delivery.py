"""Deliver a run's journal to an MLflow store, in order, and note in the journal what was sent and what was left out.

Metrics messages that follow each other are sent together.
"""

import logging
from collections.abc import Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from qlora_exp.tracking.journal import Journal, read
from qlora_exp.tracking.mlflow_store import UnsendableError, send
from qlora_exp.tracking.refusals import LeftOut, cause, has_lost, is_refused
from qlora_exp.utils.errors import JournalError
from qlora_exp.utils.signals import defer_signals

log = logging.getLogger(__name__)

_METRICS_PER_REQUEST = 1000
"""Most metrics that MLflow accepts in one request."""
_ENTRIES = ("params", "tags", "resume", "metrics")
"""Messages that are logged entry by entry if MLflow refuses them."""


def deliver(mlflow: MlflowClient, journal: Journal) -> None:
    """Send what MLflow has not received. What it refuses for good is left out, and listed in the journal's state.

    Raises:
        JournalError: a message cannot be read; those before it are sent.
        Exception: the store does not accept a message now; this message and those after it are kept.
    """
    try:
        _deliver(mlflow, journal)
    except MlflowException as error:
        if not has_lost(error, mlflow, journal):
            raise
        log.warning("MLflow has lost this run: all of it is sent again, as a new run")
        journal.reset_delivery()
        _deliver(mlflow, journal)


def _deliver(mlflow: MlflowClient, journal: Journal) -> None:
    for messages, begin, end in _batches(journal):
        with defer_signals():
            _note(journal, _send(mlflow, journal, messages), begin)
            journal.save_state(offset=end)


def retry(mlflow: MlflowClient, journal: Journal) -> None:
    """Send again what was left out and may be sendable now: a file may be back, or this version knows more messages.

    Raises:
        Exception: the store does not accept a message now.
    """
    left_out: dict[str, dict[str, Any]] = journal.state.get("left_out", {})
    for begin in sorted({each["at"] for each in left_out.values()}):
        message, _ = next(read(journal.file, begin))
        if message["op"] in _ENTRIES:  # the same content is refused again
            continue
        kept = {what: each for what, each in journal.state["left_out"].items() if each["at"] != begin}
        with defer_signals():
            again = _send(mlflow, journal, [message])
            journal.state["left_out"] = kept
            _note(journal, again, begin)
            journal.save_state(verified=0)


def _note(journal: Journal, left_out: list[LeftOut], begin: int) -> None:
    """Add to the journal's state what was left out of the messages at offset `begin`."""
    noted = journal.state.setdefault("left_out", {})
    for what, why in left_out:
        if what not in noted:
            log.error("MLflow does not get %s: %s", what, why)
            noted[what] = {"why": why, "count": 0, "at": begin}
        noted[what]["count"] += 1


def _batches(journal: Journal) -> Iterator[tuple[list[dict[str, Any]], int, int]]:
    """Group the undelivered messages; a group is one message, or several of metrics that fit into one request.

    Yields:
        The messages of a group, and the offsets of its begin and end.

    Raises:
        JournalError: a message cannot be read; the groups before it were already yielded.
    """
    group: list[dict[str, Any]] = []
    begin = end = journal.state["offset"]
    size = 0
    problem = None
    try:
        for message, offset in journal.undelivered():
            more = len(message["values"]) if message["op"] == "metrics" else _METRICS_PER_REQUEST
            if group and size + more > _METRICS_PER_REQUEST:
                yield group, begin, end
                group, begin, size = [], end, 0
            group.append(message)
            size += more
            end = offset
    except JournalError as error:
        problem = error
    if group:
        yield group, begin, end
    if problem is not None:
        raise problem


def _send(mlflow: MlflowClient, journal: Journal, messages: list[dict[str, Any]]) -> list[LeftOut]:
    """Send a group of messages; return what is left out for good, and why."""
    op = messages[0]["op"]
    try:
        return send(mlflow, journal, *messages)
    except UnsendableError as error:
        return [(name_of(messages[0]), cause(error))]
    except MlflowException as error:
        if op in ("start", "end") or not is_refused(error, mlflow, journal):
            raise
    try:  # the store may have been under maintenance a moment ago
        return send(mlflow, journal, *messages)
    except MlflowException as error:
        if not is_refused(error, mlflow, journal):
            raise
        return [(name_of(messages[0]), cause(error))]


def name_of(message: dict[str, Any]) -> str:
    """Name what a message logs, for the user."""
    return f"{message['op']} {message.get('path') or message.get('name') or message.get('key') or ''}".strip()
