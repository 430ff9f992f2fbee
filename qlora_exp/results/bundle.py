"""Write a past run to a folder or zip, to share it without the MLflow store, and read such bundles.

A bundle has the config, the list of package versions, fingerprints, metrics and samples. It is untrusted input: only
the files named here are read, as text, up to a size limit. About the author's machine it contains what can change a
result, and no paths.
"""

import json
import lzma
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_exp.config.values import APART, values_to_yaml, without_places
from qlora_exp.results.record import Record
from qlora_exp.tracking.journal import CONFIG_FILE, LOCK_FILE
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.files import scratch_folder
from qlora_exp.utils.secrets import redact, redacted
from qlora_exp.utils.units import MIB

RUN_FILE = "run.json"
METRICS = ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss")
"""Metrics saved with every step; of other metrics only the last value is saved."""
_FILES = (
    CONFIG_FILE, LOCK_FILE, "label_audit.json", "sources.json", "peft_config.json", "samples.json",
    "evaluation/before_losses.jsonl", "evaluation/after_losses.jsonl", "evaluation/answers.json",
    "evaluation/before_unrelated_losses.jsonl", "evaluation/after_unrelated_losses.jsonl",
    "evaluation/before_lm_eval.json", "evaluation/after_lm_eval.json",
)  # fmt: skip
_LIMIT = 64 * MIB
_DAMAGED = (
    OSError, EOFError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
"""What reading a damaged or hostile file of any kind of archive raises."""
# Tags are shared if their key begins with one of these; others concern the author's machine, account or sweep.
_TAGS = (
    "identity.",
    "version.",
    "git.",
    "run_key",
    "outcome",
    "hardware.threads",
    "hardware.cuda",
    "hardware.platform",
    "metric.",
    "metric_failed.",
    "loss.",
)


class _Run(BaseModel):
    """Content of `run.json`."""

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
    """A past run, read from a bundle."""

    run_file: _Run
    """Content of `run.json`."""
    read: Callable[[str], str]
    """Function that returns the text of a file of the bundle; empty if the file is missing."""

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Return every value of a metric of `METRICS` with its step, in order."""
        return self.run_file.curves.get(metric, [])

    def text(self, path: str) -> str:
        """Return the text of a file of the bundle; empty if the file is missing."""
        return self.read(path)

    def seed_losses(self) -> list[float]:
        """Return the held-out losses of other seeds that the author's store had when the bundle was made."""
        return self.run_file.seed_losses


def write(record: Record, target: Path) -> None:
    """Write a bundle of a run.

    Args:
        record: the run.
        target: path of the bundle: a file if it ends in .zip, else a folder.

    Raises:
        ConfigError: the target exists already or cannot be written, or the run has no config.
    """
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another path: --out PATH")
    if target.suffix not in ("", ".zip") or not target.parent.is_dir():
        raise ConfigError(
            f"cannot write {target}: a bundle is a .zip file or a folder without suffix, inside an existing folder"
        )
    config = {key: value for key, value in record.yaml().items() if key not in APART}
    files = {name: redact(text) for name in _FILES if (text := record.text(name))}
    if audit := files.get("label_audit.json"):  # leave out the example of a training row
        files["label_audit.json"] = json.dumps(json.loads(audit) | {"sample": None}, indent=1)
    files[CONFIG_FILE] = values_to_yaml(without_places(config))
    run_file = _Run(
        format=1,
        run_id=record.run_id,
        name=redact(record.name),
        params=redacted(without_places(record.params)),
        tags=redacted({key: value for key, value in record.tags.items() if key.startswith(_TAGS)}),
        metrics=record.metrics,
        curves={metric: curve for metric in METRICS if (curve := record.curve(metric))},
        seed_losses=record.seed_losses(),
    )
    files[RUN_FILE] = run_file.model_dump_json(indent=1)
    try:
        with scratch_folder(target.parent) as temporary:  # the target appears only once it is complete
            complete = temporary / "bundle"
            for name, text in files.items():
                (complete / name).parent.mkdir(parents=True, exist_ok=True)
                (complete / name).write_text(text, encoding="utf-8")
            if target.suffix == ".zip":
                complete = Path(shutil.make_archive(str(complete), "zip", complete))
            complete.rename(target)
    except OSError as error:
        raise ConfigError(
            f"cannot write {target}: {error.strerror or error}; choose another path: --out PATH"
        ) from error


def is_bundle(word: str) -> bool:
    """Return whether `word` is a path, and not the id, run key or name of a run."""
    try:
        return word.endswith(".zip") or Path(word).exists()
    except OSError:  # too long for a path
        return False


def read(path: Path) -> BundledRecord:
    """Read the run in a bundle.

    Raises:
        ConfigError: the path does not exist, is not a bundle, is damaged, or has a file larger than the limit.
    """
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file or folder")
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"{path}: a config alone has no results: give the folder, the id or the bundle of its run")

    try:
        read_file = _of_zip(zipfile.ZipFile(path)) if path.is_file() else partial(_of_folder, path)
    except _DAMAGED as error:
        raise ConfigError(f"{path}: this bundle cannot be read: {error}") from error

    def read_text(name: str) -> str:
        if name not in (*_FILES, RUN_FILE):
            return ""
        try:
            return read_file(name)
        except _DAMAGED as error:
            raise ConfigError(f"{path}: this bundle cannot be read: {name}: {error}") from error

    try:
        if not (text := read_text(RUN_FILE)):
            raise ConfigError(
                f"{path}: not a bundle of qlora-exp, nor the output folder of a run: {RUN_FILE} is missing"
            )
        run_file = _Run.model_validate_json(text)
    except ValidationError as error:
        first_error = error.errors()[0]
        problem = " ".join([*[".".join(map(str, first_error["loc"]))] * bool(first_error["loc"]), first_error["msg"]])
        raise ConfigError(f"{path}: not a bundle of qlora-exp: {RUN_FILE}: {problem}") from error
    return BundledRecord(
        run_file.run_id, run_file.name, run_file.params, run_file.tags, run_file.metrics, run_file, read_text
    )


def _of_zip(archive: zipfile.ZipFile) -> Callable[[str], str]:
    """Return a function that reads a file of the archive, whose list of files is read only once."""
    names = set(archive.namelist())
    if len(names) < len(archive.namelist()):
        raise zipfile.BadZipFile("it has two files of one name")

    def read_file(name: str) -> str:
        if name not in names:
            return ""
        with archive.open(name) as member:
            return _limited(member.read(_LIMIT + 1))

    return read_file


def _of_folder(path: Path, name: str) -> str:
    file = path / name
    if not file.is_file():
        return ""
    if not file.resolve().is_relative_to(path.resolve()):
        raise OSError("this is a link to a file outside the bundle")
    with file.open("rb") as opened:
        return _limited(opened.read(_LIMIT + 1))


def _limited(content: bytes) -> str:
    if len(content) > _LIMIT:
        raise OSError(f"larger than {_LIMIT >> 20} MiB")
    return content.decode("utf-8")
