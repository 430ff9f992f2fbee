"""MLflow's side: connecting to a store, and telling it one message of a run's journal.

Uses the client with explicit run ids, never MLflow's global active run, so that nothing else in the process can end or
overwrite a run. Telling a message twice changes nothing, so that a kill between telling and noting loses nothing.
"""

import json
import os
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a server that is gone must not hold up training
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
from sqlalchemy.exc import SQLAlchemyError

from qlora_exp.libraries.mlflow import create_tables
from qlora_exp.tracking import mlflow_views
from qlora_exp.tracking.journal import Journal
from qlora_exp.utils.errors import TrackingError, first_line
from qlora_exp.utils.secrets import redact

_REFUSED = "INVALID_PARAMETER_VALUE"


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
                if not file.exists():
                    _create_store(file)
                found = MlflowClient(address, registry_uri=address)
                found.search_experiments(max_results=1)
        else:
            found = MlflowClient(address, registry_uri=address)
            found.search_experiments(max_results=1)
    except (MlflowException, OSError, SQLAlchemyError) as error:
        why = redact(f"MLflow at {address} does not answer or cannot be written: {first_line(error)}")
        raise TrackingError(f"tracking.uri: {why}") from error
    return found


def _create_store(file: Path) -> None:
    """Make an SQLite store under another name first: MLflow takes seconds, and can do nothing with a half-made one."""
    part = file.with_name(f".{file.name}.part")
    for left in file.parent.glob(f"{part.name}*"):  # by one that was killed
        left.unlink()
    create_tables(f"sqlite:///{part}")
    part.replace(file)


def is_refused(error: Exception, message: dict[str, Any]) -> bool:
    """Whether sending again could never help; a run that could not even begin waits for its store."""
    if message["op"] == "start":
        return False
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) == _REFUSED


def has_lost(error: Exception, mlflow: MlflowClient | None, run_id: str | None) -> bool:
    """Whether a store raised `error` because it does not know a run any more that was created there."""
    missing = "RESOURCE_DOES_NOT_EXIST"
    if mlflow is None or run_id is None or getattr(error, "error_code", None) != missing:
        return False
    try:
        mlflow.get_run(run_id)
    except MlflowException as of_run:
        return bool(of_run.error_code == missing)
    return False


def tell(mlflow: MlflowClient, journal: Journal, message: dict[str, Any]) -> None:
    """Tell MLflow one message; telling it twice (a kill in between) changes nothing."""
    run_id = journal.state.get("run_id", "")
    match message:
        case {"op": "start"}:
            journal.note(**_create(mlflow, journal, message))
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
            known = [one.dataset for one in inputs.dataset_inputs] if inputs else []
            if (name, digest) in [(one.name, one.digest) for one in known]:
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
    """The run's id and its experiment's; a creation that was cut off is looked for before it is made again."""
    experiment_id = _experiment(mlflow, message["experiment"], message["uri"])
    tags = message["tags"]
    if journal.state.get("creating"):
        found = mlflow.search_runs([experiment_id], f"tags.`attempt` = '{tags['attempt']}'")
        if found:
            return {"run_id": found[0].info.run_id, "experiment_id": experiment_id}
    journal.note(creating=True)
    run = mlflow.create_run(experiment_id, message["timestamp"], tags, message["run_name"])
    return {"run_id": run.info.run_id, "experiment_id": experiment_id}


def _log_model(mlflow: MlflowClient, journal: Journal, message: dict[str, Any]) -> None:
    run_id, experiment_id = journal.state["run_id"], journal.state["experiment_id"]
    folder = _inside(journal.folder, message["folder"])
    for file in folder.rglob("*"):  # MLflow would follow links
        _inside(journal.folder, str(file))
    begun = mlflow.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    model_id = next((model.model_id for model in begun if model.name == message["name"]), None)
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
    if not outputs or model_id not in [one.model_id for one in outputs.model_outputs]:
        mlflow.log_outputs(run_id, [LoggedModelOutput(model_id, message["step"])])


def _metrics_of_model(journal: Journal, model: dict[str, Any], model_id: str) -> list[Metric]:
    """The measures told of the run before its `model`, now of the model and the held-out rows too."""
    heldout: dict[str, Any] = {}
    found = []
    for message in takewhile(model.__ne__, journal.messages()):
        if message["op"] == "dataset" and message["context"] == "evaluation":
            heldout = {"dataset_name": message["name"], "dataset_digest": message["digest"]}
        elif message["op"] == "metrics":
            when = message["timestamp"], message["step"]
            of_model = {key: value for key, value in message["values"].items() if key.startswith("after/")}
            found += [Metric(key, value, *when, model_id, **heldout) for key, value in of_model.items()]
    return found


def _inside(folder: Path, path: str) -> Path:
    """A file of the run; a journal that somebody else wrote cannot send other files of this machine."""
    try:
        found = (folder / path).resolve()
    except (ValueError, RuntimeError) as error:  # a name that cannot be, or links in a circle
        raise FileNotFoundError(f"{path!r} is not in {folder}: {error}") from error
    if not found.is_relative_to(folder.resolve()):
        raise FileNotFoundError(f"{path} is not in {folder}")
    return found


def _experiment(mlflow: MlflowClient, name: str, uri: str) -> str:
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        location = None
        if uri.startswith("sqlite:///"):
            location = (Path(uri.removeprefix("sqlite:///")).parent / "artifacts").as_uri()
        try:
            found = mlflow.get_experiment(mlflow.create_experiment(name, artifact_location=location))
        except MlflowException:  # another process created it just now
            if (found := mlflow.get_experiment_by_name(name)) is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment_name: '{name}' was deleted in MLflow; restore it there or choose another name"
        )
    key, view = mlflow_views.all_runs()
    if found.tags.get(key) != view:
        mlflow.set_experiment_tag(found.experiment_id, key, view)
    return str(found.experiment_id)


def finished_runs(uri: str | None, experiment: str, run_keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Those of `run_keys` that an experiment has a finished run of, with its `run_id`, `outcome`, `metrics`, `seconds`.

    A store that is not there yet is not made.
    """
    address = store_uri(uri)
    if address.startswith("sqlite:///") and not Path(address.removeprefix("sqlite:///")).is_file():
        return {}
    mlflow = client(uri)
    found = mlflow.get_experiment_by_name(experiment)
    if found is None:
        return {}
    keys: dict[str, dict[str, Any]] = {}
    for key in run_keys:  # of ten thousand runs one is found in milliseconds, and all are read in a minute
        ended = f"attributes.status = 'FINISHED' and tags.run_key = '{key}' and tags.outcome = 'ok'"
        for run in mlflow.search_runs([found.experiment_id], ended, max_results=1):
            seconds = (run.info.end_time - run.info.start_time) / 1000
            keys[key] = {
                "run_id": run.info.run_id,
                "outcome": "ok",
                "metrics": run.data.metrics,
                "seconds": seconds,
            }
    return keys
