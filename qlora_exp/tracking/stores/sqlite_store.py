"""Use an SQLite file as MLflow store: check that it is one, and open it for reading only."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from qlora_exp.utils.errors import NoRunsError, TrackingError

_TABLES = {"alembic_version", "experiments"}


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite store; None if `uri` is that of another kind of store."""
    path = _database(uri)
    return None if path is None else Path(path).absolute()


@lru_cache
def _database(uri: str) -> str | None:
    with suppress(ArgumentError):
        url = make_url(uri)
        if url.get_backend_name() == "sqlite" and url.database and url.database != ":memory:":
            return unquote(urlsplit(url.database).path) if url.database.startswith("file:") else url.database
    return None


def read_only_uri(file: Path) -> str:
    """Return a URI with which MLflow opens the file without writing or locking anything."""
    # With the driver's name, MLflow does not take the part after sqlite:/// for a path, whose folder it would create.
    url = URL.create("sqlite+pysqlite", database=file.as_uri(), query={"mode": "ro", "uri": "true"})
    return url.render_as_string()


def check(file: Path) -> None:
    """Check that an existing file is an MLflow store, without changing it: MLflow would add its tables to any database.

    Raises:
        TrackingError: it is not a store, or cannot be read.
    """
    with _reading(file) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables >= _TABLES:
        problem = "has tables of something else: name another file" if tables else "is empty: delete or replace it"
        raise TrackingError(f"{file} is not an MLflow store: this database {problem}")


def check_readable(file: Path, schema: str) -> None:
    """Check that MLflow can read a file without changing it: it must have this version of MLflow's tables.

    Raises:
        TrackingError: it is not a store, has another version, or cannot be read.
    """
    check(file)
    with _reading(file) as connection:
        version = connection.execute("SELECT max(version_num) FROM alembic_version").fetchone()[0]
        if version != schema:
            raise TrackingError(
                f"{file}: made by another version of MLflow (its database schema is {version}, here it is {schema}); "
                f"`mlflow db upgrade sqlite:///{file}` upgrades an older one"
            )
        if not connection.execute("SELECT 1 FROM experiments WHERE experiment_id = 0").fetchone():
            raise NoRunsError(f"no runs yet: {file} has no experiment 0, which MLflow adds at its first write")


def tags_of(file: Path, run_ids: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the tags of those runs that a store has, deleted ones too, without MLflow, whose import takes seconds.

    Raises:
        TrackingError: it is not a store, or cannot be read.
    """
    check(file)
    chosen = "SELECT value FROM json_each(?)"
    tags: dict[str, dict[str, str]] = {}
    with _reading(file) as connection:
        ids = json.dumps(list(run_ids))
        for (run_id,) in connection.execute(f"SELECT run_uuid FROM runs WHERE run_uuid IN ({chosen})", (ids,)):
            tags[run_id] = {}
        rows = connection.execute(f"SELECT run_uuid, key, value FROM tags WHERE run_uuid IN ({chosen})", (ids,))
        for run_id, key, value in rows:
            tags[run_id][key] = value
    return tags


@contextmanager
def _reading(file: Path) -> Iterator[sqlite3.Connection]:
    mode = "ro"
    while True:
        try:
            with closing(sqlite3.connect(f"{file.as_uri()}?mode={mode}", uri=True)) as connection:
                connection.execute("SELECT name FROM sqlite_master LIMIT 1").fetchone()
                yield connection
                return
        except sqlite3.OperationalError as error:
            # A writer was killed: what it did not complete must be undone before anybody can read.
            if mode == "rw" or error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
                raise TrackingError(f"{file} cannot be read: {error}") from error
            mode = "rw"
        except sqlite3.DatabaseError as error:
            raise TrackingError(f"{file} is not an MLflow store: {error}") from error
