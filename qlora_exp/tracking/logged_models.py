"""Find the models that runs saved: in folders, and in MLflow, by run or by registered name."""

import functools
import re
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from requests import RequestException

from qlora_exp.tracking import journal, mlflow_store
from qlora_exp.tracking.journal import FILE
from qlora_exp.tracking.stores import artifacts, uris
from qlora_exp.utils.errors import JournalError, ModelError, TrackingError
from qlora_exp.utils.files import check_source


def models_of(mlflow: MlflowClient, run_id: str) -> list[Any]:
    """Return the models that a run logged, oldest first.

    Raises:
        ModelError: it logged none.
    """
    outputs = mlflow.get_run(run_id).outputs
    if outputs is None or not outputs.model_outputs:
        raise ModelError(
            f"run {run_id} logged no model to MLflow; see the keys tracking.log_adapter and tracking.log_full_model"
        )
    return list(outputs.model_outputs)


def locate(source: str, tracking_uri: str | None) -> tuple[Path, str | None]:
    """Return the folder of a saved model, and the id of the run that saved it, if that is known.

    Args:
        source: an MLflow run id, a run key, the name of a successful run, a `models:/...` URI, a folder that a run
            saved, or a run's output folder.
        tracking_uri: the MLflow store; None: the one in `mlruns/`.

    Raises:
        ModelError: there is no such model.
    """
    check_source(source)
    folder, run_id = Path(source).expanduser(), None
    if not folder.is_dir():
        return _download(source, tracking_uri)
    folder = folder / "model" if (folder / "model").is_dir() else folder  # a run's output folder
    if (folder.parent / FILE).is_file():
        try:
            run_id = journal.run_id(folder.parent, uris.store_uri(tracking_uri))
        except JournalError as error:
            raise ModelError(f"{folder.parent}: the journal of its run is damaged: {error}") from error
    return folder, run_id


def _download(source: str, tracking_uri: str | None) -> tuple[Path, str | None]:
    """Download a logged model; return its folder and the id of the run that logged it."""
    try:
        mlflow = mlflow_store.reader(tracking_uri)
    except TrackingError as error:
        raise ModelError(f"{source}: not a folder, and cannot be searched for in MLflow: {error}") from error
    try:
        if not source.startswith("models:/"):
            run_id = source if re.fullmatch("[0-9a-f]{32}", source) else _run_of(mlflow, source)
            model_id = models_of(mlflow, run_id)[-1].model_id
        else:
            model_id = source.removeprefix("models:/")
            version = None
            if "/" in model_id:  # a registered model: models:/NAME/VERSION
                if not model_id.rpartition("/")[2].isdigit():
                    raise ModelError(f"{source}: versions are numbers (models:/NAME/3), aliases models:/NAME@ALIAS")
                version = mlflow.get_model_version(*model_id.split("/", 1))
            elif "@" in model_id:  # models:/NAME@ALIAS
                version = mlflow.get_model_version_by_alias(*model_id.split("@", 1))
            if version is not None:
                model_id = str(version.source).removeprefix("models:/")
        # Use the location of its files: MLflow resolves models:/ on its global tracking URI only.
        logged = mlflow.get_logged_model(model_id)
        folder = artifacts.folder(logged.artifact_location, mlflow.tracking_uri)
        if folder is None:
            folder = _fetched(logged.artifact_location, mlflow.tracking_uri)
        elif not folder.is_dir():
            raise ModelError(f"{source}: its files were in {folder}, which is not there")
    except (MlflowException, RequestException, TrackingError) as error:
        raise ModelError(f"{source}: {error}") from error
    return folder, logged.source_run_id


@functools.cache  # what is logged does not change, and a sweep asks for it in each job
def _fetched(location: str, tracking_uri: str) -> Path:
    return Path(download_artifacts(artifact_uri=location, tracking_uri=tracking_uri))


def _run_of(mlflow: MlflowClient, named: str) -> str:
    """Return the id of the newest successful run with a run key or a name.

    Raises:
        ModelError: there is none, or successful runs with several run keys have the name.
    """
    is_key = re.fullmatch("[0-9a-f]{16}", named)
    quoted = f'"{named}"' if "'" in named else f"'{named}'"
    if "'" in named and '"' in named:
        raise ModelError(f"{named}: MLflow cannot search for a name that has both kinds of quotes; give the run's id")
    experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    where = f"{'tags.run_key' if is_key else 'attributes.run_name'} = {quoted} and tags.outcome = 'ok'"
    runs = mlflow.search_runs(experiments, where, order_by=["attributes.start_time DESC"])
    if not runs:
        what = "has this run key" if is_key else "has this id or name"
        raise ModelError(f"{named}: no successful run {what}; `qlora-exp runs` lists runs")
    others = {run.data.tags.get("run_key"): run.info.run_id for run in reversed(runs)}
    if len(others) > 1:
        raise ModelError(
            f"{named}: {len(others)} different runs have this name; give an id: {', '.join(others.values())}"
        )
    return str(runs[0].info.run_id)
