"""Remember to which MLflow stores this user sends runs, so that the journal of somebody else cannot choose one.

`sync` reads the store from the journal of each run. MLflow sends the user's token to a tracking server, and creates an
SQLite file that does not exist: neither may happen because of a folder that was only received.
"""

import json
from contextlib import suppress
from pathlib import Path

import platformdirs

from qlora_exp.tracking.stores.sqlite_store import sqlite_file
from qlora_exp.tracking.stores.uris import store_uri
from qlora_exp.utils.errors import TrackingError
from qlora_exp.utils.files import write_atomically
from qlora_exp.utils.secrets import redact

_MOST = 1000
_named: set[str] = set()
"""Stores that the user of this process named: the file may not be writable."""


def is_known(uri: str) -> bool:
    """Check whether a run may be sent to this store although the user does not name it now.

    It is the store that is used if none is named, or one that this user has named before.
    """
    return uri in (store_uri(None), *_named, *_remembered())


def remember(uri: str) -> None:
    """Remember a store that the user has named. If that cannot be written, `sync` will ask for `--uri` later."""
    _named.add(uri)
    known = _remembered()
    if uri not in known:
        with suppress(OSError):
            _file().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(_file(), json.dumps([*known, uri][-_MOST:], indent=1))


def store_of(folder: Path, uri: str) -> str:
    """Return the store that a journal names, if runs may be sent there.

    Raises:
        ConfigError: the URI contains a secret: an older version wrote it.
        TrackingError: this user has never sent runs there, or the folder of an SQLite store is gone.
    """
    if not is_known(uri):
        raise TrackingError(
            f"{folder}: its journal says to send the run to {redact(uri)}, where you have not sent runs before; "
            f"if that is right: --uri {redact(uri)}"
        )
    file = sqlite_file(uri)
    if file is not None and uri != store_uri(None) and not file.parent.is_dir():
        raise TrackingError(f"{folder}: the folder of its store {file} is not there; name another store: --uri URI")
    return store_uri(uri)


def _file() -> Path:
    return Path(platformdirs.user_state_dir("qlora_exp"), "stores.json")


def _remembered() -> list[str]:
    try:
        known = json.loads(_file().read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return [str(uri) for uri in known] if isinstance(known, list) else []
