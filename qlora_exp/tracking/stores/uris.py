"""Decide where MLflow stores runs, and in which experiment.

A key of the config or `--uri` comes first, then MLflow's own environment variables, then the default.
"""

import functools
import logging
import os
import socket
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from qlora_exp.config.schema import Config
from qlora_exp.tracking.stores.sqlite_store import sqlite_file
from qlora_exp.utils.errors import ConfigError, TrackingError, first_line
from qlora_exp.utils.secrets import HOW_TO_GIVE, redact, secret_in_uri

log = logging.getLogger(__name__)

VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
_DEFAULT_EXPERIMENT = "qlora_exp"
_SQLITE = b"SQLite format 3\0"
_ANSWERS_IN = 3.0
"""Seconds to wait for a server's answer."""
_PACKAGES = {
    "psycopg": "'qlora-exp[postgres]'",
    "psycopg2": "psycopg2-binary",
    "mysqldb": "mysqlclient",
    "mysqlconnector": "mysql-connector-python",
}
"""What to install for a database driver, if it is not a package of that name."""


def given_uri(uri: str | None) -> str | None:
    """Return `uri`, or the one in `MLFLOW_TRACKING_URI`; None if neither is set."""
    return uri or os.environ.get(VARIABLE) or None


def origin(uri: str | None) -> str:
    """Return what the URI comes from, for messages."""
    in_environment = os.environ.get(VARIABLE)
    return VARIABLE if in_environment and uri in (None, "", in_environment) else "tracking.uri"


def store_uri(uri: str | None) -> str:
    """Return the tracking URI: that of `given_uri`, else of an SQLite database in `mlruns/` of the working directory.

    The path of an SQLite database becomes absolute.

    Raises:
        ConfigError: the URI contains a secret, which would be written to files, or names no file.
    """
    if (given := given_uri(uri)) is None:
        return _of_file(Path.cwd() / "mlruns" / "mlflow.db")
    if secret := secret_in_uri(given):
        raise ConfigError(f"{origin(uri)}: {secret} in it would be written to files; {HOW_TO_GIVE}")
    try:
        database = make_url(given)
    except ArgumentError:  # not the URI of a database
        return given
    except ValueError as error:
        raise ConfigError(f"{origin(uri)}: {redact(given)} is no address: {first_line(error)}") from error
    if database.get_backend_name() != "sqlite":
        return given
    if not database.database or database.database.startswith((":", "file:")):
        raise ConfigError(f"{origin(uri)}: {given} names no file for the database; write sqlite:///FOLDER/mlflow.db")
    file = Path(database.database)
    if file.is_absolute():
        return given
    if not database.query and database.drivername == "sqlite":
        return _of_file(Path.cwd() / file)
    return database.set(database=str(Path.cwd() / file)).render_as_string(hide_password=False)


def exists(uri: str | None = None) -> bool:
    """Check whether a store may exist: false only for an SQLite database whose file does not."""
    file = sqlite_file(store_uri(uri))
    return file is None or file.is_file()


def _of_file(file: Path) -> str:
    """Return the URI of an SQLite file; characters that have a meaning in URIs are encoded."""
    plain = f"sqlite:///{file}"
    if make_url(plain).database == str(file):
        return plain
    return URL.create("sqlite", database=str(file)).render_as_string()


def check_driver(uri: str) -> None:
    """Check that the driver of a database is installed.

    Raises:
        ConfigError: it is not; the message names the package.
    """
    if "://" not in uri or uri.startswith("http"):
        return
    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        driver = make_url(uri).get_driver_name()
        raise ConfigError(
            f"tracking.uri: {redact(uri)} needs the database driver {driver}, which cannot be imported "
            f"({first_line(error)}): pip install {_PACKAGES.get(driver, driver)}"
        ) from error
    except ArgumentError:  # not a database that SQLAlchemy supports, which MLflow will say
        return


def check_files(uri: str) -> None:
    """Check what can be seen of a store on this machine without opening it.

    Raises:
        ConfigError: it is a folder, which MLflow refuses, or a file that is no database.
    """
    file = sqlite_file(uri)
    if file is None:
        allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
        if urlsplit(uri).scheme in ("", "file") and not uri.startswith("databricks") and not allowed:
            folder = unquote(urlsplit(uri).path)
            raise ConfigError(
                f"tracking.uri: {redact(uri)} is a folder, in which MLflow keeps no runs any more: use "
                f"sqlite:///{redact(folder)}/mlflow.db (`mlflow migrate-filestore` moves older runs into one; "
                "MLFLOW_ALLOW_FILE_STORE=true still allows a folder)"
            )
    elif file.is_dir():
        raise ConfigError(f"tracking.uri: {file} is a folder; name the database's file, such as {uri}/mlflow.db")
    elif file.is_file():
        with file.open("rb") as content:
            begin = content.read(len(_SQLITE))
        if begin not in (b"", _SQLITE):  # another process may be about to write the first bytes
            raise ConfigError(f"tracking.uri: {file} is no SQLite database, and so no MLflow store: name another file")


def check_answers(uri: str | None) -> None:
    """Check that a server is there, before a run costs time; whether it is one of MLflow's is found out later.

    Raises:
        TrackingError: its name is not known, or nothing answers at its address.
    """
    address = store_uri(uri)
    if urlsplit(address).scheme not in ("http", "https"):
        return
    try:
        urlopen(f"{address.rstrip('/')}/health", timeout=_ANSWERS_IN).close()
    except URLError as error:
        if isinstance(error.reason, ConnectionRefusedError | socket.gaierror):
            raise TrackingError(
                f"{origin(uri)}: nothing answers at {redact(address)} ({error.reason}); to train without it: "
                f"tracking=local, and later `qlora-exp sync --uri {redact(address)}`"
            ) from error
    except (OSError, ValueError, HTTPException):  # slow, behind a proxy, ...: MLflow's client may still reach it
        return


def experiment_name(name: str | None) -> str:
    """Return the MLflow experiment: `name`, else the one in `MLFLOW_EXPERIMENT_NAME`, else `qlora_exp`.

    Raises:
        ConfigError: the name contains a secret.
    """
    in_environment = os.environ.get(EXPERIMENT_VARIABLE)
    if not name and not in_environment and "MLFLOW_EXPERIMENT_ID" in os.environ:
        _warn_of_id()
    chosen = name or in_environment or _DEFAULT_EXPERIMENT
    if redact(chosen) != chosen:
        key = "tracking.experiment_name" if name else EXPERIMENT_VARIABLE
        raise ConfigError(f"{key}: contains a secret, and everybody who uses MLflow would see it; change the name")
    return chosen


@functools.cache
def _warn_of_id() -> None:
    log.warning("MLFLOW_EXPERIMENT_ID is not used: experiments are chosen by name, with %s", EXPERIMENT_VARIABLE)


def resolved(config: Config) -> Config:
    """Return the config with the URI and the experiment that apply; `tracking.uri` stays null for the default store."""
    uri = store_uri(config.tracking.uri) if given_uri(config.tracking.uri) else None
    update = {"uri": uri, "experiment_name": experiment_name(config.tracking.experiment_name)}
    return config.model_copy(update={"tracking": config.tracking.model_copy(update=update)})
