"""Decide where MLflow stores runs."""

import re
from pathlib import Path

from qlora_exp.tracking.stores import sqlite_store

_RELATIVE = re.compile(r"^sqlite(\+\w+)?:///(?!/|:memory:|file:)")


def store_uri(uri: str | None) -> str:
    """Return the tracking URI: `uri` if set, else that of an SQLite database in `mlruns/`.

    A relative SQLite path is relative to the working directory, as for MLflow.
    """
    here = str(Path.cwd()).replace("%", "%25").replace("?", "%3F")  # SQLAlchemy decodes them
    return _RELATIVE.sub(lambda match: f"{match[0]}{here}/", uri or "sqlite:///mlruns/mlflow.db", count=1)


def exists(uri: str | None = None) -> bool:
    """Check whether a store may exist: false only for an SQLite database whose file does not."""
    file = sqlite_store.sqlite_file(store_uri(uri))
    return file is None or file.is_file()
