"""Find the files of rows that a path names: one file, a folder, a pattern, or a URL of these, which is fetched."""

import errno
import logging
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from qlora_exp.config.sections.dataset import (
    COMPRESSED,
    FILE_FORMATS,
    file_format,
    is_pattern,
    is_url,
    saved_dataset,
)
from qlora_exp.utils.cache import built
from qlora_exp.utils.digests import file_digest, json_digest
from qlora_exp.utils.errors import DataError, UserError, last_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class File:
    """A file of rows."""

    path: Path
    """Where it is on this machine."""
    name: str
    """How messages name it: as the user did."""

    @property
    def format(self) -> str | None:
        """Format of its rows: json, csv, parquet or arrow."""
        return file_format(self.name)


_ARCHIVES = {".zip": "unzip", ".tar": "tar xf", ".tgz": "tar xf", ".7z": "7z x", ".rar": "unrar x"}
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "eval",
    "evaluation": "eval",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "heldout": "test",
}
"""Split that a word in a file's name says, as the hub's datasets are named."""
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that `datasets` writes beside rows."""


def check(path: str, key: str = "dataset.path") -> None:
    """Check that `path` names files of rows; of a URL, that it can name some. Nothing is fetched.

    Raises:
        DataError: it does not; the message says what to do.
    """
    if is_url(path):
        _check_name(path, path, key)
        _file_system(path)
    elif saved_dataset(path) is None:
        find(path, key)


def folder_digest(folder: Path) -> str:
    """Return the digest of all files of a folder that `save_to_disk` wrote."""
    return json_digest({str(file.relative_to(folder)): file_digest(file) for file in sorted(folder.rglob("*.*"))})


def find(path: str, key: str = "dataset.path") -> list[File]:
    """Return the files that `path` names, in the order of their names. Files of a URL are fetched into the cache.

    Raises:
        DataError: there are none, or not all of them are files of rows; the message says what to do.
    """
    if is_url(path):
        return fetch(path, key)
    place = Path(path)
    if place.is_file():
        _check_name(path, path, key)
        return [_readable(File(place, path))]
    if place.is_dir():  # links to folders are not followed, but named
        names = [str(file) for file in place.rglob("*") if file.is_file() or file.is_symlink()]
    elif is_pattern(path):
        names = _matches(path)
    else:
        if "," in path:
            raise DataError(f"{key}: no file {path}; name several files by a folder or a pattern, such as rows/*.jsonl")
        what = "file" if file_format(path) else "file or folder"
        raise DataError(f"{key}: no {what} {path} (working directory: {Path.cwd()})")
    chosen = _chosen(names, str(place) if place.is_dir() else path, place.is_dir(), key)
    return [_readable(File(Path(name), name)) for name in chosen]


def _matches(pattern: str) -> list[str]:
    from glob import glob

    return [name for name in glob(pattern, recursive=True) if Path(name).is_file()]


def _chosen(names: Iterable[str], path: str, is_folder: bool, key: str) -> list[str]:
    """Return those of `names` that are read, in order: all matches of a pattern, the files of rows of a folder.

    Raises:
        DataError: no file is left, or they belong to several splits.
    """
    below = {name: str(PurePosixPath(name).relative_to(path)) if is_folder else name for name in sorted(names)}
    visible = [name for name, inside in below.items() if not is_folder or not _is_hidden(inside)]
    chosen = [name for name in visible if not is_folder or (file_format(name) and _base(name) not in _METADATA)]
    if not chosen:
        what = f"the folder {path} has no file of rows" if is_folder else f"no file matches {path}"
        raise DataError(f"{key}: {what} ({_formats()}; working directory: {Path.cwd()})")
    for name in chosen:
        _check_name(name, path, key, is_file=True)
    splits = {_split_of(below[name]): name for name in reversed(chosen)}
    if len(splits) > 1 and splits.keys() != {"", "train"}:
        some = "; ".join(f"{name} ({split or 'no split'})" for split, name in sorted(splits.items()))
        if is_folder:
            raise DataError(
                f"{key}: {path} has files of several splits: {some}; name those to train on and the held-out ones "
                f"apart: dataset.path='{path}/**/*train*' dataset.eval_path=...; '{path}/**/*' reads all as one"
            )
        _log_once(logging.WARNING, f"{path}: files of several splits are read as one: {some}")
    ignored = [name for name in visible if name not in set(chosen)]
    others = f"; not read: {', '.join(ignored[:3])}{' ...' if ignored[3:] else ''}" if ignored else ""
    read = f"{len(chosen)} files, from {chosen[0]} to {chosen[-1]}" if chosen[1:] else chosen[0]
    _log_once(logging.INFO, f"{path}: {read}{others}")
    return chosen


@cache
def _log_once(level: int, line: str) -> None:
    """Log a line, but not again each time that a run looks for its files."""
    log.log(level, "%s", line)


def _is_hidden(name: str) -> bool:
    """Return whether a file or one of its folders is not meant to be read, such as `_SUCCESS` or `.cache/x`."""
    return any(part.startswith((".", "_")) and part not in (".", "..") for part in PurePosixPath(name).parts)


def _split_of(name: str) -> str:
    """Return the split that a file's name says, such as `test` for `data/test-00000.parquet`; nothing if none."""
    found = [_SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS]
    return found[-1] if found else ""


def _base(name: str) -> str:
    return PurePosixPath(name).name


def _check_name(name: str, path: str, key: str, is_file: bool = False) -> None:
    """Check by its name that a file has a known format; unless `is_file`, names that may be folders pass."""
    suffix = PurePosixPath(name.lower()).suffix
    where = f"{key}: {name}" if name == path else f"{key}: {path} names {name}, which"
    if suffix in _ARCHIVES or name.lower().endswith(".tar.gz"):
        raise DataError(f"{where} is an archive; unpack it first: {_ARCHIVES.get(suffix, 'tar xf')} {name}")
    if not is_file and (is_pattern(name) or (is_url(name) and not suffix)):
        return
    kind = file_format(name)
    if kind is None:
        raise DataError(f"{where}: unknown file format; use one of {_formats()}")
    if kind in ("parquet", "arrow") and suffix in COMPRESSED:
        raise DataError(f"{where} is compressed as a whole; decompress it first, as {kind} is read in parts")


def _formats() -> str:
    return f"{', '.join(FILE_FORMATS)}; text files may end in {', '.join(COMPRESSED)}"


def _readable(file: File) -> File:
    try:
        with file.path.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror}") from error
    if empty:
        raise DataError(f"{file.name}: the file is empty")
    return file


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path there.

    Raises:
        DataError: a package for it is missing.
    """
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0]
    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {scheme}:// needs a package: {last_line(error)}") from error
    return system, path


@cache
def fetch(url: str, key: str = "dataset.path") -> list[File]:
    """Copy the files of a URL into the cache, again if one has changed there; once in each process.

    Raises:
        DataError: they cannot be fetched, or are no files of rows.
    """
    system, path = _file_system(url)
    try:
        is_page = url.startswith("http") and file_format(path) is not None  # its links would make it a folder
        is_folder = not is_pattern(path) and not is_page and system.isdir(path)
        names = system.glob(path) if is_pattern(path) else system.find(path) if is_folder else [path]
        chosen = _chosen(names, path, is_folder, key)
        versions = {name: _version(system, name) for name in chosen}
        folder = built(f"files-{json_digest([url, versions])}", lambda part: _download(system, chosen, part))
    except UserError:
        raise
    except Exception as error:  # of any kind: each file system has its own
        raise DataError(f"{key}: {url} cannot be fetched: {last_line(error) or type(error).__name__}") from error
    files = [
        File(folder / _local_name(number, name), system.unstrip_protocol(name)) for number, name in enumerate(chosen)
    ]
    return [_readable(file) for file in files]


def _version(system: Any, name: str) -> Any:
    """Return what changes when a file does; for servers that do not say, something new each time."""
    if not name.startswith("http"):
        return system.ukey(name)
    stated = system.info(name)
    return stated if stated.keys() & {"ETag", "Last-Modified", "Content-MD5", "Digest"} else time.time_ns()


def _download(system: Any, names: list[str], folder: Path) -> None:
    from tqdm import tqdm

    for number, name in enumerate(tqdm(names, desc="fetching", unit="file", leave=False, disable=None)):
        try:
            system.get_file(name, str(folder / _local_name(number, name)))
        except Exception as error:  # of any kind: each file system has its own
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            raise DataError(f"{name} cannot be fetched: {last_line(error) or type(error).__name__}") from error


def _local_name(number: int, name: str) -> str:
    return f"{number:05d}{''.join(PurePosixPath(name).suffixes[-2:])}"
