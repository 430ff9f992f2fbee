"""Begin and end a run in MLflow, so that its status is true whatever happens inside."""

import logging
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from filelock import Timeout
from mlflow.exceptions import MlflowException

from qlora_exp.config.schema import Config
from qlora_exp.config.untrusted import plain_yaml
from qlora_exp.config.values import APART, flatten, to_yaml, what_counts
from qlora_exp.environment import provenance
from qlora_exp.tracking import run_key
from qlora_exp.tracking.journal import CONFIG_FILE, LOCK_FILE, Journal, is_over, last_message
from qlora_exp.tracking.mlflow_store import store_uri
from qlora_exp.tracking.recovery import finish, reap
from qlora_exp.tracking.tracker import Tracker, now_ms
from qlora_exp.utils.errors import (
    ConfigError,
    DivergedError,
    JournalError,
    PrunedError,
    TimeLimitError,
    TrackingError,
    first_line,
    type_and_first_line,
)
from qlora_exp.utils.secrets import redact

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


def open_run(
    folder: Path, uri: str | None, experiment: str, run_name: str, tags: Mapping[str, str], must_reach: bool = True
) -> Tracker:
    """The tracker of a run that lives in `folder`: a new one, or the one that an earlier process left unfinished.

    Args:
        folder: where its journal is.
        uri: the MLflow store.
        experiment: MLflow's experiment.
        run_name: what people call it.
        tags: of the run, those of this process added.
        must_reach: refuse to begin where the store does not answer; false lets the run begin and tells the store later.

    Raises:
        TrackingError: the store cannot be reached, or another process holds the folder.
        JournalError: what an earlier process left there cannot be read.
    """
    try:
        journal = Journal(folder)
    except Timeout as error:
        raise TrackingError(f"{folder}: another process is running there") from error
    resumed = journal.file.is_file() and journal.file.stat().st_size > 0
    alive = {f"process.{key}": value for key, value in provenance.process().items()}
    alive |= {"process.folder": str(folder), "outcome": "running", "mlflow.source.name": redact(provenance.command())}
    alive |= {"mlflow.source.type": "LOCAL", "mlflow.user": provenance.user()}
    try:
        tracker = Tracker(journal, uri, resumed)
        if must_reach:
            reap(tracker.connect(), experiment, uri)
        if resumed:
            journal.append({"op": "resume", "tags": alive | {"failure": ""}})
        else:
            named = {key: redact(value) for key, value in tags.items()} | alive | {"attempt": uuid.uuid4().hex}
            begin = {"experiment": experiment, "uri": store_uri(uri), "run_name": run_name, "timestamp": now_ms()}
            journal.append({"op": "start", **begin, "tags": named})
        tracker.deliver(strict=must_reach)
    except BaseException as error:  # the folder is let go, whatever it was; an interrupted start keeps its journal
        if not resumed and isinstance(error, MlflowException | TrackingError):  # nothing began
            journal.file.unlink(missing_ok=True)
        journal.close()
        if isinstance(error, MlflowException):
            raise TrackingError(f"MLflow at {redact(store_uri(uri))}: {redact(first_line(error))}") from error
        raise
    return tracker


@contextmanager
def start(
    config: Config, output_dir: Path, tags: Mapping[str, str] = MappingProxyType({}), must_reach: bool = True
) -> Iterator[Tracker]:
    """An MLflow run around the work inside, FINISHED only if that ends well.

    An exception makes it FAILED with the traceback as an artifact; Ctrl-C, SIGTERM and exits make it KILLED.
    A run that was cut off in the same folder goes on.

    Raises:
        ConfigError: the folder holds another run, or one that ended.
        TrackingError: the store cannot be reached.
    """
    tracker = _begin(config, output_dir, tags, must_reach)
    begin = time.monotonic()
    try:
        with _in_its_folder(tracker):
            _describe(tracker, config)
            yield tracker
    except BaseException as error:  # every end of a run is recorded; nothing is swallowed
        outcome = _outcome(error)
        try:
            if outcome != "pruned" and not isinstance(error, JournalError):  # that has no folder to keep it in
                tracker.text("".join(traceback.format_exception(error)), "traceback.txt")
        except (OSError, JournalError) as full:  # the disk may be what failed
            log.error("the traceback cannot be kept: %s", full)  # noqa: TRY400
        finally:
            status = {"killed": "KILLED", "pruned": "FINISHED"}.get(outcome, "FAILED")
            tracker.end(status, outcome, type_and_first_line(error), seconds=time.monotonic() - begin)
            tracker.close()
        raise
    tracker.end("FINISHED", "ok", seconds=time.monotonic() - begin)
    tracker.close()


@contextmanager
def _in_its_folder(tracker: Tracker) -> Iterator[None]:
    """A run whose output folder goes away has failed, and for that reason, whatever stumbled over it first.

    Raises:
        JournalError: it went away.
    """
    try:
        yield
    except Exception:
        tracker.check()
        raise
    tracker.check()


def _begin(config: Config, output_dir: Path, tags: Mapping[str, str], must_reach: bool) -> Tracker:
    _check_folder(config, output_dir)
    parts = {f"identity.{part}": digest for part, digest in run_key.parts(config).items()}
    every = {**config.tracking.tags, **tags, **parts, "run_key": run_key.run_key(config)}
    name = config.tracking.run_name or every.pop("mlflow.runName", None) or run_name(config)
    return open_run(output_dir, config.tracking.uri, config.tracking.experiment_name, name, every, must_reach)


def _describe(tracker: Tracker, config: Config) -> None:
    values = flatten(config)
    counts = {key: value for key, value in values.items() if key.split(".")[0] not in APART}
    tracker.params({key: value for key, value in counts.items() if value is not None})  # what is not set is not shown
    tracker.text(to_yaml(config), CONFIG_FILE)
    packages = provenance.environment().items()
    tracker.text("".join(f"{name}=={version}\n" for name, version in packages), LOCK_FILE)
    versions = provenance.libraries(config.quantization.quant_method)
    tracker.tags({f"version.{name}": found for name, found in versions.items()})
    tracker.tags({f"git.{name}": found for name, found in provenance.git().items()})


def _check_folder(config: Config, folder: Path) -> None:
    """Refuse a folder that holds another run, or one that needs no more work."""
    last = last_message(folder)
    if last is None:
        return
    if is_over(last):
        raise ConfigError(f"{folder}: holds a run that ended ({last['outcome']}); choose another: hydra.run.dir=FOLDER")
    file = folder / CONFIG_FILE
    recorded = plain_yaml(file.read_text("utf-8", errors="replace"), str(file)) if file.is_file() else None
    if recorded is None:  # cut off before it was written
        return
    if not isinstance(recorded, dict) or not isinstance(recorded.get("model"), dict):
        raise ConfigError(f"{file} holds no config; choose another folder: hydra.run.dir=FOLDER")
    if what_counts(recorded) != what_counts(config.model_dump(mode="json")):
        raise ConfigError(f"{folder}: holds an unfinished run of another config; choose another: hydra.run.dir=FOLDER")


def record_death(config: Config, folder: Path, tags: Mapping[str, str], outcome: str, failure: str) -> None:
    """How the process of a job ended that did not live to say so itself, however far it came."""
    if last_message(folder) is None:
        tracker = _begin(config, folder, tags, must_reach=False)
        _describe(tracker, config)
        tracker.close()
    finish(folder, outcome, failure)


def record_failure(config: Config, folder: Path, tags: Mapping[str, str], error: BaseException) -> None:
    """Leave a FAILED run for a job that could not even begin."""
    with suppress(type(error)), start(config, folder, tags, must_reach=False):
        raise error


def _outcome(error: BaseException) -> str:
    match error:
        case KeyboardInterrupt() | SystemExit() | GeneratorExit():
            return "killed"
        case DivergedError():
            return "nan"
        case TimeLimitError():
            return "timeout"
        case PrunedError():
            return "pruned"
        case MemoryError():
            return "oom"
        case RuntimeError() if any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            return "oom"
        case _:
            return "error"


def run_name(config: Config) -> str:
    """A name that says what the run is: model, dataset, method, quantization, variant, rank, seed."""
    model = config.model.model_name_or_path.rstrip("/").split("/")[-1].split(":")[-1]
    parts = [model, config.dataset.name, config.method.name]
    if config.quantization.quantized:
        parts.append(config.quantization.name)
    if config.lora_variant.name != "lora":
        parts.append(config.lora_variant.name)
    if "r" in config.method.settings:
        parts.append(f"r{config.method.settings['r']}")
    return "-".join([*parts, f"s{config.seed}"])
