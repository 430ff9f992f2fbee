"""Cache of folders that are built once and used by every run, such as converted models and tokenized rows.

Several processes can use it at the same time. It does not interpret the contents of its folders.
"""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import platformdirs
from filelock import FileLock

from qlora_exp.utils.digests import file_digest
from qlora_exp.utils.errors import CacheError
from qlora_exp.utils.files import own_user

_MANIFEST = "qlora_exp_manifest.json"


def cache_dir() -> Path:
    """Return this user's cache folder: `user-ID` in `$QLORA_EXP_CACHE`, else `qlora_exp` in the user's cache folder.

    Several users can set the same `$QLORA_EXP_CACHE`. What another user writes there is not used.
    """
    shared = os.environ.get("QLORA_EXP_CACHE")
    return Path(shared, f"user-{os.geteuid()}") if shared else Path(platformdirs.user_cache_dir("qlora_exp"))


def built(name: str, build: Callable[[Path], None]) -> Path:
    """Return the complete folder `name` of the cache; build it if it is missing or damaged, once for all processes.

    Args:
        name: name of the folder in the cache.
        build: writes the contents into an empty folder.

    Raises:
        CacheError: the cache cannot be written.
    """
    folder = cache_dir() / name
    try:
        _make_own(cache_dir())
        with FileLock(f"{folder}.lock"):
            if not _intact(folder):
                for leftover in (folder, *cache_dir().glob(f"{name}.*/")):  # also those of killed builds
                    shutil.rmtree(leftover, ignore_errors=True)
                scratch = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=cache_dir()))
                try:
                    build(scratch)
                    manifest = {file.name: file_digest(file) for file in sorted(scratch.iterdir())}
                    (scratch / _MANIFEST).write_text(json.dumps(manifest, indent=1))
                    scratch.rename(folder)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        denied = isinstance(error, PermissionError)
        remedy = "let its users make folders there (chmod 1777)" if denied else "free space there"
        raise CacheError(
            f"cannot write to the cache {cache_dir()} ({error.strerror or error}): "
            f"{remedy}, or set QLORA_EXP_CACHE to another folder"
        ) from error
    return folder


def _make_own(folder: Path) -> None:
    """Make a folder that only this user can enter, or check that the existing one belongs to this user.

    Raises:
        OSError: it belongs to another user, is a link in a folder of several users, or cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.stat(follow_symlinks="QLORA_EXP_CACHE" not in os.environ)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))
    if status.st_uid != own_user(folder):
        raise PermissionError(errno.EPERM, "belongs to another user", str(folder))


def _intact(folder: Path) -> bool:
    """Return whether every file still has the contents that were written."""
    try:
        files = sorted(folder.iterdir())
        return _has_its_digests(folder, tuple((file.name, *_state(file.stat())) for file in files))
    except (OSError, ValueError, AttributeError):
        return False


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache
def _has_its_digests(folder: Path, _files: tuple[tuple[str, int, int, int], ...]) -> bool:
    """Compare the digests of all files, once for each state of them: for a real model this takes a second."""
    manifest = json.loads((folder / _MANIFEST).read_text())
    return all(file_digest(folder / name) == digest for name, digest in manifest.items())
