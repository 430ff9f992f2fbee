"""Write files in one step, open files without following links, and measure sizes."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePath
from stat import S_ISREG
from typing import BinaryIO, TextIO

from qlora_exp.utils.errors import ModelError

_PREFIX, _SUFFIX = ".qlora_exp.", ".part"


def size_on_disk(folder: str | Path) -> int:
    """Return the size of all files under `folder`, in bytes."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def check_source(source: str, key: str = "") -> None:
    """Check that a model's source, if it can only be a folder, is one.

    Args:
        source: a run id, a run key, a run's name, a `models:/...` URI, or a folder.
        key: what a message begins with.

    Raises:
        ModelError: there is no such folder.
    """
    is_name = source.startswith("models:/") or not re.search(r"^[.~]|[/\\]", source)
    if not is_name and not Path(source).expanduser().is_dir():
        raise ModelError(f"{key}{source}: there is no such folder; name a run, models:/NAME/VERSION, or a saved folder")


def write_atomically(file: Path, content: str | bytes) -> None:
    """Replace `file` in one step: a reader sees either the complete old content or the complete new content."""
    with replacing(file) as out:
        if isinstance(content, str):
            out.write(content)
        else:
            out.buffer.write(content)


@contextmanager
def replacing(file: Path) -> Iterator[TextIO]:
    """Open a temporary file next to `file`; it replaces `file` at the end, or is removed if there is an error.

    The temporary file is new and has a random name, so that nobody can put a link in its place. Those that killed
    processes left in the folder are removed first.
    """
    _remove_leftovers(file.parent)
    part, descriptor = _temporary(file.parent, folder=False)
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        try:
            yield out
            out.flush()
            os.fsync(out.fileno())
            part.replace(file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Make a temporary folder in `parent` that only this user can enter; it is removed at the end.

    Those that killed processes left in `parent` are removed first.
    """
    _remove_leftovers(parent)
    folder, descriptor = _temporary(parent, folder=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _temporary(parent: Path, folder: bool) -> tuple[Path, int]:
    """Create and lock a temporary file or folder; the lock ends when the process ends, however it ends."""
    while True:
        path = parent / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        if folder:
            path.mkdir(mode=0o700)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        else:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with suppress(OSError):  # a file system without locks: leftovers stay there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # another process may have removed it before it was locked
            return path, descriptor
        os.close(descriptor)


def _remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left in `parent`: nobody has locked it."""
    with suppress(OSError), os.scandir(parent) as entries:
        leftovers = [entry.path for entry in entries if entry.name.startswith(_PREFIX)]
    for path in leftovers:
        with suppress(OSError):  # locked, removed by another process, or not this user's
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if S_ISREG(os.fstat(descriptor).st_mode):
                    os.unlink(path)
                else:
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)


def open_inside(folder: Path, path: str, owner: int | None = None) -> BinaryIO:
    """Open a regular file inside `folder` for reading; links below `folder` are not followed.

    Args:
        folder: the folder; it may be a link itself.
        path: path of the file, relative to the folder.
        owner: user id that the file, and the folders between, must have; None: any.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is not a regular file inside the folder, belongs to another user, or cannot be read.
    """
    try:
        with ExitStack() as stack:
            return os.fdopen(os.dup(_descriptor(stack, folder, path, owner)), "rb")
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), f"{folder}/{path!r}") from error
    except OSError as error:
        problem = "a link, or below a link" if error.errno in (errno.ELOOP, errno.ENOTDIR) else error.strerror
        raise OSError(error.errno, problem, f"{folder}/{path}") from error


def _descriptor(stack: ExitStack, folder: Path, path: str, owner: int | None) -> int:
    """Open every folder on the path in the one before it, so that nobody can replace one of them by a link."""
    parts = PurePath(path).parts
    if not parts or PurePath(path).is_absolute() or ".." in parts:
        raise OSError(errno.EINVAL, "not a path inside the folder")
    entry = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, entry)
    for number, part in enumerate(parts, 1):
        kind = os.O_NONBLOCK if number == len(parts) else os.O_DIRECTORY
        entry = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=entry)
        stack.callback(os.close, entry)
        if owner is not None and os.fstat(entry).st_uid != owner:
            raise OSError(errno.EPERM, "belongs to another user")
    if not S_ISREG(os.fstat(entry).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return entry


def copy_without_links(folder: Path, target: Path) -> None:
    """Copy the files of a folder into an existing one.

    Raises:
        OSError: one is a link or not a regular file, or cannot be copied.
    """
    for file in sorted(folder.rglob("*")):
        copy = target / file.relative_to(folder)
        if file.is_dir() and not file.is_symlink():
            copy.mkdir()
        else:
            with open_inside(folder, str(file.relative_to(folder))) as source, copy.open("wb") as out:
                shutil.copyfileobj(source, out)


def not_a_link(path: str, flags: int) -> int:
    """Open a file unless it is a link: an `opener` for `open`."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def own_user(folder: Path) -> int:
    """Return the user id that files of this process get in `folder`: some network file systems change it."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_uid


def remove_if_empty(folder: Path) -> None:
    """Remove the empty output folder of a run or sweep that was refused, and the empty folders around it."""
    kept = {Path.cwd(), *Path.cwd().parents}
    for empty in (folder.absolute(), *folder.absolute().parents):
        if empty in kept or not empty.is_dir() or any(empty.iterdir()):
            return
        empty.rmdir()
