"""Write and measure files."""

import os
from pathlib import Path


def size_on_disk(folder: str | Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def write_atomically(file: Path, text: str) -> None:
    """Replace `file` in one step: whoever reads it sees all of the old or all of the new text."""
    part = file.with_name(f"{file.name}.part")
    with part.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)
