"""The trainer's checkpoints on disk: which there are, and which a kill did not cut off. Imports nothing heavy."""

import json
from pathlib import Path


def checkpoints(folder: Path) -> list[Path]:
    """The trainer's checkpoints in `folder`, oldest first."""
    return sorted((found for found in folder.glob("checkpoint-*") if found.name[11:].isdigit()), key=step)


def step(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def is_whole(checkpoint: Path) -> bool:
    """Whether its last file was written, whole: one that a kill cut off has no trainer state, or half of one."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True
