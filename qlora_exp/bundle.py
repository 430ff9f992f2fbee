"""A recorded run as one folder or zip, to share without the store: config, lock, fingerprints, metrics, samples.

A bundle is somebody else's word: of its files only those named here are read, as text, none larger than a limit.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_exp.config import APART
from qlora_exp.errors import ConfigError
from qlora_exp.records import Record

RUN_FILE = "run.json"
CURVES = ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss")
_CONFIG = "qlora_exp.yaml"
_FILES = (
    _CONFIG, "environment.txt", "label_audit.json", "peft_config.json", "samples.json",
    "evaluation/before_losses.jsonl", "evaluation/after_losses.jsonl", "evaluation/answers.json",
)  # fmt: skip
_LIMIT = 64 * 2**20
# Of the author's machine and account, and of no use to others.
_PRIVATE = ("mlflow.", "process.", "hardware.host", "attempt")


class _Run(BaseModel):
    """What `run.json` says."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    run_id: str
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
        """Every value of a metric of `CURVES` with its step, in order."""
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
        ConfigError: the target is there already, or the run has no config.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already; choose another: --out PATH")
    files = {name: text for name in _FILES if (text := record.text(name))}
    if _CONFIG not in files:
        raise ConfigError(f"run {record.run_id} has no {_CONFIG}: it was not made by qlora-exp, or did not begin")
    config = yaml.safe_load(files[_CONFIG])
    files[_CONFIG] = yaml.safe_dump({key: value for key, value in config.items() if key not in APART}, sort_keys=False)
    told = _Run(
        run_id=record.run_id,
        name=record.name,
        params=record.params,
        tags={key: value for key, value in record.tags.items() if not key.startswith(_PRIVATE)},
        metrics=record.metrics,
        curves={metric: curve for metric in CURVES if (curve := record.curve(metric))},
        seed_losses=record.seed_losses(),
    )
    files[RUN_FILE] = told.model_dump_json(indent=1)
    # Under another name until it is whole.
    part = target.with_name(f"{target.name}.part")
    if target.suffix == ".zip":
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    else:
        for name, text in files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text(text, encoding="utf-8")
    part.rename(target)


def is_bundle(path: Path) -> bool:
    """Whether there is a file that may be a bundle, or a folder that looks like one."""
    return path.is_file() or (path / RUN_FILE).is_file()


def read(path: Path) -> BundledRecord:
    """The run in a bundle.

    Raises:
        ConfigError: it is none, or is damaged or too large.
    """
    if not is_bundle(path):
        raise ConfigError(f"{path}: no bundle is there")

    def one(name: str) -> str:
        if name not in (*_FILES, RUN_FILE):
            return ""
        try:
            return (_of_zip if path.is_file() else _of_folder)(path, name)
        except (OSError, zipfile.BadZipFile, UnicodeDecodeError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(f"{path}: no bundle that can be read: {name}: {error}") from error

    try:
        told = _Run.model_validate_json(one(RUN_FILE))
    except ValidationError as error:
        raise ConfigError(f"{path}: no bundle of qlora-exp: {RUN_FILE}: {str(error).splitlines()[0]}") from error
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
