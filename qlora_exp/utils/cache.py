"""Cache of folders that are built once and used by every run, such as converted models and tokenized rows.

Several processes can use it at the same time. It does not interpret the contents of its folders.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock

from qlora_exp.utils.digests import file_digest
from qlora_exp.utils.errors import CacheError

_MANIFEST = "qlora_exp_manifest.json"


def cache_dir() -> Path:
    """Return the cache folder: `$QLORA_EXP_CACHE`, else `qlora_exp` in the user's cache folder."""
    return Path(os.environ.get("QLORA_EXP_CACHE") or platformdirs.user_cache_dir("qlora_exp"))


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
        cache_dir().mkdir(parents=True, exist_ok=True)
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
        raise CacheError(
            f"cannot write to the cache {cache_dir()} ({error.strerror or error}): "
            "free space there, or set QLORA_EXP_CACHE to another folder"
        ) from error
    return folder


def _intact(folder: Path) -> bool:
    """Return whether every file still has the contents that were written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return all(file_digest(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False
