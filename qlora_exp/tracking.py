"""MLflow: what a run leaves there, and how its status stays true when something fails.

Uses the client with explicit run ids, never MLflow's global active run, so that nothing else in the process
can end or overwrite a run. Metrics reach `metrics.jsonl` in the output folder before they reach MLflow.
"""

import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a server that is gone must not hold up training
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException

from qlora_exp import config as config_module
from qlora_exp import provenance
from qlora_exp.errors import TrackingError
from qlora_exp.schema import Config
from qlora_exp.secrets import redact

log = logging.getLogger(__name__)

CONFIG_FILE = "qlora_exp.yaml"
PARAM_LIMIT = 6000
_RETRY_SECONDS = 30.0
_REFUSED = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


def store_uri(uri: str | None) -> str:
    """The tracking URI: as given, or SQLite in `mlruns/` of the working directory."""
    return uri or f"sqlite:///{Path.cwd() / 'mlruns' / 'mlflow.db'}"


def client(uri: str | None = None) -> MlflowClient:
    """A client of a store that answers; an SQLite store is created first, by one process at a time.

    Raises:
        TrackingError: the store cannot be reached or created.
    """
    address = store_uri(uri)
    try:
        if address.startswith("sqlite:///"):
            # Several processes that create the database together would break it for good.
            file = Path(address.removeprefix("sqlite:///"))
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{file}.lock"):
                found = MlflowClient(address, registry_uri=address)
                found.search_experiments(max_results=1)
        else:
            found = MlflowClient(address, registry_uri=address)
            found.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise TrackingError(
            f"tracking.uri: MLflow at {redact(address)} does not answer or cannot be written: {redact(_short(error))}"
        ) from error
    return found


def _short(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


class Tracker:
    """One MLflow run. A store that stops answering loses nothing: what it missed is sent again, in order."""

    def __init__(self, mlflow: MlflowClient, run_id: str, experiment_id: str, output_dir: Path) -> None:
        self.run_id = run_id
        self.experiment_id = experiment_id
        self.output_dir = output_dir
        self._mlflow = mlflow
        self._missed: list[Callable[[], Any]] = []
        self._retry_at = 0.0

    def params(self, values: dict[str, Any]) -> None:
        """Parameters; a value beyond MLflow's 6000 characters is cut here, and is whole in the artifacts."""
        entries = [Param(key, redact(str(value))[:PARAM_LIMIT]) for key, value in values.items()]
        self._send(lambda: self._mlflow.log_batch(self.run_id, params=entries))

    def tags(self, values: dict[str, Any]) -> None:
        """Tags."""
        entries = [RunTag(key, redact(str(value))) for key, value in values.items()]
        self._send(lambda: self._mlflow.log_batch(self.run_id, tags=entries))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Metrics of one step: to disk first, then to MLflow."""
        now = int(time.time() * 1000)
        with (self.output_dir / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "timestamp": now, **values}) + "\n")
        entries = [Metric(key, value, now, step) for key, value in values.items()]
        self._send(lambda: self._mlflow.log_batch(self.run_id, metrics=entries))

    def text(self, text: str, name: str) -> None:
        """A text artifact, kept in the output folder too."""
        file = self.output_dir / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(redact(text), encoding="utf-8")
        self.file(file, str(Path(name).parent) if Path(name).parent.name else None)

    def json(self, value: Any, name: str) -> None:
        """A JSON artifact, kept in the output folder too."""
        self.text(json.dumps(value, indent=1, ensure_ascii=False, default=str), name)

    def table(self, columns: dict[str, list[Any]], name: str) -> None:
        """A table that the MLflow UI shows as one."""
        clean = {key: [redact(str(value)) for value in values] for key, values in columns.items()}
        self._send(lambda: self._mlflow.log_table(self.run_id, clean, name))

    def file(self, file: Path, folder: str | None = None) -> None:
        """An existing file as an artifact."""
        self._send(lambda: self._mlflow.log_artifact(self.run_id, str(file), folder))

    def dataset(self, name: str, digest: str, source: str, context: str, rows: int) -> None:
        """A dataset as an input of the run; `digest` is of all rows, where MLflow's own reads the first 10,000."""
        profile = json.dumps({"rows": rows})
        entity = Dataset(name, digest, "local", json.dumps({"path": redact(source)}), profile=profile)
        entry = DatasetInput(entity, [InputTag("mlflow.data.context", context)])
        self._send(lambda: self._mlflow.log_inputs(self.run_id, datasets=[entry]))

    def model(self, folder: Path, name: str, params: dict[str, Any], step: int) -> None:
        """A trained adapter or model as a logged model of the run: `load` brings it back."""

        created: list[str] = []  # a second attempt goes on with the first one's model

        def send() -> None:
            if not created:
                logged = self._mlflow.create_logged_model(
                    self.experiment_id,
                    name=name,
                    source_run_id=self.run_id,
                    model_type="peft-adapter" if (folder / "adapter_config.json").is_file() else "model",
                    params={key: redact(str(value))[:500] for key, value in params.items()},
                )
                created.append(logged.model_id)
            self._mlflow.log_model_artifacts(created[0], str(folder))
            self._mlflow.finalize_logged_model(created[0], LoggedModelStatus.READY)
            self._mlflow.log_outputs(self.run_id, [LoggedModelOutput(created[0], step)])

        self._send(send)

    def _send(self, call: Callable[[], Any]) -> None:
        self._missed.append(call)
        if time.monotonic() >= self._retry_at:
            self.deliver()

    def deliver(self) -> bool:
        """Send what MLflow has not got yet, in order; whether it has everything now."""
        while self._missed:
            try:
                self._missed[0]()
            except Exception as error:  # whatever the store or its artifact store raises: training must go on
                if getattr(error, "error_code", None) in _REFUSED:  # for good; what comes after it must not wait
                    log.error("MLflow refuses a message, which is left out: %s", redact(_short(error)))  # noqa: TRY400
                    self._missed.pop(0)
                    continue
                if self._retry_at == 0.0:
                    log.warning(
                        "MLflow does not take a message; the run goes on and keeps it: %s",
                        redact(_short(error)),
                    )
                self._retry_at = time.monotonic() + _RETRY_SECONDS
                return False
            self._missed.pop(0)
        self._retry_at = 0.0
        return True

    def end(self, status: str) -> None:
        """Give the run its final status (FINISHED, FAILED or KILLED), after everything else was delivered."""
        log_file = self.output_dir / "run.log"
        if log_file.is_file():
            self.file(log_file)
        self._missed.append(lambda: self._mlflow.set_terminated(self.run_id, status))
        if not self.deliver():
            log.error(
                "MLflow did not take everything of run %s; metrics and artifacts are in %s",
                self.run_id,
                self.output_dir,
            )


@contextmanager
def start(config: Config, output_dir: Path) -> Iterator[Tracker]:
    """An MLflow run around the work inside, FINISHED only if that ends well.

    An exception makes it FAILED with the traceback as an artifact; Ctrl-C, SIGTERM and exits make it KILLED.

    Raises:
        TrackingError: the store cannot be reached.
    """
    mlflow = client(config.tracking.uri)
    try:
        experiment_id = _experiment(mlflow, config.tracking)
        _reap(mlflow, experiment_id)
        tags = {
            **config.tracking.tags,
            **{f"process.{key}": value for key, value in provenance.process().items()},
            "outcome": "running",
            "mlflow.source.name": provenance.command(),
        }
        run = mlflow.create_run(
            experiment_id,
            run_name=config.tracking.run_name or run_name(config),
            tags={key: redact(value) for key, value in tags.items()},
        )
    except MlflowException as error:
        raise TrackingError(f"MLflow at {redact(store_uri(config.tracking.uri))}: {redact(_short(error))}") from error
    tracker = Tracker(mlflow, run.info.run_id, experiment_id, output_dir)
    try:
        tracker.params(config_module.flatten(config))
        tracker.text(config_module.to_yaml(config), CONFIG_FILE)
        tracker.tags({f"version.{name}": found for name, found in provenance.libraries().items()})
        tracker.tags({f"git.{name}": found for name, found in provenance.git().items()})
        yield tracker
    except BaseException as error:  # every end of a run is recorded; nothing is swallowed
        outcome = _outcome(error)
        tracker.tags({"outcome": outcome, "failure": f"{type(error).__name__}: {_short(error)}"})
        try:
            tracker.text("".join(traceback.format_exception(error)), "traceback.txt")
        except OSError as full:  # the disk may be what failed
            log.error("the traceback cannot be kept: %s", full)  # noqa: TRY400
        finally:
            tracker.end("KILLED" if outcome == "killed" else "FAILED")
        raise
    tracker.tags({"outcome": "ok"})
    tracker.end("FINISHED")


def _outcome(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return "killed"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "oom"
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY):
        return "oom"
    return "nan" if type(error).__name__ == "DivergedError" else "error"


def _experiment(mlflow: MlflowClient, tracking: Any) -> str:
    name = tracking.experiment_name
    found = mlflow.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"tracking.experiment_name: '{name}' was deleted in MLflow; restore it there or choose another name"
            )
        return found.experiment_id
    uri = store_uri(tracking.uri)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / "artifacts").as_uri()
    try:
        return mlflow.create_experiment(name, artifact_location=location)
    except MlflowException:  # another process created it just now
        if found := mlflow.get_experiment_by_name(name):
            return found.experiment_id
        raise


def _reap(mlflow: MlflowClient, experiment_id: str) -> None:
    """Runs whose process on this host is gone without a word (kill -9, power) are KILLED, not RUNNING for ever."""
    for run in mlflow.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        recorded = {key: run.data.tags.get(f"process.{key}", "") for key in ("host", "pid", "started")}
        if provenance.is_dead(recorded):
            mlflow.set_tag(run.info.run_id, "outcome", "killed")
            mlflow.set_terminated(run.info.run_id, "KILLED")


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
