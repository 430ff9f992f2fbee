"""Bring MLflow up to date about many runs: send what it lacks, and check that it has what it received."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from qlora_exp.tracking.journal import FILE, is_delivered, is_locked, read, received, require_whole
from qlora_exp.tracking.mlflow_store import PARENT_TAG, client, parent_run_id
from qlora_exp.tracking.recovery import finish, store_of
from qlora_exp.tracking.refusals import cause
from qlora_exp.tracking.stores import known_stores
from qlora_exp.tracking.stores.uris import exists, store_uri
from qlora_exp.utils.errors import JournalError, TrackingError

_RUNS_PER_REQUEST = 200


@dataclass
class Settled:
    """What came of the runs."""

    sent: int = 0
    running: int = 0
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
                address = uri or store_of(folder, begin["uri"])
                stores.setdefault(address, {})[folder] = is_delivered(folder, address)
        except TrackingError as error:  # a store that only the journal names
            result.lacks[folder] = [str(error)]
        except (JournalError, OSError) as error:
            result.unread.append(str(error))
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
        client(uri)
    except (MlflowException, TrackingError) as error:
        result.away[cause(error)] += len(runs)
        return
    for folder, is_read_back in runs.items():
        if is_read_back and folder not in again:
            continue
        try:
            lacks = finish(folder, "killed", "its process is gone", uri, again=True)
        except (JournalError, OSError) as error:
            result.unread.append(str(error))
            continue
        if lacks:
            result.lacks[folder] = lacks
        else:
            result.sent += 1


def _lost(uri: str, folders: Iterable[Path]) -> set[Path]:
    """Return the folders whose runs the store no longer has, or no longer as jobs of their sweep.

    Raises:
        MlflowException, TrackingError: the store does not answer.
    """
    if not exists(uri):
        return set(folders)
    states = {folder: {"run_id": "", "experiment_id": ""} | received(folder, uri) for folder in folders}
    ids = sorted({state["run_id"] for state in states.values()})
    experiments = sorted({state["experiment_id"] for state in states.values()})
    tags: dict[str, dict[str, str]] = {}
    mlflow = client(uri)
    for begin in range(0, len(ids), _RUNS_PER_REQUEST):
        where = ", ".join(f"'{run_id}'" for run_id in ids[begin : begin + _RUNS_PER_REQUEST])
        # What was deleted in MLflow is there: it can be restored.
        runs = mlflow.search_runs(
            experiments, f"attributes.run_id IN ({where})", ViewType.ALL, max_results=_RUNS_PER_REQUEST
        )
        tags |= {run.info.run_id: run.data.tags for run in runs}
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
