"""Start and end a run in MLflow, so that its status is correct whatever happens during the run."""

import logging
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType

from filelock import Timeout
from mlflow.exceptions import MlflowException

from qlora_exp.config.schema import Config
from qlora_exp.config.untrusted import plain_yaml
from qlora_exp.config.values import APART, flatten, result_values, to_yaml
from qlora_exp.distributed import watch
from qlora_exp.environment import provenance
from qlora_exp.environment.ranks import ranks
from qlora_exp.tracking import run_key
from qlora_exp.tracking.journal import CONFIG_FILE, LOCK_FILE, Journal, has_ended, last_message, read
from qlora_exp.tracking.journal import FILE as JOURNAL_FILE
from qlora_exp.tracking.recovery import finish, reap
from qlora_exp.tracking.refusals import cause, hint
from qlora_exp.tracking.stores import known_stores
from qlora_exp.tracking.stores.uris import VARIABLE, experiment_name, given_uri, resolved, store_uri
from qlora_exp.tracking.tracker import Tracker, now_ms
from qlora_exp.utils.errors import (
    ConfigError,
    DivergedError,
    JournalError,
    PrunedError,
    RankError,
    TimeLimitError,
    TrackingError,
    is_out_of_memory,
    type_and_first_line,
)
from qlora_exp.utils.processes.signals import ignore_signals
from qlora_exp.utils.secrets import redact, redacted, redacted_tags

log = logging.getLogger(__name__)


def open_run(
    folder: Path,
    uri: str | None,
    experiment: str | None,
    run_name: str,
    tags: Mapping[str, str],
    must_reach: bool = True,
) -> Tracker:
    """Start a run in `folder`, or resume the one that an earlier process left unfinished there; return its tracker.

    Args:
        folder: the run's output folder, which contains its journal.
        uri: tracking URI of the MLflow store, as in the config.
        experiment: name of the MLflow experiment, as in the config.
        run_name: display name of the run.
        tags: tags of the run; tags that describe this process are added.
        must_reach: refuse to start if the store does not answer; if false, the run starts and is sent to it later.

    Raises:
        ConfigError: the URI or the experiment contains a secret, or the driver of the database is missing.
        TrackingError: the store cannot be reached, or another process has locked the folder.
        JournalError: what an earlier process left there cannot be read.
    """
    experiment, address = experiment_name(experiment), store_uri(uri)
    if not uri and given_uri(uri):
        log.info("MLflow: %s (%s)", redact(address), VARIABLE)
    try:
        journal = Journal(folder)
    except Timeout as error:
        raise TrackingError(
            f"{folder}: another process is running there; wait for it to end or choose another folder"
        ) from error
    resumed = journal.file.is_file() and journal.file.stat().st_size > 0
    process_tags = {f"process.{key}": value for key, value in provenance.process().items()}
    process_tags |= {"process.folder": str(folder), "outcome": "running"}
    process_tags |= {"mlflow.source.name": tags.get("mlflow.source.name") or provenance.command()}
    process_tags |= {"mlflow.source.type": "LOCAL", "mlflow.user": provenance.user()}
    try:
        tracker = Tracker(journal, uri, resumed)
        known_stores.remember(store_uri(uri))
        if must_reach:
            reap(tracker.connect(), experiment, uri)
        try:
            tracker.recall()
        except (MlflowException, TrackingError) as error:
            if must_reach:
                raise
            log.warning("MLflow does not say which points it has, so some may be there twice: %s", cause(error))
        if resumed:
            journal.append({"op": "resume", "tags": process_tags | {"failure": ""}})
        else:
            all_tags = {**tags, **process_tags, "attempt": uuid.uuid4().hex}
            begin = {"experiment": experiment, "uri": address, "run_name": run_name, "timestamp": now_ms()}
            journal.append({"op": "start", **begin, "tags": all_tags})
        tracker.deliver(strict=must_reach)
    except BaseException as error:  # the lock is released after any error; an interrupted start keeps its journal
        refused = isinstance(error, MlflowException | TrackingError) and "run_id" not in journal.state
        if refused and not resumed:
            journal.discard()
        journal.close()
        if isinstance(error, MlflowException):
            raise TrackingError(f"MLflow at {redact(address)}: {cause(error)}{hint(error)}") from error
        raise
    return tracker


@contextmanager
def start(
    config: Config, output_dir: Path, tags: Mapping[str, str] = MappingProxyType({}), must_reach: bool = True
) -> Iterator[Tracker]:
    """Track the work inside the `with` block as an MLflow run, which becomes FINISHED only if the block succeeds.

    An exception makes the run FAILED, with the traceback as an artifact; Ctrl-C, SIGTERM and exits make it KILLED. An
    interrupted run in the same folder is resumed.

    Raises:
        ConfigError: the folder contains another run, or one that has ended.
        TrackingError: the store cannot be reached.
    """
    config = resolved(config)
    tracker = _begin(config, output_dir, tags, must_reach)
    begin = time.monotonic()
    watch.at_failure(lambda failure: _end(tracker, failure, time.monotonic() - begin))
    try:
        with _in_its_folder(tracker):
            _describe(tracker, config)
            yield tracker
    except BaseException as error:  # any end of a run is recorded, and the error is raised again
        # Of several processes, the others end now, and then the launcher interrupts this one.
        with ignore_signals() if ranks().size > 1 else nullcontext():
            failure = watch.cause(error)  # another process of the run failed first
            _end(tracker, failure or error, time.monotonic() - begin)
        if failure is not None:
            raise failure from error
        raise
    tracker.end("FINISHED", "ok", seconds=time.monotonic() - begin)
    tracker.close()


def _end(tracker: Tracker, error: BaseException, seconds: float) -> None:
    """Record how a run ended with an error."""
    outcome = _outcome(error)
    try:
        # After a JournalError the output folder may be gone, with no place for the traceback.
        if outcome != "pruned" and not isinstance(error, JournalError):
            reported = error.report if isinstance(error, RankError) else ""
            tracker.text(reported or "".join(traceback.format_exception(error)), "traceback.txt")
    except (OSError, JournalError) as write_error:  # the disk may be what failed
        log.error("the traceback could not be written: %s", write_error)  # noqa: TRY400
    finally:
        status = {"killed": "KILLED", "pruned": "FINISHED"}.get(outcome, "FAILED")
        tracker.end(status, outcome, type_and_first_line(error), seconds=seconds)
        tracker.close()


@contextmanager
def _in_its_folder(tracker: Tracker) -> Iterator[None]:
    """Fail a run whose output folder was deleted or replaced, with that as the reason, whatever error it caused first.

    Raises:
        JournalError: the folder was deleted or replaced.
    """
    try:
        yield
    except Exception:
        tracker.check()
        raise
    tracker.check()


def _begin(config: Config, output_dir: Path, tags: Mapping[str, str], must_reach: bool) -> Tracker:
    _check_folder(config, output_dir)
    parts = {f"identity.{part}": digest for part, digest in run_key.digests(config).items()}
    all_tags = {**redacted_tags(config.tracking.tags), **tags, **parts, "run_key": run_key.run_key(config)}
    job_name = all_tags.pop("mlflow.runName", None)  # MLflow refuses a run with a name and another one in this tag
    name = config.tracking.run_name or job_name or run_name(config)
    return open_run(output_dir, config.tracking.uri, config.tracking.experiment_name, name, all_tags, must_reach)


def _describe(tracker: Tracker, config: Config) -> None:
    values = flatten(config)
    counts = {key: value for key, value in values.items() if key.split(".")[0] not in APART}
    tracker.params({key: value for key, value in counts.items() if value is not None})  # unset keys are not shown
    tracker.text(to_yaml(config), CONFIG_FILE)
    packages = provenance.environment().items()
    tracker.text("".join(f"{name}=={version}\n" for name, version in packages), LOCK_FILE)
    versions = provenance.libraries(config.quantization.quant_method)
    tracker.tags({f"version.{name}": version for name, version in versions.items()})
    tracker.tags({f"git.{name}": value for name, value in provenance.git().items()})


def _check_folder(config: Config, folder: Path) -> None:
    """Refuse a folder that contains another run, or a run that has ended."""
    last = last_message(folder)
    if last is None:
        return
    if has_ended(last):
        has_checkpoints = last["outcome"] != "ok" and any((folder / "checkpoints").glob("checkpoint-*"))
        raise ConfigError(
            f"{folder}: contains a run that has ended ({last['outcome']}); choose another folder: hydra.run.dir=FOLDER"
            + f", and to go on from its checkpoints: training.resume_from_checkpoint={folder}" * has_checkpoints
        )
    file = folder / CONFIG_FILE
    recorded = plain_yaml(file.read_text("utf-8", errors="replace"), str(file)) if file.is_file() else None
    if recorded is None:  # the run was interrupted before its config was written
        return
    if not isinstance(recorded, dict) or not isinstance(recorded.get("model"), dict):
        raise ConfigError(f"{file} contains no config; choose another folder: hydra.run.dir=FOLDER")
    if result_values(recorded) != result_values(redacted(config.model_dump(mode="json"))):
        raise ConfigError(
            f"{folder}: contains an unfinished run of another config; choose another folder: hydra.run.dir=FOLDER"
        )
    begun, _ = next(read(folder / JOURNAL_FILE))
    if config.model.adapter and begun["tags"].get("identity.adapter") != run_key.adapter_version(config):
        raise ConfigError(
            f"{folder}: contains an unfinished run that began with another adapter than model.adapter="
            f"{config.model.adapter} is now; put that one back, or choose another folder: hydra.run.dir=FOLDER"
        )


def record_dead_process(config: Config, folder: Path, tags: Mapping[str, str], outcome: str, failure: str) -> None:
    """Record how a job ended whose process died before it could record that itself; start its run if there is none."""
    if last_message(folder) is None:
        config = resolved(config)
        tracker = _begin(config, folder, tags, must_reach=False)
        _describe(tracker, config)
        tracker.close()
    finish(folder, outcome, failure, store_uri(config.tracking.uri))


def record_dead_main(config: Config, folder: Path, tags: Mapping[str, str], failure: RankError) -> None:
    """Record how a run of several processes ended whose main process died; do nothing if it has recorded its end."""
    last = last_message(folder)
    if last is not None and last["op"] != "end":
        record_dead_process(config, folder, tags, failure.outcome, str(failure))


def record_failure(config: Config, folder: Path, tags: Mapping[str, str], error: BaseException) -> None:
    """Record a FAILED run for a job that could not start."""
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
        case RankError():
            return error.outcome
        case PrunedError():
            return "pruned"
        case _ if is_out_of_memory(error):
            return "oom"
        case _:
            return "error"


def run_name(config: Config) -> str:
    """Return a default name for the run, made of its model, dataset, method, quantization, variant, rank and seed."""
    model = config.model.model_name_or_path.rstrip("/").split("/")[-1].split(":")[-1]
    parts = [model, config.dataset.name, config.method.name]
    if config.quantization.quantized:
        parts.append(config.quantization.name)
    if config.lora_variant.name != "lora":
        parts.append(config.lora_variant.name)
    if config.distributed.engine != "none":
        parts.append(f"{config.distributed.name}{config.distributed.num_processes}")
    if "r" in config.method.settings:
        parts.append(f"r{config.method.settings['r']}")
    return "-".join([*parts, f"s{config.seed}"])
