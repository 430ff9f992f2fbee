"""Write files and measure their size."""

import os
from pathlib import Path


def size_on_disk(folder: str | Path) -> int:
    """Return the size of all files under `folder`, in bytes."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def write_atomically(file: Path, text: str) -> None:
    """Replace `file` in one step: a reader sees either the complete old text or the complete new text."""
    part = file.with_name(f"{file.name}.part")
    with part.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)
