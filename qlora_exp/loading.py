"""A trained model back from MLflow or from a folder, on its base as it was trained.

What was recorded is data: nothing in it can make code run.
"""

from pathlib import Path
from typing import Any

import torch
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_exp.bottleneck  # noqa: F401 - registers its method with PEFT
from qlora_exp import compatibility, store
from qlora_exp.config import from_dict
from qlora_exp.device import detect, resolve
from qlora_exp.errors import ConfigError, ModelError
from qlora_exp.journal import CONFIG_FILE
from qlora_exp.model import load_model
from qlora_exp.records import plain_yaml


def load(source: str, tracking_uri: str | None = None, device: str = "auto") -> tuple[Any, Any]:
    """A trained model, ready to generate: the base as it was trained on (quantized or not) with its adapter.

    Args:
        source: an MLflow run id, a `models:/...` URI, or a folder that a run saved.
        tracking_uri: the MLflow store; None is the one in `mlruns/`.
        device: where to put it: auto, cpu, cuda.

    Returns:
        The model, in eval mode, and its tokenizer.

    Raises:
        ModelError: there is no such model, or it is not one that a run saved.
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
    resolved = resolve(config, detect(device, bitsandbytes=config.quantization.bitsandbytes))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if adapter:
        base = load_model(config.model, config.quantization, resolved)
        model: Any = PeftModel.from_pretrained(base, str(folder))
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
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
