"""Find the trainer's checkpoints on disk: those that are whole, and the one to resume from. Imports nothing heavy."""

import json
import logging
from pathlib import Path

from qlora_exp.config.schema import Config
from qlora_exp.utils.errors import ConfigError

log = logging.getLogger(__name__)


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


def checkpoint_to_resume(config: Config, output_dir: Path, resumed: bool, same_start: bool = True) -> Path | None:
    """The checkpoint to go on from: of a cut-off run its own newest, else the configured one; None: from the start.

    A run whose method cannot be resumed starts over.

    Args:
        config: `training.resume_from_checkpoint` is a checkpoint, or an output folder whose newest one is taken.
        output_dir: the run's own.
        resumed: the run was begun before.
        same_start: its adapter starts as it did then.

    Raises:
        ConfigError: there is no checkpoint where the config says.
    """
    why = config.refusal("resume") or (None if same_start else "its adapter starts otherwise here")
    if resumed and why:
        log.info("from the start: method=%s cannot be resumed (%s)", config.method.name, why)
        return None
    configured = config.training.resume_from_checkpoint
    own = [folder for folder in checkpoints(output_dir / "checkpoints") if is_whole(folder)] if resumed else []
    if own or configured is None:
        return own[-1] if own else None
    path = Path(configured)
    found = [path] if is_whole(path) else [*checkpoints(path), *checkpoints(path / "checkpoints")]
    whole = [folder for folder in found if is_whole(folder)]
    if not whole:
        raise ConfigError(f"training.resume_from_checkpoint: no checkpoint in {configured}")
    return whole[-1]
