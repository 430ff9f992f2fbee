"""Wrap MLflow's private parts. Checked on MLflow 3.17.2."""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from sys import intern
from typing import Any

from mlflow import MlflowClient
from mlflow.store.db.utils import _get_latest_schema_revision, _initialize_tables, create_sqlalchemy_engine_with_retry


def create_tables(database: str) -> None:
    """Create MLflow's tables in an empty database (`mlflow.store.db.utils._initialize_tables`).

    MLflow creates them itself when it opens a store, but this takes seconds, and MLflow cannot use a store whose
    creation was interrupted. `mlflow db upgrade` refuses an empty database.

    Args:
        database: an SQLAlchemy URL.
    """
    engine = create_sqlalchemy_engine_with_retry(database)
    try:
        _initialize_tables(engine)
    finally:
        engine.dispose()


def schema_version() -> str:
    """Return the version of MLflow's tables (`mlflow.store.db.utils._get_latest_schema_revision`).

    MLflow checks it when it opens a store, but only after it added tables that are missing, which a reader must not.
    """
    return str(_get_latest_schema_revision())


@dataclass
class StoredRun:
    """A run as MLflow's tables have it."""

    run_id: str
    name: str
    status: str
    start_time: int
    experiment_id: str
    artifact_uri: str
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """Last value of each metric."""


def stored_runs(file: Path, experiments: Iterable[str], tags: Mapping[str, str | None]) -> list[StoredRun]:
    """Read the active runs of experiments from an SQLite store (tables `runs`, `params`, `tags`, `latest_metrics`).

    `MlflowClient.search_runs` makes an object of each value: it takes 10 ms for each run, 20 times as long as this.

    Args:
        file: the SQLite file, with the tables of this version of MLflow.
        experiments: ids of the experiments.
        tags: tags that the runs must have, with their values; None: any value.
    """
    ids = ", ".join(str(int(experiment)) for experiment in experiments)
    wanted = ["lifecycle_stage = 'active'", f"experiment_id IN ({ids})"]
    wanted += ["run_uuid IN (SELECT run_uuid FROM tags WHERE key = ? AND value = coalesce(?, value))"] * len(tags)
    chosen = f"FROM runs WHERE {' AND '.join(wanted)}"
    values = [part for tag in tags.items() for part in tag]
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=20)) as store:

        def rows(columns: str, table: str) -> Iterator[Any]:
            return store.execute(f"SELECT {columns} FROM {table} WHERE run_uuid IN (SELECT run_uuid {chosen})", values)

        columns = "run_uuid, name, status, start_time, CAST(experiment_id AS TEXT), artifact_uri"
        runs = {row[0]: StoredRun(*row) for row in store.execute(f"SELECT {columns} {chosen}", values)}
        for run_id, key, value in rows("run_uuid, key, value", "params"):
            runs[run_id].params[intern(key)] = intern(value)  # most values occur in many runs: keep one copy of each
        for run_id, key, value in rows("run_uuid, key, value", "tags"):
            runs[run_id].tags[intern(key)] = intern(value or "")
        for run_id, key, number, is_nan in rows("run_uuid, key, value, is_nan", "latest_metrics"):
            runs[run_id].metrics[intern(key)] = float("nan") if is_nan else number
    return list(runs.values())


def reopen(mlflow: MlflowClient) -> None:
    """Let a client of an SQLite store use a new file at the same path (`SqlAlchemyStore._dispose_engine` and others).

    MLflow keeps its connections to a file that was deleted, for as long as the process runs.
    """
    store = mlflow._tracking_client.store
    store._dispose_engine()
    store._initialize_store_state()
