"""Say where the artifacts of a run or model are, and where they may be written.

Anybody may have written a record: it can name any folder of this machine, and any server. With a store that is an
SQLite file, artifacts are written only next to that file, and read only from this machine. A record in another kind of
store cannot name a server other than the store itself, because MLflow would send it the user's token.
"""

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qlora_exp.tracking.stores.sqlite_store import sqlite_file
from qlora_exp.utils.errors import TrackingError
from qlora_exp.utils.secrets import redact

log = logging.getLogger(__name__)

_COLUMNS = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}


def folder(recorded: str, store: str) -> Path | None:
    """Return the folder of artifacts that are on this machine; None if MLflow has to download them.

    If the store's folder was moved or copied, the artifacts next to the store are used.

    Args:
        recorded: location of the artifacts in the record.
        store: URI of the MLflow store.

    Raises:
        TrackingError: the record names a server that nothing may be sent to.
    """
    local, file = _local(recorded), sqlite_file(store)
    if local is None:
        _require_same_server(recorded, store)
        return None
    if file is None:
        return local if local.is_dir() else None
    here = file.parent / "artifacts" / _below_experiment(local)
    return local if _is_own(local, file) or not (_is_own(here, file) and here.is_dir()) else here


def require_own(recorded: str, store: str, name: str = "") -> None:
    """Check that artifacts, or the one with this name, may be written where a record says.

    Raises:
        TrackingError: the record names a place that does not belong to the store.
    """
    local, file = _local(recorded), sqlite_file(store)
    if local is None:
        _require_same_server(recorded, store)
    elif file is not None and not _is_own(local / name, file):
        raise TrackingError(
            f"the store {file} names {local / name} for artifacts, which is not in the store's own folder "
            f"{file.parent / 'artifacts'}: nothing is written there; use another experiment or a tracking server"
        )


def warn_of_other_machine(recorded: str, store: str) -> None:
    """Warn if a database that machines share keeps artifacts in a folder that another machine chose."""
    local = _local(recorded)
    if local is not None and sqlite_file(store) is None and not local.absolute().parent.parent.is_dir():
        log.warning(
            "artifacts go to %s on this machine, a folder that another machine chose when it made the experiment: only "
            "a tracking server (`mlflow server`) keeps the artifacts of several machines in one place",
            local,
        )


def relocate(file: Path) -> None:
    """Correct the recorded locations of artifacts if the folder of an SQLite store was moved or copied.

    Otherwise runs would create the folder where it was before, or write into the store that it was copied from. MLflow
    cannot change a location.
    """
    with closing(sqlite3.connect(file, timeout=20)) as store, store:
        for (recorded,) in store.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall():
            local = _local(recorded)
            if local is None or local.name != "artifacts" or _is_own(local, file):
                continue
            if local.is_dir() and not (local.parent / file.name).is_file():  # chosen, and not a store's own folder
                continue
            here = file.parent / "artifacts"
            log.warning("%s was moved or copied from %s: its artifacts are now in %s", file, local.parent, here)
            for table, column in _COLUMNS.items():
                below = f"{column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'"
                moved = f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) WHERE {below}"
                store.execute(moved, {"old": recorded, "new": here.as_uri()})


def _local(recorded: str) -> Path | None:
    """Return the folder that a location names, None if it is not on this machine."""
    parts = urlsplit(recorded)
    if not parts.scheme:
        return Path(recorded)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return None


def _below_experiment(local: Path) -> Path:
    """Return the part that is the same in every store: RUN_ID/artifacts or models/MODEL_ID/artifacts."""
    return Path(*local.parts[-3:] if local.parts[-3:-2] == ("models",) else local.parts[-2:])


def _is_own(local: Path, file: Path) -> bool:
    # MLflow itself keeps artifacts in mlruns/EXPERIMENT_ID.
    roots = [file.parent / "artifacts", file.parent / "mlruns", *[file.parent] * (file.parent.name == "mlruns")]
    place = os.path.realpath(local)
    return any(f"{place}/".startswith(f"{os.path.realpath(root)}/") for root in roots)


def _require_same_server(recorded: str, store: str) -> None:
    place, server = urlsplit(recorded), urlsplit(store)
    if sqlite_file(store) is not None:
        problem = "the store is a file of this machine, so its artifacts must be on this machine too"
    elif place.scheme not in ("http", "https", "mlflow-artifacts"):  # a service with credentials of its own
        return
    elif server.scheme not in ("http", "https"):
        problem = "the store is no tracking server"
    elif place.netloc not in ("", server.netloc) or place.scheme not in (server.scheme, "mlflow-artifacts"):
        problem = "this is another server than the store's own"
    else:
        return
    raise TrackingError(f"artifacts at {redact(recorded)} are neither read nor written: {problem}")
