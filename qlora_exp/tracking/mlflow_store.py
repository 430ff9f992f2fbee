"""Connect to an MLflow store, and send it messages of a run's journal.

This module uses the client with explicit run ids, never MLflow's global active run, so that nothing else in the process
can end or overwrite a run. Sending a message twice has the same effect as sending it once, so that nothing is lost if
the process is killed after it sent a message and before it noted that in the journal.
"""

import json
import os
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a server that is gone must not block training
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
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from qlora_exp.libraries.mlflow import create_tables
from qlora_exp.tracking import mlflow_views
from qlora_exp.tracking.journal import Journal
from qlora_exp.tracking.uris import check_driver, experiment_name, origin, sqlite_file, store_uri
from qlora_exp.utils.errors import TrackingError, first_line
from qlora_exp.utils.secrets import redact

_REFUSED = "INVALID_PARAMETER_VALUE"


def client(uri: str | None = None) -> MlflowClient:
    """Return a client of a store that answers; a missing SQLite store is created first, by one process at a time.

    Raises:
        ConfigError: the URI cannot be used, or the driver of its database is missing.
        TrackingError: the store cannot be reached or created.
    """
    address = store_uri(uri)
    check_driver(address)
    try:
        if (file := sqlite_file(address)) is not None:
            # Several processes that create the database at the same time would damage it permanently.
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{file}.lock"):
                if not file.exists():
                    _create_store(file)
                mlflow = MlflowClient(address, registry_uri=address)
                mlflow.search_experiments(max_results=1)
        else:
            mlflow = MlflowClient(address, registry_uri=address)
            mlflow.search_experiments(max_results=1)
    except (MlflowException, OSError, SQLAlchemyError) as error:
        why = redact(f"MLflow at {address} does not answer or cannot be written: {first_line(error)}")
        raise TrackingError(f"{origin(uri)}: {why}") from error
    return mlflow


def _create_store(file: Path) -> None:
    """Create an SQLite store under a temporary name, then rename it.

    MLflow takes seconds to create it, and cannot use an incomplete one.
    """
    part = file.with_name(f".{file.name}.part")
    for leftover in file.parent.glob(f"{part.name}*"):  # of a process that was killed here
        leftover.unlink()
    create_tables(URL.create("sqlite", database=str(part)).render_as_string())
    part.replace(file)


def is_refused(error: Exception, message: dict[str, Any]) -> bool:
    """Check whether the store refuses a message for good, so that sending it again cannot help."""
    if message["op"] == "start":  # without it no other message can be sent: the run waits for its store
        return False
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) == _REFUSED


def has_lost(error: Exception, mlflow: MlflowClient | None, run_id: str | None) -> bool:
    """Check whether a store raised `error` because it no longer has a run that was created there."""
    missing = "RESOURCE_DOES_NOT_EXIST"
    if mlflow is None or run_id is None or getattr(error, "error_code", None) != missing:
        return False
    try:
        mlflow.get_run(run_id)
    except MlflowException as run_error:
        return bool(run_error.error_code == missing)
    return False


def send(mlflow: MlflowClient, journal: Journal, message: dict[str, Any]) -> None:
    """Send MLflow one message; sending it twice (after a kill) has the same effect as sending it once."""
    run_id = journal.state.get("run_id", "")
    match message:
        case {"op": "start"}:
            journal.save_state(**_create(mlflow, journal, message))
        case {"op": "resume", "tags": tags}:
            mlflow.update_run(run_id, status="RUNNING")
            mlflow.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        case {"op": "params", "values": values}:
            mlflow.log_batch(run_id, params=[Param(key, value) for key, value in values.items()])
        case {"op": "tags", "values": values}:
            mlflow.log_batch(run_id, tags=[RunTag(key, value) for key, value in values.items()])
        case {"op": "metrics", "values": values, "step": step, "timestamp": timestamp}:
            mlflow.log_batch(run_id, metrics=[Metric(key, value, timestamp, step) for key, value in values.items()])
        case {"op": "file", "path": path}:
            folder = str(Path(path).parent) if Path(path).parent.name else None
            mlflow.log_artifact(run_id, str(_inside(journal.folder, path)), folder)
        case {"op": "dataset", "name": name, "digest": digest, "source": source, "context": context, "rows": rows}:
            inputs = mlflow.get_run(run_id).inputs
            logged = [item.dataset for item in inputs.dataset_inputs] if inputs else []
            if (name, digest) in [(dataset.name, dataset.digest) for dataset in logged]:
                return
            profile = json.dumps({"rows": rows})
            entity = Dataset(name, digest, "local", json.dumps({"path": source}), profile=profile)
            mlflow.log_inputs(run_id, datasets=[DatasetInput(entity, [InputTag("mlflow.data.context", context)])])
        case {"op": "view", "key": key, "value": value}:
            experiment = mlflow.get_experiment(journal.state["experiment_id"])
            if not mlflow_views.is_older(value, experiment.tags.get(key)):
                mlflow.set_experiment_tag(experiment.experiment_id, key, value)
        case {"op": "model"}:
            _log_model(mlflow, journal, message)
        case {"op": "end", "status": status, "timestamp": timestamp}:
            mlflow.set_terminated(run_id, status, timestamp)


def _create(mlflow: MlflowClient, journal: Journal, message: dict[str, Any]) -> dict[str, str]:
    """Create the run; return its id and that of its experiment.

    If an earlier attempt was interrupted while it created the run, that run is searched for first.
    """
    experiment_id = _experiment(mlflow, message["experiment"], message["uri"])
    tags = message["tags"]
    if journal.state.get("creating"):
        runs = mlflow.search_runs([experiment_id], f"tags.`attempt` = '{tags['attempt']}'")
        if runs:
            return {"run_id": runs[0].info.run_id, "experiment_id": experiment_id}
    journal.save_state(creating=True)
    run = mlflow.create_run(experiment_id, message["timestamp"], tags, message["run_name"])
    return {"run_id": run.info.run_id, "experiment_id": experiment_id}


def _log_model(mlflow: MlflowClient, journal: Journal, message: dict[str, Any]) -> None:
    run_id, experiment_id = journal.state["run_id"], journal.state["experiment_id"]
    folder = _inside(journal.folder, message["folder"])
    for file in folder.rglob("*"):  # MLflow would follow links to files outside
        _inside(journal.folder, str(file))
    models = mlflow.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    model_id = next((model.model_id for model in models if model.name == message["name"]), None)
    if model_id is None:
        model_id = mlflow.create_logged_model(
            experiment_id,
            name=message["name"],
            source_run_id=run_id,
            model_type="peft-adapter" if (folder / "adapter_config.json").is_file() else "model",
            params=message["params"],
        ).model_id
    mlflow.log_model_artifacts(model_id, str(folder))
    mlflow.finalize_logged_model(model_id, LoggedModelStatus.READY)
    mlflow.log_batch(run_id, metrics=_metrics_of_model(journal, message, model_id))
    outputs = mlflow.get_run(run_id).outputs
    if not outputs or model_id not in [output.model_id for output in outputs.model_outputs]:
        mlflow.log_outputs(run_id, [LoggedModelOutput(model_id, message["step"])])


def _metrics_of_model(journal: Journal, model: dict[str, Any], model_id: str) -> list[Metric]:
    """List the metrics `after/...` that the run logged before its model, for the logged model and the held-out rows."""
    heldout: dict[str, Any] = {}
    metrics = []
    for message in takewhile(model.__ne__, journal.messages()):
        if message["op"] == "dataset" and message["context"] == "evaluation":
            heldout = {"dataset_name": message["name"], "dataset_digest": message["digest"]}
        elif message["op"] == "metrics":
            when = message["timestamp"], message["step"]
            after = {key: value for key, value in message["values"].items() if key.startswith("after/")}
            metrics += [Metric(key, value, *when, model_id, **heldout) for key, value in after.items()]
    return metrics


def _inside(folder: Path, path: str) -> Path:
    """Return the path of a file in the run's folder; refuse one outside.

    Without this a journal that somebody else wrote could upload other files of this machine.
    """
    try:
        file = (folder / path).resolve()
    except (ValueError, RuntimeError) as error:  # not a valid name, or links in a circle
        raise FileNotFoundError(f"{path!r} is not in {folder}: {error}") from error
    if not file.is_relative_to(folder.resolve()):
        raise FileNotFoundError(f"{path} is not in {folder}")
    return file


def _experiment(mlflow: MlflowClient, name: str, uri: str) -> str:
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is None:
        location = None
        if (file := sqlite_file(uri)) is not None:
            location = (file.parent / "artifacts").as_uri()
        try:
            experiment = mlflow.get_experiment(mlflow.create_experiment(name, artifact_location=location))
        except MlflowException:  # another process may have created it just now
            if (experiment := mlflow.get_experiment_by_name(name)) is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment_name: '{name}' was deleted in MLflow; restore it there or choose another name"
        )
    key, view = mlflow_views.all_runs()
    if experiment.tags.get(key) != view:
        mlflow.set_experiment_tag(experiment.experiment_id, key, view)
    return str(experiment.experiment_id)


def finished_runs(uri: str | None, experiment: str | None, run_keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Search an experiment for successfully finished runs with one of `run_keys`.

    A store that does not exist yet is not created.

    Returns:
        For each run key that has such a run: its `run_id`, `outcome`, `metrics` and `seconds`.
    """
    file = sqlite_file(store_uri(uri))
    if file is not None and not file.is_file():
        return {}
    mlflow = client(uri)
    found_experiment = mlflow.get_experiment_by_name(experiment_name(experiment))
    if found_experiment is None:
        return {}
    runs: dict[str, dict[str, Any]] = {}
    # One search per key: among ten thousand runs it takes milliseconds, while reading all of them takes a minute.
    for key in run_keys:
        finished = f"attributes.status = 'FINISHED' and tags.run_key = '{key}' and tags.outcome = 'ok'"
        for run in mlflow.search_runs([found_experiment.experiment_id], finished, max_results=1):
            seconds = (run.info.end_time - run.info.start_time) / 1000
            runs[key] = {
                "run_id": run.info.run_id,
                "outcome": "ok",
                "metrics": run.data.metrics,
                "seconds": seconds,
            }
    return runs
