"""The trainer's checkpoints on disk: which there are, and which a kill did not cut off. Imports nothing heavy."""

from pathlib import Path


def checkpoints(folder: Path) -> list[Path]:
    """The trainer's checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=step)


def step(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def is_whole(checkpoint: Path) -> bool:
    """Whether its last file was written: one that a kill cut off has no trainer state."""
    return (checkpoint / "trainer_state.json").is_file()
