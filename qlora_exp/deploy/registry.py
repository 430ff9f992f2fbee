"""Register a run's model in MLflow's registry, with a model card, and upload it to the Hugging Face hub on request."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient, get_tracking_uri, set_tracking_uri
from mlflow.exceptions import MlflowException
from requests import RequestException

from qlora_exp.deploy import load, model_card
from qlora_exp.results import records, reproduce
from qlora_exp.tracking import logged_models, mlflow_store
from qlora_exp.tracking.refusals import hint
from qlora_exp.tracking.stores import artifacts, pyfunc_files
from qlora_exp.tracking.stores.uris import VARIABLE
from qlora_exp.utils.env_file import load_env_file
from qlora_exp.utils.errors import ConfigError, TrackingError, first_line
from qlora_exp.utils.files import copy_without_links
from qlora_exp.utils.secrets import redact

_CARD = "README.md"
_MAX_DESCRIPTION = 5000
"""Length of a version's description, in characters, that MLflow can store in every kind of database."""


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    alias: str | None
    uri: str
    """Argument with which `qlora_exp.load` loads it."""


def register(uri: str | None, run: str, name: str, alias: str | None = None) -> tuple[Registered, str]:
    """Register a run's logged model under a name. Registering it again returns the same version.

    Args:
        uri: MLflow tracking URI; None: SQLite in ./mlruns.
        run: id, run key or name of the run.
        name: name of the registered model.
        alias: alias to move to this version.

    Returns:
        The version, and the model card, which is saved with the run, the model and the version.

    Raises:
        ConfigError: MLflow does not accept the name or the alias.
        TrackingError: there is no such run or MLflow store.
        ModelError: the run logged no model.
    """
    record = reproduce.find_run(uri, run)
    saved = load.find(record.run_id, uri, "cpu")
    mlflow = mlflow_store.client(uri)
    try:
        (model_id,) = [output.model_id for output in logged_models.models_of(mlflow, record.run_id)][-1:]
        of_run = mlflow.get_run(record.run_id).info.artifact_uri
        if (attempt := record.tags.get("attempt")) is not None:  # changes nothing, but fails if the user may only read
            mlflow.set_tag(record.run_id, "attempt", attempt)
        for place in (of_run, mlflow.get_logged_model(model_id).artifact_location):
            artifacts.require_own(place, mlflow.tracking_uri, _CARD)  # refuse before anything is registered
        version = _version(mlflow, name, model_id, record.run_id)
        if alias is not None:
            mlflow.set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise ConfigError(f"register: MLflow refuses the name or the alias: {first_line(error)}") from error
        raise TrackingError(f"MLflow: {first_line(error)}{hint(error)}") from error
    except RequestException as error:  # what is no answer of MLflow, such as HTML
        raise TrackingError(f"MLflow: {first_line(error)}{hint(error)}") from error
    address = f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}"
    text = model_card.write(record, saved.config, address)
    with records.mlflow_errors_explained(), tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _CARD).write_text(text, "utf-8")
        mlflow.log_artifact(record.run_id, str(Path(folder) / _CARD))
        mlflow.log_model_artifact(model_id, str(Path(folder) / _CARD))
        if pyfunc_files.MLMODEL not in [file.path for file in mlflow.list_logged_model_artifacts(model_id)]:
            pyfunc_files.log(mlflow, record.run_id, model_id)  # an older version logged it
        mlflow.update_model_version(name, version, text[:_MAX_DESCRIPTION])
        for key, value in model_card.tags(saved.config, record.tags):
            mlflow.set_model_version_tag(name, version, key, redact(value))
    return Registered(name, version, alias, address), text


def _version(mlflow: MlflowClient, name: str, model_id: str, run_id: str) -> str:
    source = f"models:/{model_id}"
    try:
        mlflow.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        for existing in mlflow.search_model_versions(f"run_id = '{run_id}'"):
            if existing.name == name and existing.source == source:
                return str(existing.version)
    with _global_tracking_uri(mlflow.tracking_uri):  # MLflow resolves models:/ on it only
        return str(mlflow.create_model_version(name, source, run_id, model_id=model_id).version)


@contextmanager
def _global_tracking_uri(uri: str) -> Iterator[None]:
    """Set MLflow's global tracking URI inside the `with` block.

    MLflow also writes it to the environment, where it would become the default of everything that follows.
    """
    before, in_environment = get_tracking_uri(), os.environ.get(VARIABLE)
    set_tracking_uri(uri)
    try:
        yield
    finally:
        set_tracking_uri(before)
        os.environ.pop(VARIABLE, None)
        if in_environment is not None:
            os.environ[VARIABLE] = in_environment


def push(uri: str | None, source: str, repository: str, text: str, private: bool = True) -> str:
    """Upload a registered model with its card to the hub and return the address of the commit.

    Paths of the base model and the data become names (`load.remove_places`).

    Raises:
        ConfigError: the hub refuses the upload, or HF_TOKEN is not set.
    """
    load_env_file()
    from huggingface_hub import HfApi, ModelCard

    saved = load.find(source, uri, "cpu")
    tags = records.by_ids(uri, [saved.run_id])[0].tags if saved.run_id else {}
    api = HfApi()
    try:
        with tempfile.TemporaryDirectory() as part:
            copy_without_links(saved.folder, Path(part))
            (Path(part) / _CARD).write_text(text, "utf-8")
            load.remove_places(Path(part), model_card.local_paths(saved.config, tags))
            ModelCard(text).validate()  # before there is an empty repository
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository, folder_path=part))
    except Exception as error:  # of any kind: from the hub, its client's checks or the network
        reason = " ".join(str(error).split())  # the hub's own stands after the first line
        raise ConfigError(f"--push {repository}: {reason:.600}") from error
