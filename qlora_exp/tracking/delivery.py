"""Deliver a run's journal to an MLflow store, in order, and note in the journal what was sent and what was left out.

Params, tags and metrics that follow each other are sent together.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from qlora_exp.tracking.journal import Journal
from qlora_exp.tracking.mlflow_store import UnsendableError, send
from qlora_exp.tracking.refusals import LeftOut, cause, has_lost, is_refused
from qlora_exp.utils.errors import JournalError
from qlora_exp.utils.processes.signals import defer_signals

log = logging.getLogger(__name__)

_MOST = {"metrics": 1000, "params": 100, "tags": 100}
"""Most entries of each kind that MLflow accepts in one request."""


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
    for messages, end in _batches(journal):
        with defer_signals():
            left_out = _send(mlflow, journal, messages)
            journal.save_state(offset=end, left_out=_noted(journal, left_out))


def _noted(journal: Journal, left_out: list[LeftOut]) -> dict[str, dict[str, Any]]:
    """Return what was left out so far, with `left_out` added."""
    noted: dict[str, dict[str, Any]] = dict(journal.state.get("left_out", {}))
    for what, why in left_out:
        if what not in noted:
            log.error("MLflow does not get %s: %s", what, why)
        noted[what] = {"why": why, "count": noted.get(what, {"count": 0})["count"] + 1}
    return noted


def _batches(journal: Journal) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Group the undelivered messages; a group is one message, or several whose entries fit into one request.

    Yields:
        The messages of a group, and the offset of its end.

    Raises:
        JournalError: a message cannot be read; the groups before it were already yielded.
    """
    group: list[dict[str, Any]] = []
    sizes: Counter[str] = Counter()
    names: set[tuple[str, str]] = set()
    end = journal.state["offset"]
    problem = None
    try:
        for message, offset in journal.undelivered():
            op, values = message["op"], message.get("values", {})
            own = set() if op == "metrics" else {(op, key) for key in values}  # of a name only the last value counts
            joins = (
                {op, *sizes} <= _MOST.keys()
                and not own & names
                and sizes[op] + len(values) <= _MOST[op]
                and sizes.total() + len(values) <= max(_MOST.values())
            )
            if group and not joins:
                yield group, end
                group, sizes, names = [], Counter(), set()
            group.append(message)
            sizes[op] += len(values)
            names |= own
            end = offset
    except JournalError as error:
        problem = error
    if group:
        yield group, end
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
