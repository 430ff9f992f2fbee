"""Find the trainer's checkpoints on disk: the complete ones, and the one to resume from. Imports no slow packages."""

import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

from qlora_exp.config.schema import Config
from qlora_exp.utils.digests import file_digest
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.files import write_atomically

log = logging.getLogger(__name__)

_STATE = "trainer_state.json"
_DIGESTS = "qlora_exp_digests.json"


def checkpoints(folder: Path) -> list[Path]:
    """List the trainer's checkpoints in `folder`, oldest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()), key=step)


def step(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def is_complete(checkpoint: Path) -> bool:
    """Check quickly whether a checkpoint is complete: no file is missing or truncated.

    The trainer state is written last: it is missing or truncated if the process was killed while it saved.
    """
    return _truncated(checkpoint) is None


def seal(checkpoint: Path) -> None:
    """Note the digests of the files of a checkpoint, for `damaged_file`: the trainer saves none."""
    files = (file for file in checkpoint.iterdir() if file.is_file() and not file.name.startswith("."))
    names = sorted(file.name for file in files if file.name != _DIGESTS)
    # The files of torch.save are zip files, which contain checksums of all but their directory.
    digests = {name: (_directory_digest if _is_zip(name) else file_digest)(checkpoint / name) for name in names}
    write_atomically(checkpoint / _DIGESTS, json.dumps(digests, indent=1))


def damaged_file(checkpoint: Path) -> str | None:
    """Read all files of a checkpoint and return the name of the first one that is missing or damaged; None if none is.

    Of a checkpoint that this package did not write, missing and truncated files are noticed, but not changed weights.
    """
    if (name := _truncated(checkpoint)) is not None:
        return name
    digests = _digests(checkpoint)
    for file in sorted(file for file in checkpoint.iterdir() if file.is_file()):
        if _is_zip(file.name):
            if not _is_whole_zip(file, digests.get(file.name)):
                return file.name
        elif digests.get(file.name) not in (None, file_digest(file)):
            return file.name
    return None


def _truncated(checkpoint: Path) -> str | None:
    state = checkpoint / _STATE
    if not isinstance(_json(state), dict):
        return _STATE
    for name in _digests(checkpoint):
        if not (checkpoint / name).is_file():
            return name
    for file in sorted(file for file in checkpoint.iterdir() if file.is_file()):
        is_broken_zip = _is_zip(file.name) and not _has_directory(file)
        if is_broken_zip or (file.suffix == ".safetensors" and not _is_whole_safetensors(file)):
            return file.name
    return None


def _is_zip(name: str) -> bool:
    return name.endswith((".pt", ".pth"))


def _has_directory(file: Path) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # the end of the directory is damaged
        return False


def _directory_digest(file: Path) -> str:
    """Return the digest of the directory at the end of a zip file: names, places and checksums of what is in it."""
    with zipfile.ZipFile(file) as archive, file.open("rb") as content:
        content.seek(archive.start_dir)
        return hashlib.sha256(content.read()).hexdigest()


def _is_whole_zip(file: Path, directory: str | None) -> bool:
    try:
        if directory not in (None, _directory_digest(file)):
            return False
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged directory raises errors of many kinds
        return False


def _is_whole_safetensors(file: Path) -> bool:
    """Check the size that the file's header promises: 8 bytes, the header, and the tensors."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header = content.read(length) if length < file.stat().st_size else b""
    try:
        tensors = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return False
    return bool(file.stat().st_size == 8 + length + end)


def _digests(checkpoint: Path) -> dict[str, str | None]:
    """Return what `seal` wrote; empty for other checkpoints, and if the process was killed before it."""
    digests = _json(checkpoint / _DIGESTS)
    values = digests.items() if isinstance(digests, dict) else ()
    return {name: digest if isinstance(digest, str) else None for name, digest in values}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _newest_whole(folders: list[Path], best: bool) -> tuple[Path | None, str]:
    """Return the newest checkpoint without damage, and which files of newer ones are damaged.

    Args:
        folders: checkpoints, oldest first.
        best: whether training ends with the best checkpoint: then that must be without damage too.
    """
    damaged: list[str] = []
    for folder in reversed(folders):
        used = [folder]
        if best and (named := (_json(folder / _STATE) or {}).get("best_model_checkpoint")):
            used.append(Path(named))
        damage = next((f"{each.name}/{name}" for each in used if (name := damaged_file(each)) is not None), None)
        if damage is None:
            return folder, ", ".join(damaged)
        damaged.append(damage)
    return None, ", ".join(dict.fromkeys(damaged))


def checkpoint_to_resume(config: Config, output_dir: Path, resumed: bool, same_start: bool = True) -> Path | None:
    """Return the checkpoint to resume from; None to train from the start.

    For an interrupted run this is its own newest checkpoint without damage; if there is none, and for a new run, the
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
    best = config.training.load_best_model_at_end
    own = checkpoints(output_dir / "checkpoints") if resumed else []
    whole, damaged = _newest_whole(own, best)
    if damaged:
        log.warning("missing or damaged: %s; training %s", damaged, f"resumes from {whole}" if whole else "starts over")
    if whole and not (whole / _DIGESTS).is_file():  # the process was killed before `seal`, or in it
        seal(whole)
    if whole or configured is None:
        return whole
    path = Path(configured)
    candidates = [path] if (path / _STATE).exists() else [*checkpoints(path), *checkpoints(path / "checkpoints")]
    whole, damaged = _newest_whole(candidates, best)
    if whole is None:
        why = f"missing or damaged: {damaged}" if damaged else "give a checkpoint or an output folder"
        raise ConfigError(f"training.resume_from_checkpoint: no checkpoint in {configured} is complete; {why}")
    if damaged:
        log.warning("missing or damaged: %s; training resumes from %s", damaged, whole)
    return whole
