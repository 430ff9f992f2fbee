"""Connect to an MLflow store, and send it messages of a run's journal, cut to what its database can hold.

This module uses the client with explicit run ids, never MLflow's global active run, so that nothing else in the process
can end or overwrite a run. Sending a message twice has the same effect as sending it once, so that nothing is lost if
the process is killed after it sent a message and before it noted that in the journal.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

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
    ViewType,
)
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from qlora_exp.libraries.mlflow import create_tables, reopen, schema_version
from qlora_exp.tracking.journal import PARENT_TAG, Journal, parent_run_id, store_of_newest
from qlora_exp.tracking.limits import fit_message
from qlora_exp.tracking.refusals import Entry, LeftOut, cause, hint, log_entries, no_content, read_run
from qlora_exp.tracking.stores import artifacts, mlflow_views, pyfunc_files, sqlite_store
from qlora_exp.tracking.stores.guarded_client import GuardedClient
from qlora_exp.tracking.stores.uris import check_driver, exists, experiment_name, origin, store_uri
from qlora_exp.utils.errors import NoRunsError, TrackingError
from qlora_exp.utils.files import open_inside, own_user, scratch_folder
from qlora_exp.utils.notice import notice_if_slow
from qlora_exp.utils.secrets import redact

log = logging.getLogger(__name__)

_RUNS_PER_REQUEST = 200
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


def client(uri: str | None = None) -> MlflowClient:
    """Return a client of a store that answers; a missing SQLite store is created first, by one process at a time.

    Raises:
        ConfigError: the URI cannot be used, or the driver of its database is missing.
        TrackingError: the store cannot be reached or created, or is another database.
    """
    address = store_uri(uri)
    file = sqlite_store.sqlite_file(address)
    with _errors_explained(uri, "written"):
        if file is None:
            return _connected(address)
        # Several processes that create the database at the same time would damage it permanently.
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if is_new := not file.exists():
                _create_store(file)
            sqlite_store.check(file)
            artifacts.relocate(file)
            return _connected(address, is_new)


def reader(uri: str | None = None) -> MlflowClient:
    """Return a client that only reads. An SQLite store is not changed, not even by a lock; a missing one not created.

    Raises:
        TrackingError: the store does not exist, cannot be reached, or is another database.
    """
    address = store_uri(uri)
    file = sqlite_store.sqlite_file(address)
    with _errors_explained(uri, "read"):
        if file is None:
            with notice_if_slow(f"waiting for MLflow at {redact(address)}"):
                return _connected(address)
        if not file.is_file():
            if (used := store_of_newest([Path("outputs"), Path("multirun")])) not in (None, address):
                hint = f"the newest run of this folder was sent to {redact(str(used))}: give it with --uri"
            else:
                hint = "start this in the folder where you train, or give --uri"
            raise NoRunsError(f"no runs yet: {file} does not exist; {hint}")
        sqlite_store.check_readable(file, schema_version())
        return _connected(sqlite_store.read_only_uri(file))


@contextmanager
def _errors_explained(uri: str | None, used: str) -> Iterator[None]:
    address = store_uri(uri)
    check_driver(address)
    try:
        yield
    except (MlflowException, OSError, SQLAlchemyError) as error:
        why = f"MLflow at {redact(address)} does not answer or cannot be {used}: {cause(error)}{hint(error)}"
        raise TrackingError(f"{origin(uri)}: {why}") from error


def _connected(address: str, is_new: bool = False) -> MlflowClient:
    # A server that is gone must not block training. Set here: an earlier setting may be of another environment.
    os.environ.setdefault(_RETRIES, "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    mlflow = GuardedClient(address, registry_uri=address)
    if is_new:  # this process may have used an earlier file
        reopen(mlflow)
    mlflow.search_experiments(max_results=1)
    return mlflow


def _create_store(file: Path) -> None:
    """Create an SQLite store under a temporary name, then rename it.

    MLflow takes seconds to create it, and cannot use an incomplete one.
    """
    with scratch_folder(file.parent) as scratch:
        create_tables(URL.create("sqlite", database=str(scratch / file.name)).render_as_string())
        (scratch / file.name).rename(file)


def tags_of(uri: str, states: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return the tags of those runs that a store has, deleted ones too: they can be restored.

    Args:
        uri: the store.
        states: what journals say of the runs: `run_id` and `experiment_id`.

    Raises:
        TrackingError: the store does not answer.
    """
    ids = sorted({state["run_id"] for state in states})
    experiments = sorted({state["experiment_id"] for state in states})
    tags: dict[str, dict[str, str]] = {}
    mlflow = reader(uri)
    with _errors_explained(uri, "read"):
        for begin in range(0, len(ids), _RUNS_PER_REQUEST):
            where = ", ".join(f"'{run_id}'" for run_id in ids[begin : begin + _RUNS_PER_REQUEST])
            where = f"attributes.run_id IN ({where})"
            runs = mlflow.search_runs(experiments, where, ViewType.ALL, max_results=_RUNS_PER_REQUEST)
            tags |= {run.info.run_id: run.data.tags for run in runs}
    return tags


def send(mlflow: MlflowClient, journal: Journal, *messages: dict[str, Any]) -> list[LeftOut]:
    """Send MLflow a message, or several of params, tags and metrics.

    Sending twice (after a kill) has the same effect as sending once.

    Returns:
        Metrics, params and tags that MLflow refuses for good, with the reason.
    """
    run_id = journal.state.get("run_id", "")
    match fit_message(messages[0]):
        case {"op": "start"} as message:
            journal.save_state(**_create(mlflow, journal, message))
        case {"op": "resume", "tags": tags}:
            mlflow.update_run(run_id, status="RUNNING")
            return log_entries(mlflow, journal, [RunTag(key, value) for key, value in tags.items()])
        case {"op": "params" | "tags" | "metrics"}:
            return log_entries(mlflow, journal, [entry for message in messages for entry in _entries(message)])
        case {"op": "file", "path": path}:
            (file,) = _files(journal.folder, [path])
            mlflow.log_artifact(run_id, str(file), str(Path(path).parent) if Path(path).parent.name else None)
        case {"op": "dataset", "name": name, "digest": digest, "source": source, "context": context, "rows": rows}:
            inputs = mlflow.get_run(run_id).inputs
            logged = [item.dataset for item in inputs.dataset_inputs] if inputs else []
            if (name, digest) in [(dataset.name, dataset.digest) for dataset in logged]:
                return []
            profile = json.dumps({"rows": rows})
            entity = Dataset(name, digest, "local", json.dumps({"path": source}), profile=profile)
            mlflow.log_inputs(run_id, datasets=[DatasetInput(entity, [InputTag("mlflow.data.context", context)])])
        case {"op": "view", "key": key, "value": value}:
            experiment = mlflow.get_experiment(journal.state["experiment_id"])
            if not mlflow_views.is_older(value, experiment.tags.get(key)):
                mlflow.set_experiment_tag(experiment.experiment_id, key, value)
        case {"op": "model"} as message:
            return _log_model(mlflow, journal, message)
        case {"op": "end", "status": status, "timestamp": timestamp}:
            mlflow.set_terminated(run_id, status, timestamp)
        case {"op": op}:
            raise UnsendableError(f"a newer version of qlora-exp wrote a message '{op}'; update this one")
    return []


def _entries(message: dict[str, Any]) -> list[Entry]:
    """Return the params, tags or metrics of a message."""
    match fit_message(message):
        case {"op": "params", "values": values}:
            return [Param(key, value) for key, value in values.items()]
        case {"op": "tags", "values": values}:
            return [RunTag(key, value) for key, value in values.items()]
        case {"values": values, "timestamp": timestamp, "step": step}:
            return [Metric(key, float(value), timestamp, step) for key, value in values.items()]
    return []


class UnsendableError(Exception):
    """A message whose files are not there, or that a newer version wrote."""


def _create(mlflow: MlflowClient, journal: Journal, message: dict[str, Any]) -> dict[str, str]:
    """Create the run, unless it was created before; return its id and that of its experiment.

    It is searched for first if an earlier attempt may have created it, or if more than its start is in the journal:
    what was delivered may be noted wrongly, or the store's folder was moved.
    """
    if "run_id" in journal.state:  # all of the run is sent again
        info = read_run(mlflow, journal).info
        return {"run_id": info.run_id, "experiment_id": info.experiment_id}
    experiment_id = _experiment(mlflow, message["experiment"], journal.uri)
    attempt = message["tags"].get("attempt")
    if attempt and (journal.state.get("creating") or next(islice(journal.messages(), 1, None), None)):
        runs = mlflow.search_runs([experiment_id], f"tags.`attempt` = '{attempt}'", ViewType.ALL)
        if runs:
            return {"run_id": runs[0].info.run_id, "experiment_id": experiment_id}
    tags = _with_parent(journal, message)
    journal.save_state(creating=True)
    with _sent_once():
        run = mlflow.create_run(experiment_id, message["timestamp"], tags, message["run_name"])
    if not run.info.run_id:
        raise no_content(journal.uri)
    return {"run_id": run.info.run_id, "experiment_id": experiment_id}


@contextmanager
def _sent_once() -> Iterator[None]:
    """Let MLflow's client send a request only once: an answer that was cut does not mean that nothing was created."""
    before = os.environ[_RETRIES]
    os.environ[_RETRIES] = "0"
    try:
        yield
    finally:
        os.environ[_RETRIES] = before


def _with_parent(journal: Journal, message: dict[str, Any]) -> dict[str, str]:
    """Return the tags of a `start` message, with the id that its sweep's run has in the store in use.

    Raises:
        TrackingError: the sweep was not sent to this store yet.
    """
    tags: dict[str, str] = message["tags"]
    if PARENT_TAG not in tags:
        return tags
    parent_id = parent_run_id(journal.folder, tags, journal.uri)
    if parent_id is None and journal.uri != message["uri"]:
        log.warning("%s: its sweep's folder is not there, so MLflow shows it outside of a sweep", journal.folder)
        return {key: value for key, value in tags.items() if key != PARENT_TAG}
    return tags if parent_id is None else tags | {PARENT_TAG: parent_id}


def _log_model(mlflow: MlflowClient, journal: Journal, message: dict[str, Any]) -> list[LeftOut]:
    run_id, experiment_id = journal.state["run_id"], journal.state["experiment_id"]
    folder = journal.folder / message["folder"]
    listed = [f"{message['folder']}/{name}" for name in message.get("files", [])]
    files = [file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()]
    there = [f"{message['folder']}/{file.relative_to(folder)}" for file in files]
    # MLflow sends the whole folder, and would follow links to files outside.
    if not _files(journal.folder, [*listed, *there]):
        raise UnsendableError(f"{folder} has no files")
    models = mlflow.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    model_id = next((model.model_id for model in models if model.name == message["name"]), None)
    if model_id is None:
        with _sent_once():
            model_id = mlflow.create_logged_model(
                experiment_id,
                name=message["name"],
                source_run_id=run_id,
                model_type="peft-adapter" if (folder / "adapter_config.json").is_file() else "model",
                params=message["params"],
            ).model_id
    mlflow.log_model_artifacts(model_id, str(folder))
    pyfunc_files.log(mlflow, run_id, model_id)
    mlflow.finalize_logged_model(model_id, LoggedModelStatus.READY)
    outputs = mlflow.get_run(run_id).outputs
    if not outputs or model_id not in [output.model_id for output in outputs.model_outputs]:
        mlflow.log_outputs(run_id, [LoggedModelOutput(model_id, message["step"])])
    return log_entries(mlflow, journal, _metrics_of_model(journal, message, model_id))


def _metrics_of_model(journal: Journal, model: dict[str, Any], model_id: str) -> list[Metric]:
    """List the metrics `after/...` that the run logged before its model, for the logged model and the held-out rows."""
    heldout: dict[str, Any] = {}
    metrics = []
    for message in takewhile(model.__ne__, map(fit_message, journal.messages())):
        if message["op"] == "dataset" and message["context"] == "evaluation":
            heldout = {"dataset_name": message["name"], "dataset_digest": message["digest"]}
        elif message["op"] == "metrics":
            when = message["timestamp"], message["step"]
            after = {key: float(value) for key, value in message["values"].items() if key.startswith("after/")}
            metrics += [Metric(key, value, *when, model_id, **heldout) for key, value in after.items()]
    return metrics


def _files(folder: Path, paths: Iterable[str]) -> list[Path]:
    """Return files of the run's folder.

    Raises:
        UnsendableError: one does not exist, or is outside of the folder.
    """
    paths = list(paths)
    if missing := [str(folder / path) for path in paths if "\0" not in path and not os.path.lexists(folder / path)]:
        raise UnsendableError(f"{', '.join(missing)}: no such file")
    try:
        return [_inside(folder, path) for path in paths]
    except FileNotFoundError as error:
        raise UnsendableError(str(error)) from error


def _inside(folder: Path, path: str) -> Path:
    """Return the path of a file in the run's folder; refuse links, files of other users, and what is no file.

    Without this, a journal or folder of somebody else could upload other files of this machine. MLflow opens the file
    again, by its path: who can write into the folder can still replace the file between the check and that.
    """
    try:
        open_inside(folder, path, own_user(folder)).close()
    except OSError as error:
        raise FileNotFoundError(f"{error.filename} is not sent: {error.strerror}") from error
    return folder / path


def _experiment(mlflow: MlflowClient, name: str, uri: str) -> str:
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is None:
        file = sqlite_store.sqlite_file(uri)
        location = None if file is None else (file.parent / "artifacts").as_uri()
        try:
            experiment = mlflow.get_experiment(mlflow.create_experiment(name, artifact_location=location))
        except MlflowException:  # another process may have created it just now
            if (experiment := mlflow.get_experiment_by_name(name)) is None:
                raise
    if not experiment.experiment_id:
        raise no_content(uri)
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment_name: '{name}' was deleted in MLflow; choose another name or restore it there "
            f"(MLFLOW_TRACKING_URI={redact(uri)} mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id})"
        )
    artifacts.require_own(experiment.artifact_location, uri)
    artifacts.warn_of_other_machine(experiment.artifact_location, uri)
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
    if not exists(uri):
        return {}
    try:
        mlflow = reader(uri)
    except NoRunsError:  # another process is creating it
        return {}
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
