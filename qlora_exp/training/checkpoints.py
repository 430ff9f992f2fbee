"""Find the trainer's checkpoints on disk: the complete ones, and the one to resume from. Imports no slow packages."""

import json
import logging
from pathlib import Path

from qlora_exp.config.schema import Config
from qlora_exp.utils.errors import ConfigError

log = logging.getLogger(__name__)


def checkpoints(folder: Path) -> list[Path]:
    """List the trainer's checkpoints in `folder`, oldest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()), key=step)


def step(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def is_complete(checkpoint: Path) -> bool:
    """Check whether a checkpoint is complete.

    The trainer state is written last: it is missing or truncated if the process was killed while it saved.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoint_to_resume(config: Config, output_dir: Path, resumed: bool, same_start: bool = True) -> Path | None:
    """Return the checkpoint to resume from; None to train from the start.

    For an interrupted run this is its own newest complete checkpoint; if there is none, and for a new run, the
    configured one. An interrupted run whose method cannot be resumed is trained from the start.

    Args:
        config: `training.resume_from_checkpoint` is a checkpoint, or an output folder whose newest checkpoint is used.
        output_dir: the run's output folder.
        resumed: whether an earlier process started the run.
        same_start: whether the adapter has the same initial weights as in that process.

    Raises:
        ConfigError: there is no complete checkpoint where the config says.
    """
    why = config.refusal("resume") or (None if same_start else "the adapter's initial weights are not reproduced here")
    if resumed and why:
        log.info("training starts over: method=%s cannot be resumed (%s)", config.method.name, why)
        return None
    configured = config.training.resume_from_checkpoint
    own = [folder for folder in checkpoints(output_dir / "checkpoints") if is_complete(folder)] if resumed else []
    if own or configured is None:
        return own[-1] if own else None
    path = Path(configured)
    candidates = [path] if is_complete(path) else [*checkpoints(path), *checkpoints(path / "checkpoints")]
    complete = [folder for folder in candidates if is_complete(folder)]
    if not complete:
        raise ConfigError(
            f"training.resume_from_checkpoint: no checkpoint in {configured}; give a checkpoint or an output folder"
        )
    return complete[-1]
