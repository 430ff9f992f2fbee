"""A run's model in MLflow's registry, under a name and an alias, with its card; and on the hub if that is asked for."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient, get_tracking_uri, set_tracking_uri
from mlflow.exceptions import MlflowException

from qlora_exp.deploy import load, model_card
from qlora_exp.results import records, reproduce
from qlora_exp.tracking import mlflow_store
from qlora_exp.utils.errors import ConfigError, TrackingError, first_line
from qlora_exp.utils.secrets import load_env_file, redact

_CARD = "README.md"
_MOST_DESCRIPTION = 5000
"""Characters of a version's description that MLflow keeps on every database."""


@dataclass(frozen=True)
class Registered:
    """A version in the registry."""

    name: str
    version: str
    alias: str | None
    uri: str
    """What `qlora_exp.load` takes."""


def register(uri: str | None, run: str, name: str, alias: str | None = None) -> tuple[Registered, str]:
    """Give a run's logged model a name in the registry; once registered so, the same version is found again.

    Args:
        uri: MLflow's tracking URI; None is SQLite in ./mlruns.
        run: a run's id, key or name.
        name: of the registered model.
        alias: to move to this version.

    Returns:
        The version, and the model card, which is kept with the run, the model and the version.

    Raises:
        ConfigError: a name or an alias that MLflow does not take.
        TrackingError: there is no such run or store.
        ModelError: the run left no model.
    """
    record = reproduce.one_record(uri, run)
    saved = load.find(record.run_id, uri, "cpu")
    mlflow = mlflow_store.client(uri)
    try:
        (model_id,) = [one.model_id for one in load.models_of(mlflow, record.run_id)][-1:]
        found = _version(mlflow, name, model_id, record.run_id)
        if alias is not None:
            mlflow.set_registered_model_alias(name, alias, found)
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise ConfigError(f"register: {first_line(error)}") from error
        raise TrackingError(f"MLflow: {first_line(error)}") from error
    address = f"models:/{name}@{alias}" if alias else f"models:/{name}/{found}"
    text = model_card.write(record, saved.config, address)
    with records.explained(), tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _CARD).write_text(text, "utf-8")
        mlflow.log_artifact(record.run_id, str(Path(folder) / _CARD))
        mlflow.log_model_artifact(model_id, str(Path(folder) / _CARD))
        mlflow.update_model_version(name, found, text[:_MOST_DESCRIPTION])
        for key, value in model_card.tags(saved.config):
            mlflow.set_model_version_tag(name, found, key, redact(value))
    return Registered(name, found, alias, address), text


def _version(mlflow: MlflowClient, name: str, model_id: str, run_id: str) -> str:
    source = f"models:/{model_id}"
    try:
        mlflow.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        for known in mlflow.search_model_versions(f"run_id = '{run_id}'"):
            if known.name == name and known.source == source:
                return str(known.version)
    before = get_tracking_uri()
    set_tracking_uri(mlflow.tracking_uri)  # on which alone MLflow resolves models:/
    try:
        return str(mlflow.create_model_version(name, source, run_id, model_id=model_id).version)
    finally:
        set_tracking_uri(before)


def push(uri: str | None, source: str, repository: str, text: str, private: bool = True) -> str:
    """Upload a registered model with its card to the hub; the address of the commit.

    Raises:
        ConfigError: the hub refuses, or there is no HF_TOKEN.
    """
    load_env_file()
    from huggingface_hub import HfApi

    folder = load.find(source, uri, "cpu").folder
    api = HfApi()
    try:
        with tempfile.TemporaryDirectory() as part:
            shutil.copytree(folder, part, dirs_exist_ok=True)
            (Path(part) / _CARD).write_text(text, "utf-8")
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository, folder_path=part))
    except Exception as error:  # whatever the hub, its client's checks or the network raise: the model is registered
        raise ConfigError(f"--push {repository}: {redact(first_line(error))}") from error
