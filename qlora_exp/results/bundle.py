"""A recorded run as one folder or zip, to share without the store: config, lock, fingerprints, metrics, samples.

A bundle is somebody else's word: of its files only those named here are read, as text, none larger than a limit.
What it says of its author's machine is what can change a result, and no path.
"""

import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_exp.config.values import APART
from qlora_exp.results.records import Record
from qlora_exp.tracking.journal import CONFIG_FILE, LOCK_FILE
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.secrets import redact
from qlora_exp.utils.units import MIB

RUN_FILE = "run.json"
METRICS = ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss")
"""Those of which every step is kept."""
_FILES = (
    CONFIG_FILE, LOCK_FILE, "label_audit.json", "peft_config.json", "samples.json",
    "evaluation/before_losses.jsonl", "evaluation/after_losses.jsonl", "evaluation/answers.json",
    "evaluation/before_unrelated_losses.jsonl", "evaluation/after_unrelated_losses.jsonl",
    "evaluation/before_lm_eval.json", "evaluation/after_lm_eval.json",
)  # fmt: skip
_LIMIT = 64 * MIB
# Whose keys begin so is shared; other tags are of the author's machine, account or sweep.
_TAGS = (
    "identity.",
    "version.",
    "git.",
    "run_key",
    "outcome",
    "hardware.threads",
    "hardware.cuda",
    "hardware.platform",
)


class _Run(BaseModel):
    """What `run.json` says."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    format: Literal[1]
    run_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    name: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    curves: dict[str, list[tuple[int, float]]]
    seed_losses: list[float]


@dataclass(frozen=True)
class BundledRecord(Record):
    """A run in a bundle."""

    told: _Run
    read: Callable[[str], str]
    """The text of one of its files, empty if it is not there."""

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Every value of a metric of `METRICS` with its step, in order."""
        return self.told.curves.get(metric, [])

    def text(self, path: str) -> str:
        """One of the bundle's files; empty if there is none."""
        return self.read(path)

    def seed_losses(self) -> list[float]:
        """What its author's store had when the bundle was made."""
        return self.told.seed_losses


def write(record: Record, target: Path) -> None:
    """Make a bundle of a run; where `target` ends in .zip it is one file, else a folder.

    Raises:
        ConfigError: the target is there already or cannot be written, or the run has no config.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already; choose another: --out PATH")
    if target.suffix not in ("", ".zip") or not target.parent.is_dir():
        raise ConfigError(f"cannot write {target}: a bundle is a .zip or a folder, in a folder that is there")
    config = {key: value for key, value in record.yaml().items() if key not in APART}
    files = {name: text for name in _FILES if (text := record.text(name))}
    if audit := files.get("label_audit.json"):  # without the training row that it shows
        files["label_audit.json"] = json.dumps(json.loads(audit) | {"sample": None}, indent=1)
    files[CONFIG_FILE] = yaml.safe_dump(_without_folders(config), sort_keys=False)
    told = _Run(
        format=1,
        run_id=record.run_id,
        name=record.name,
        params=_without_folders(record.params),
        tags={key: value for key, value in record.tags.items() if key.startswith(_TAGS)},
        metrics=record.metrics,
        curves={metric: curve for metric in METRICS if (curve := record.curve(metric))},
        seed_losses=record.seed_losses(),
    )
    files[RUN_FILE] = told.model_dump_json(indent=1)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as part:  # nothing is there until it is whole
            whole = Path(part, "bundle")
            for name, text in files.items():
                (whole / name).parent.mkdir(parents=True, exist_ok=True)
                (whole / name).write_text(redact(text), encoding="utf-8")
            if target.suffix == ".zip":
                whole = Path(shutil.make_archive(str(whole), "zip", whole))
            whole.rename(target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror or error}; choose another: --out PATH") from error


def _without_folders(value: Any) -> Any:
    """Paths as the names of their files: where they are on this machine helps nobody else."""
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    if isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value:
        return Path(value).name
    return value


def is_bundle(word: str) -> bool:
    """Whether this is a path, and not the id, key or name of a run."""
    try:
        return word.endswith(".zip") or Path(word).exists()
    except OSError:  # too long for a path
        return False


def read(path: Path) -> BundledRecord:
    """The run in a bundle.

    Raises:
        ConfigError: it is none, or is damaged or too large.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no bundle is there")

    def one(name: str) -> str:
        if name not in (*_FILES, RUN_FILE):
            return ""
        try:
            return (_of_zip if path.is_file() else _of_folder)(path, name)
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            what = "" if isinstance(error, zipfile.BadZipFile) else f"{name}: "
            raise ConfigError(f"{path}: no bundle that can be read: {what}{error}") from error

    try:
        if not (text := one(RUN_FILE)):
            raise ConfigError(f"{path}: no bundle of qlora-exp: it has no {RUN_FILE}")
        told = _Run.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = " ".join([*[".".join(map(str, first["loc"]))] * bool(first["loc"]), first["msg"]])
        raise ConfigError(f"{path}: no bundle of qlora-exp: {RUN_FILE}: {wrong}") from error
    return BundledRecord(told.run_id, told.name, told.params, told.tags, told.metrics, told, one)


def _of_zip(path: Path, name: str) -> str:
    with zipfile.ZipFile(path) as archive:
        if name not in archive.namelist():
            return ""
        with archive.open(name) as member:
            return _limited(member.read(_LIMIT + 1))


def _of_folder(path: Path, name: str) -> str:
    file = path / name
    if not file.is_file():
        return ""
    if not file.resolve().is_relative_to(path.resolve()):
        raise OSError("a link to outside of the bundle")
    with file.open("rb") as opened:
        return _limited(opened.read(_LIMIT + 1))


def _limited(content: bytes) -> str:
    if len(content) > _LIMIT:
        raise OSError(f"larger than {_LIMIT >> 20} MiB")
    return content.decode("utf-8")
