"""What a run leaves in MLflow, and how its status stays true when something fails.

Everything is in the run's journal on disk before it reaches MLflow: a store that is away loses nothing.
"""

import json
import logging
import os
import re
import stat
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from qlora_exp.config.schema import Config
from qlora_exp.config.untrusted import plain_yaml
from qlora_exp.config.values import APART, flatten, to_yaml, what_counts
from qlora_exp.environment import provenance
from qlora_exp.tracking import run_key
from qlora_exp.tracking.journal import CONFIG_FILE, FILE, LOCK_FILE, Journal, is_held, is_over, last_message, read
from qlora_exp.tracking.mlflow_store import client, has_lost, is_refused, store_uri, tell
from qlora_exp.utils.errors import ConfigError, JournalError, TrackingError, first_line, type_and_first_line
from qlora_exp.utils.secrets import redact
from qlora_exp.utils.signals import held

log = logging.getLogger(__name__)

LOG_FILE = "run.log"
CURVES = ("train/", "eval/")
"""Prefixes of metrics that have a value at many steps."""
PARAM_LIMIT = 6000
_RETRY_SECONDS = 30.0
_LONGEST_RETRY_SECONDS = 600.0
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


class Tracker:
    """One MLflow run. Every message is in the journal before it is sent; the store gets what it missed later."""

    def __init__(self, journal: Journal, uri: str | None, resumed: bool = False) -> None:
        self.output_dir = journal.folder
        self.resumed = resumed
        """Whether an earlier process began this run."""
        self._journal = journal
        self._journal.use(store_uri(uri))
        self._uri = uri
        self._mlflow: MlflowClient | None = None
        self._retry_at = 0.0
        self._patience = _RETRY_SECONDS
        self._known: dict[tuple[int, str], float] = {}
        self._summary: dict[str, float] = {}
        if resumed:
            for message in journal.messages():
                if message["op"] == "metrics":
                    self._known |= {(message["step"], key): value for key, value in message["values"].items()}
                    self._summary |= _without_curves(message["values"])

    @property
    def run_id(self) -> str | None:
        """MLflow's; None until a store that was away at the start is back."""
        return self._journal.state.get("run_id")

    def params(self, values: dict[str, Any]) -> None:
        """Parameters; a value beyond MLflow's 6000 characters is cut here, and is whole in the artifacts."""
        self._send(op="params", values={key: redact(str(value))[:PARAM_LIMIT] for key, value in values.items()})

    def tags(self, values: dict[str, Any]) -> None:
        """Tags."""
        self._send(op="tags", values={key: redact(str(value)) for key, value in values.items()})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Metrics of one step; what is measured once is of step 0, which MLflow draws as bars.

        A resumed run repeats no point of a curve, and no value that it already told.
        """
        new = {
            key: value
            for key, value in values.items()
            if (step, key) not in self._known or (not key.startswith(CURVES) and self._known[step, key] != value)
        }
        self._summary |= _without_curves(values)
        if new:
            self._send(op="metrics", step=step, timestamp=_now(), values=new)

    def text(self, text: str, name: str) -> None:
        """A text artifact, kept in the output folder too."""
        self._journal.check()  # a folder that was deleted is not made again
        file = self.output_dir / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(redact(text), encoding="utf-8")
        self.file(name)

    def json(self, value: Any, name: str) -> None:
        """A JSON artifact, kept in the output folder too."""
        self.text(json.dumps(value, indent=1, ensure_ascii=False, default=str), name)

    def table(self, columns: dict[str, list[Any]], name: str) -> None:
        """A table that the MLflow UI shows as one."""
        rows = zip(*columns.values(), strict=True)
        self.json({"columns": list(columns), "data": [[str(value) for value in row] for row in rows]}, name)
        self.tags({"mlflow.loggedArtifacts": json.dumps([{"path": name, "type": "table"}])})

    def file(self, name: str) -> None:
        """A file of the output folder as an artifact, by its path there."""
        self._send(op="file", path=name)

    def dataset(self, name: str, digest: str, source: str, context: str, rows: int) -> None:
        """A dataset as an input of the run; `digest` is of all rows, where MLflow's own reads the first 10,000."""
        self._send(op="dataset", name=name, digest=digest, source=redact(source), context=context, rows=rows)

    def model(self, folder: str, name: str, params: dict[str, Any], step: int) -> None:
        """A trained adapter or model, in a folder of the output folder, as a logged model: `load` brings it back.

        It gets the metrics that were told before under `after/`, as measured on the dataset `evaluation`.
        """
        clean = {key: redact(str(value))[:500] for key, value in params.items()}
        # MLflow allows these in names of runs, not of models.
        self._send(op="model", folder=folder, name=re.sub(r"[/:.%\"']", "-", name), params=clean, step=step)

    def check(self) -> None:
        """That the output folder is still this run's.

        Raises:
            JournalError: it was deleted or replaced.
        """
        self._journal.check()

    def describe(self, markdown: str) -> None:
        """What MLflow shows above everything else of the run; what is beyond its 8000 characters is cut."""
        self.tags({"mlflow.note.content": markdown[:8000]})

    def view(self, key: str, value: str) -> None:
        """A saved view of the experiment's runs (`views`)."""
        self._send(op="view", key=key, value=value)

    def _send(self, **message: Any) -> None:
        self._journal.append(message)
        if time.monotonic() >= self._retry_at:
            self.deliver()

    def connect(self) -> MlflowClient:
        """The store's client.

        Raises:
            TrackingError: it does not answer.
        """
        if self._mlflow is None:
            with held():
                self._mlflow = client(self._uri)
        return self._mlflow

    def deliver(self, strict: bool = False) -> bool:
        """Send what MLflow has not got yet, in order; whether it has everything now.

        Args:
            strict: raise what the store raises, instead of keeping the messages for later.

        Raises:
            JournalError: a message cannot be read; those before it are sent.
        """
        for message, offset in self._journal.undelivered():
            try:
                with held():
                    tell(self.connect(), self._journal, message)
            except JournalError:
                raise
            except Exception as error:  # whatever the store or its artifact store raises: training must go on
                if has_lost(error, self._mlflow, self.run_id):
                    log.warning("MLflow has lost this run: it is told all of it again")
                    self._journal.forget()
                    return self.deliver(strict)
                if strict and not is_refused(error, message):
                    raise
                if is_refused(error, message):  # for good; what comes after it must not wait
                    log.error("MLflow refuses a message, which is left out: %s", redact(first_line(error)))  # noqa: TRY400
                else:
                    if self._retry_at == 0.0:
                        log.warning(
                            "MLflow does not take a message; the run goes on and keeps it: %s",
                            redact(first_line(error)),
                        )
                    self._retry_at = time.monotonic() + self._patience
                    self._patience = min(2 * self._patience, _LONGEST_RETRY_SECONDS)  # one that hangs takes its time
                    return False
            self._journal.note(offset=offset)
        self._retry_at, self._patience = 0.0, _RETRY_SECONDS
        return True

    def close(self) -> None:
        """Let another process have the folder."""
        self._journal.close()

    def end(self, status: str, outcome: str, failure: str | None = None, **facts: Any) -> None:
        """Give the run its final status (FINISHED, FAILED or KILLED), after everything else was told.

        Args:
            status: MLflow's.
            outcome: ok, pruned, oom, nan, killed, timeout, error.
            failure: one line that says why.
            facts: kept in the journal's last message, for those who list runs without MLflow.
        """
        why = {} if failure is None else {"failure": redact(failure)}
        last = {"status": status, "outcome": outcome, "timestamp": _now(), **why, **facts, "metrics": self._summary}
        self._retry_at = 0.0
        try:
            if (self.output_dir / LOG_FILE).is_file():
                self.file(LOG_FILE)
            self.tags({"outcome": outcome, **why})
            self._send(op="end", **last)
        except (OSError, JournalError) as lost:  # how a run ended is told even where the disk takes no more
            if str(lost) not in (failure or ""):
                log.error("the journal cannot be written: %s", lost)  # noqa: TRY400
            try:
                for message in ({"op": "tags", "values": {"outcome": outcome, **why}}, {"op": "end", **last}):
                    tell(self.connect(), self._journal, message)
            except (MlflowException, TrackingError) as error:
                log.error("MLflow does not take how the run ended: %s", redact(first_line(error)))  # noqa: TRY400
        if self._retry_at:
            log.error(
                "MLflow did not take everything of this run; it is kept in %s, and `qlora-exp sync` sends it later",
                self.output_dir,
            )


def _without_curves(values: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if not key.startswith(CURVES)}


def _now() -> int:
    return int(time.time() * 1000)


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
            _reap(tracker.connect(), experiment, uri)
        if resumed:
            journal.append({"op": "resume", "tags": alive | {"failure": ""}})
        else:
            named = {key: redact(value) for key, value in tags.items()} | alive | {"attempt": uuid.uuid4().hex}
            begin = {"experiment": experiment, "uri": store_uri(uri), "run_name": run_name, "timestamp": _now()}
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


def finish(folder: Path, outcome: str, failure: str, uri: str | None = None) -> bool:
    """Send what the run in `folder` left undelivered; if its process died without a word, end it with `outcome`.

    Returns:
        Whether MLflow has everything now; False too while a living process holds the folder.

    Raises:
        JournalError: a message cannot be read; those before it are sent, and the run is not ended.
    """
    try:
        journal = Journal(folder)
    except Timeout:
        return False
    try:
        begin = next(journal.messages(), None)
        if begin is None:
            return True
        try:
            tracker = Tracker(journal, uri or begin["uri"], resumed=True)
        except JournalError:
            with suppress(JournalError):  # the same
                Tracker(journal, uri or begin["uri"]).deliver()
            raise
        last = last_message(folder)
        if last is not None and last["op"] != "end":
            tracker.end("KILLED" if outcome == "killed" else "FAILED", outcome, failure)
        return tracker.deliver()
    finally:
        journal.close()


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
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return "killed"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "oom"
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY):
        return "oom"
    named = {"DivergedError": "nan", "TimeLimitError": "timeout", "PrunedError": "pruned"}
    return named.get(type(error).__name__, "error")


def _reap(mlflow: MlflowClient, experiment: str, uri: str | None) -> None:
    """Runs whose process on this host is gone without a word (kill -9, power) are KILLED, not RUNNING for ever."""
    found = mlflow.get_experiment_by_name(experiment)
    if found is None:
        return
    recorded = provenance.process()
    for run in mlflow.search_runs([found.experiment_id], "attributes.status = 'RUNNING'"):
        tags, run_id, why = run.data.tags, run.info.run_id, "MLflow did not get all of it"
        folder = Path(tags.get("process.folder", ""))
        try:
            if not provenance.is_dead({key: tags.get(f"process.{key}", "") for key in recorded}):
                continue
            _check_stale(folder, tags.get("attempt"))
            if not finish(folder, "killed", "its process is gone", uri) and is_held(folder):  # it goes on
                continue
        except Exception as error:  # tags and folder are what anybody wrote: they must not stop the run that begins
            why = type_and_first_line(error)
        try:
            if mlflow.get_run(run_id).info.status == "RUNNING":
                log.warning("run %s in %s is gone, and is KILLED as it stands: %s", run_id, folder, redact(why))
                mlflow.set_tag(run_id, "outcome", "killed")
                mlflow.set_terminated(run_id, "KILLED")
        except MlflowException as error:  # it may have been deleted just now
            log.warning("run %s in %s stays RUNNING: %s", run_id, folder, redact(first_line(error)))


def _check_stale(folder: Path, attempt: str | None) -> None:
    """That the journal in `folder` is this user's and the attempt's: the tag is what anybody may have written.

    Raises:
        JournalError: it is not, or cannot be read.
        OSError: it is not there.
    """
    for path in (folder, folder / FILE):
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid():
            raise JournalError(f"{path}: a link, or another user's")
    begin = next((message for message, _ in read(folder / FILE)), None)
    if begin is None or attempt is None or begin["tags"].get("attempt") != attempt:
        raise JournalError(f"{folder}: holds another run")


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
