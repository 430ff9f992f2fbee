"""A trained model back from MLflow or from a folder, on its base as it was trained.

What was recorded is data: nothing in it can make code run.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_exp.bottleneck  # noqa: F401 - registers its method with PEFT
from qlora_exp import compatibility, identity, store
from qlora_exp.config import from_dict
from qlora_exp.device import detect, resolve
from qlora_exp.errors import ConfigError, ModelError
from qlora_exp.journal import CONFIG_FILE
from qlora_exp.model import load_model
from qlora_exp.records import plain_yaml
from qlora_exp.schema import Config


@dataclass(frozen=True)
class Saved:
    """What a run saved."""

    source: str
    """As it was asked for."""
    folder: Path
    config: Config
    adapter: bool
    """Else it is a whole model."""

    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            ModelError: there is none.
        """
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{self.folder}: no whole tokenizer: {str(error).splitlines()[0]:.200}") from error


def find(source: str, tracking_uri: str | None = None, device: str = "auto") -> Saved:
    """What a run saved, with its config as it was recorded, on the base that it was trained on.

    Args:
        source: an MLflow run id, a `models:/...` URI, or a folder that a run saved.
        tracking_uri: the MLflow store; None is the one in `mlruns/`.
        device: where it is to be put: auto, cpu, cuda.

    Raises:
        ModelError: there is no such model, it is not one that a run saved, or its base is another now.
    """
    folder = Path(source) if Path(source).is_dir() else _download(source, tracking_uri)
    folder = folder / "model" if (folder / "model").is_dir() else folder  # a run's output folder
    adapter = (folder / "adapter_config.json").is_file()
    weights = folder.glob("adapter_model.safetensors" if adapter else "model*.safetensors")  # never a pickle
    if not (folder / CONFIG_FILE).is_file() or not list(weights):
        raise ModelError(f"{source}: not a model that a run saved (no {CONFIG_FILE}, or no .safetensors)")
    try:
        recorded = plain_yaml((folder / CONFIG_FILE).read_text("utf-8"), CONFIG_FILE)
        # A stranger's record must not run a stranger's code: neither the model's nor a kernel of the hub.
        recorded["model"] |= {"trust_remote_code": False, "attn_implementation": None}
        recorded["training"]["resume_from_checkpoint"] = None
    except (ConfigError, KeyError, TypeError) as error:
        raise ModelError(f"{source}: {CONFIG_FILE} is damaged: {error}") from error
    try:
        with compatibility.ignored():  # it was trained: what would be refused now did work then
            config = from_dict(recorded | {"device": device})
    except ConfigError as error:
        raise ModelError(f"{source}: its config is not one of this version: {error}") from error
    if adapter:
        config = _on_its_base(config, folder)
    return Saved(source, folder, config, adapter)


def _on_its_base(config: Config, folder: Path) -> Config:
    """The config, with the version of the base that the adapter in `folder` was trained on.

    Raises:
        ModelError: the base is another now.
    """
    if not (folder / identity.BASE_FILE).is_file():  # saved by an older version
        return config
    try:
        then = str(json.loads((folder / identity.BASE_FILE).read_text("utf-8"))["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / identity.BASE_FILE} is damaged: {error}") from error
    name = config.model.model_name_or_path
    if re.fullmatch(r"[0-9a-f]{40}", then):  # a commit on the hub
        return config.model_copy(update={"model": config.model.model_copy(update={"revision": then})})
    if (now := identity.model(name, config.model.revision)) != then:
        raise ModelError(f"{name} is not the base that the adapter was trained on (version {then} then, {now} now)")
    return config


def load(source: str, tracking_uri: str | None = None, device: str = "auto") -> tuple[Any, Any]:
    """A trained model, ready to generate: the base as it was trained on (quantized or not) with its adapter.

    Args:
        source: an MLflow run id, a `models:/...` URI, or a folder that a run saved.
        tracking_uri: the MLflow store; None is the one in `mlruns/`.
        device: where to put it: auto, cpu, cuda.

    Returns:
        The model, in eval mode, and its tokenizer.

    Raises:
        ModelError: there is no such model, it is not one that a run saved, or its base is another now.
    """
    saved = find(source, tracking_uri, device)
    config = saved.config
    resolved = resolve(config, detect(device, bitsandbytes=config.quantization.bitsandbytes))
    tokenizer = saved.tokenizer()
    if saved.adapter:
        base = load_model(config.model, config.quantization, resolved)
        model: Any = PeftModel.from_pretrained(base, str(saved.folder))
    else:
        model = AutoModelForCausalLM.from_pretrained(
            saved.folder,
            dtype=getattr(torch, resolved.dtype),
            device_map={"": resolved.device},
            trust_remote_code=False,
        )
    model.config.use_cache = True
    return model.eval(), tokenizer


def _download(source: str, tracking_uri: str | None) -> Path:
    address = store.store_uri(tracking_uri)
    if tracking_uri is None and not Path(address.removeprefix("sqlite:///")).is_file():
        raise ModelError(f"{source}: not a folder, and there is no MLflow store at {address}; give tracking_uri")
    mlflow = store.client(tracking_uri)
    try:
        if not source.startswith("models:/"):
            outputs = mlflow.get_run(source).outputs
            if outputs is None or not outputs.model_outputs:
                raise ModelError(
                    f"run {source} left no model in MLflow (tracking.log_adapter, tracking.log_full_model)"
                )
            model_id = outputs.model_outputs[-1].model_id
        else:
            model_id = source.removeprefix("models:/")
            if "/" in model_id:  # a registered one: models:/NAME/VERSION
                model_id = str(mlflow.get_model_version(*model_id.split("/", 1)).source).removeprefix("models:/")
            elif "@" in model_id:  # models:/NAME@ALIAS
                version = mlflow.get_model_version_by_alias(*model_id.split("@", 1))
                model_id = str(version.source).removeprefix("models:/")
        # By its own location: MLflow resolves models:/ on its global tracking URI only.
        location = mlflow.get_logged_model(model_id).artifact_location
        return Path(download_artifacts(artifact_uri=location, tracking_uri=store.store_uri(tracking_uri)))
    except MlflowException as error:
        raise ModelError(f"{source}: {error}") from error
