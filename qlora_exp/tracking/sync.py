"""Bring MLflow up to date about many runs: send what it lacks, and check that it has what it received."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora_exp.tracking.journal import (
    FILE,
    PARENT_TAG,
    is_delivered,
    is_locked,
    parent_run_id,
    read,
    received,
    require_whole,
)
from qlora_exp.tracking.stores import known_stores, sqlite_store
from qlora_exp.tracking.stores.uris import exists, store_uri
from qlora_exp.utils.errors import ConfigError, JournalError, TrackingError


@dataclass
class Settled:
    """What came of the runs."""

    sent: int = 0
    running: int = 0
    stores: list[str] = field(default_factory=list, compare=False)
    """The stores that were asked."""
    lacks: dict[Path, list[str]] = field(default_factory=dict)
    """What MLflow lacks of a run, one line each."""
    unread: list[str] = field(default_factory=list)
    """Why a folder cannot be read completely, one line each."""
    away: Counter[str] = field(default_factory=Counter)
    """How many runs a store that does not answer may lack, by its error."""


def settle(folders: Iterable[Path], uri: str | None = None) -> Settled:
    """Send MLflow what it lacks of the runs in these folders, sweeps before their jobs, and read it back.

    Runs that were read back before are only looked up, many at a time. A run whose process is gone is ended as killed.

    Args:
        folders: output folders.
        uri: the MLflow store; default: the one that each run was started with.
    """
    result = Settled()
    if uri is not None:
        uri = store_uri(uri)
        known_stores.remember(uri)
    stores: dict[str, dict[Path, bool]] = {}
    for folder in sorted(Path(os.path.abspath(folder)) for folder in folders):
        try:
            if is_locked(folder):
                result.running += 1
                continue
            require_whole(folder)
            if (begin := next((message for message, _ in read(folder / FILE)), None)) is not None:
                address = uri or known_stores.store_of(folder, begin["uri"])
                stores.setdefault(address, {})[folder] = is_delivered(folder, address)
        except (ConfigError, TrackingError) as error:  # a store that only the journal names
            result.lacks[folder] = [str(error)]
        except (JournalError, OSError) as error:
            result.unread.append(str(error))
    result.stores = [*stores]
    for address, runs in stores.items():
        _settle_store(address, runs, result)
    return result


def _settle_store(uri: str, runs: Mapping[Path, bool], result: Settled) -> None:
    """Settle the runs of one store.

    Args:
        uri: the store.
        runs: their folders, and whether they were read back before.
        result: what came of them is added here.
    """
    try:
        again = _lost(uri, [folder for folder, is_read_back in runs.items() if is_read_back])
        folders = [folder for folder, is_read_back in runs.items() if not is_read_back or folder in again]
        if not folders:
            return
        from qlora_exp.tracking import mlflow_store, recovery  # imported late: MLflow takes seconds

        mlflow_store.client(uri)
    except TrackingError as error:
        result.away[str(error)] += len(runs)
        return
    for folder in folders:
        try:
            lacks = recovery.finish(folder, "killed", "its process is gone", uri, again=True)
        except (JournalError, OSError) as error:
            result.unread.append(str(error))
            continue
        if lacks:
            result.lacks[folder] = lacks
        else:
            result.sent += 1


def _lost(uri: str, folders: Collection[Path]) -> set[Path]:
    """Return the folders whose runs the store no longer has, or no longer as jobs of their sweep.

    Raises:
        TrackingError: the store does not answer.
    """
    if not folders or not exists(uri):
        return set(folders)
    states = {folder: {"run_id": "", "experiment_id": ""} | received(folder, uri) for folder in folders}
    if (file := sqlite_store.sqlite_file(uri)) is not None:
        tags = sqlite_store.tags_of(file, [state["run_id"] for state in states.values()])
    else:
        from qlora_exp.tracking import mlflow_store

        tags = mlflow_store.tags_of(uri, list(states.values()))
    lost = {folder for folder, state in states.items() if state["run_id"] not in tags}
    return lost | {
        folder
        for folder, state in states.items()
        if folder.parent in lost or _left_its_sweep(folder, tags.get(state["run_id"], {}), uri)
    }


def _left_its_sweep(folder: Path, tags: Mapping[str, str], uri: str) -> bool:
    """Check whether a job's run names another run as its sweep than its sweep has now."""
    if PARENT_TAG not in tags:
        return False
    try:
        return parent_run_id(folder, tags, uri) not in (None, tags[PARENT_TAG])
    except TrackingError:
        return True
