"""Load a trained model from MLflow or from a folder, on the base model that it was trained on.

What was recorded is only data: nothing in it can make code run.
"""

import json
import re
from collections.abc import Collection
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, GgufConfig

import qlora_exp.models.bottleneck  # noqa: F401 - registers its method with PEFT
from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.config.untrusted import plain_yaml
from qlora_exp.config.values import names_of_paths, values_to_yaml, without_places
from qlora_exp.deploy.gguf import write as gguf
from qlora_exp.deploy.untrusted_folders import (
    check_adapter,
    check_tokenizer,
    generate_once,
    kernels,
    use_own_generation,
)
from qlora_exp.environment.device import detect, resolve
from qlora_exp.models.adapters import check_complete, fit_explained
from qlora_exp.models.base import load_model, model_config, named, stop_at_end_of_turn
from qlora_exp.models.files import GGUF_FILE, check_files, read_json
from qlora_exp.models.layers.experts import packing
from qlora_exp.models.quantization import guard_layers, quantization_config
from qlora_exp.models.untrusted import bounded, check_folder, explained, most_values
from qlora_exp.recipe.saved import saved_config
from qlora_exp.results import records
from qlora_exp.tracking import logged_models, run_key
from qlora_exp.tracking.journal import CONFIG_FILE, FILE
from qlora_exp.tracking.stores.pyfunc_files import MLMODEL
from qlora_exp.utils.errors import ConfigError, ModelError, TrackingError
from qlora_exp.utils.quiet import hide_bars


@dataclass(frozen=True)
class Saved:
    """An adapter or a complete model that a run saved."""

    source: str
    """The run id, URI or folder that the user named."""
    folder: Path
    config: Config
    adapter: bool
    """True for an adapter, false for a complete model."""
    run_id: str | None = None
    """Id of the MLflow run that saved it; None if unknown."""
    tracking_uri: str | None = None
    """MLflow store that contains the run; None: the one in `mlruns/`."""

    def tokenizer(self) -> Any:
        """Load the tokenizer that was saved with the model.

        Raises:
            ModelError: the tokenizer is missing or incomplete.
        """
        check_tokenizer(self.folder)
        with explained(f"{self.folder}: the tokenizer"):
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)


def find(source: str, tracking_uri: str | None = None, device: str = "auto") -> Saved:
    """Find what a run saved, with the recorded config and the version of the base model that it was trained on.

    Args:
        source: an MLflow run id, a `models:/...` URI, or a folder that a run saved or `export` wrote.
        tracking_uri: the MLflow store; None: the one in `mlruns/`.
        device: device to load it on: auto, cpu, cuda.

    Raises:
        ModelError: there is no such model, it was not saved by a run, or its base model has changed since training.
    """
    folder, run_id = logged_models.locate(source, tracking_uri)
    adapter = (folder / "adapter_config.json").is_file()
    config = saved_config(source, folder, device, lambda values: _with_places(values, folder, run_id, tracking_uri))
    if adapter:
        config = _on_its_base(config, folder)
    elif asked := sorted(kernels(_model_config(folder))):
        raise ModelError(
            f"{source}: its config.json asks for a kernel of the hub, whose code would run: {', '.join(asked)}"
        )
    return Saved(source, folder, config, adapter, run_id, tracking_uri)


def _run_of(folder: Path) -> str | None:
    """Return the run that a folder downloaded with MLflow names; None if it names none."""
    file = folder / MLMODEL
    values = plain_yaml(file.read_text("utf-8"), MLMODEL) if file.is_file() else None
    return str(values["run_id"]) if isinstance(values, dict) and values.get("run_id") else None


def _with_places(recorded: Any, folder: Path, run_id: str | None, tracking_uri: str | None) -> Any:
    """Return the config of a saved model with the paths of this machine, which only its run's own config has.

    Without the run's config, a path stays that of a file or folder in the working folder.
    """
    sections = [each for each in (recorded.values() if isinstance(recorded, dict) else ()) if isinstance(each, dict)]
    if not any(str(value).startswith("./") for section in sections for value in section.values()):
        return recorded
    text = ""
    if (folder.parent / FILE).is_file() and (folder.parent / CONFIG_FILE).is_file():
        text = (folder.parent / CONFIG_FILE).read_text("utf-8")
    elif (run_id := run_id or _run_of(folder)) is not None:
        with suppress(TrackingError):  # the run may be gone while its model is not
            text = records.by_ids(tracking_uri, [run_id])[0].text(CONFIG_FILE)
    complete = plain_yaml(text, CONFIG_FILE) if text else None
    same = isinstance(complete, dict) and without_places(complete) == without_places(recorded)
    return complete if same else recorded


def remove_places(folder: Path, local: Collection[str] = ()) -> None:
    """Remove from the files of a saved model what is valid on this machine only, as in newly saved ones.

    Args:
        folder: folder of the model.
        local: relative paths of files and folders to remove too.
    """
    values = without_places(plain_yaml((folder / CONFIG_FILE).read_text("utf-8"), CONFIG_FILE), local)
    values["training"]["resume_from_checkpoint"] = None
    values["model"].pop("adapter", None)
    (folder / CONFIG_FILE).write_text(values_to_yaml(values), "utf-8")
    for file in folder.glob("*config.json"):
        clean = names_of_paths(recorded := json.loads(file.read_text("utf-8")), local)
        if file.name == "adapter_config.json":
            clean["base_model_name_or_path"] = values["model"]["model_name_or_path"]
        if clean != recorded:
            file.write_text(json.dumps(clean, indent=2, sort_keys=True), "utf-8")


def _on_its_base(config: Config, folder: Path) -> Config:
    """Return the config with the version of the base model that the adapter in `folder` was trained on.

    Raises:
        ModelError: the base model has changed since training.
    """
    if not (folder / run_key.BASE_FILE).is_file():  # saved by an older version
        return config
    try:
        then = str(read_json(folder / run_key.BASE_FILE)["version"])
    except KeyError as error:
        raise ModelError(f"{folder / run_key.BASE_FILE} is damaged: it has no {error}") from error
    name = config.model.model_name_or_path
    if re.fullmatch(r"[0-9a-f]{40}", then):  # a commit on the hub
        return config.model_copy(update={"model": config.model.model_copy(update={"revision": then})})
    if (now := run_key.model_version(name, config.model.revision)) == "missing":
        raise ModelError(
            f"the base model of the adapter is not at {Path(name).expanduser().absolute()}: put the folder, or a link "
            "to it, there"
        )
    if now != then:
        raise ModelError(
            f"{name} is not the base model that the adapter was trained on (version {then} then, {now} now)"
        )
    return config


def load(
    source: str, tracking_uri: str | None = None, device: str = "auto", quantization: str | None = None
) -> tuple[Any, Any]:
    """Load a trained model, ready to generate: the base model as in training (quantized or not), with its adapter.

    Args:
        source: an MLflow run id, a `models:/...` URI, or a folder that a run saved or `export` wrote.
        tracking_uri: the MLflow store; None: the one in `mlruns/`.
        device: device to load it on: auto, cpu, cuda.
        quantization: quantization of the base model: an option of that config group, such as nf4_double, int8, none;
            None: as in training.

    Returns:
        The model, in eval mode, and its tokenizer.

    Raises:
        ModelError: there is no such model, it was not saved by a run, or its base model has changed since training.
        ConfigError: there is no such quantization.
    """
    saved = find(source, tracking_uri, device)
    tokenizer = saved.tokenizer()
    return load_saved(saved, quantization), tokenizer


def load_saved(saved: Saved, quantization: str | None = None, name: str = "default") -> Any:
    """Load a saved model as `load` does; `name` is the name of its adapter."""
    config = saved.config
    if quantization is not None:
        chosen = compose(["method=lora", f"quantization={quantization}"]).quantization
        trained = {"bnb_4bit_experts": config.quantization.bnb_4bit_experts}
        if saved.adapter and chosen.model_copy(update=trained) == config.quantization:
            chosen = config.quantization  # options of older versions left experts in 16 bits
        if saved.adapter and config.lora_start == "loftq" and chosen != config.quantization:
            raise ConfigError(
                f"--quantization {quantization}: this adapter makes up for what {config.quantization.name} lost "
                "(LoftQ), so that it fits no other base; leave --quantization out"
            )
        config = config.model_copy(update={"quantization": chosen})
    resolved = resolve(config, detect(config.device, bitsandbytes=config.quantization.bitsandbytes))
    if quantization is not None and not saved.adapter:
        check_files(str(saved.folder), config.quantization, _model_config(saved.folder).get("quantization_config"))
    if saved.adapter:
        base = load_model(config.model, config.quantization, resolved)
        model = with_adapter(base, saved, name)
    else:
        settings = None if quantization is None else quantization_config(config.quantization, resolved)
        with nullcontext() if quantization is None else packing(config.quantization):
            model = load_complete_model(saved, resolved.dtype, resolved.device, settings)
    model.config.use_cache = True
    stop_at_end_of_turn(model, config.dataset, saved.tokenizer())
    return model.eval()


def with_adapter(model: Any, saved: Saved, name: str = "default") -> PeftModel:
    """Add a saved adapter to the base model `model`, or one more to a model that has adapters already.

    Raises:
        ModelError: a file is damaged, or the adapter does not fit the base model.
    """
    check_adapter(saved.folder, saved.config.model, saved.config.method.peft_type)
    with fit_explained(model, saved.folder):
        if isinstance(model, PeftModel):
            model.load_adapter(str(saved.folder), adapter_name=name)
            model.set_adapter(name)
        else:
            model = PeftModel.from_pretrained(model, str(saved.folder), adapter_name=name)
        check_complete(model, saved.folder, name)
    generate_once(model, f"{saved.folder}: the adapter")
    return model


def load_complete_model(saved: Saved, dtype: str, device: str = "cpu", quantization: Any = None) -> Any:
    """Load a complete model, not an adapter: one that full fine-tuning saved or `export` wrote.

    Raises:
        ModelError: a file is damaged or lacks weights, or the model cannot be quantized like this.
    """
    hide_bars()
    check_folder(saved.folder)
    arguments: dict[str, Any] = {"device_map": {"": device}, "trust_remote_code": False}
    if quantization is not None:
        arguments["quantization_config"] = quantization
    elif (saved.folder / GGUF_FILE).is_file() and not (saved.folder / "config.json").is_file():  # an older export
        arguments |= {"gguf_file": GGUF_FILE, "quantization_config": GgufConfig(dequantize=True)}
    elif (stored := stored_as(saved.folder)) in ("gptq", "awq"):
        chosen = compose(["method=lora", f"quantization={stored}"])
        arguments["quantization_config"] = quantization_config(chosen.quantization, resolve(chosen, detect(device)))
    elif stored == "compressed-tensors":
        arguments["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    what = str(saved.folder)
    with explained(what), bounded(what, most_values(saved.folder)):
        kind: Any = AutoModelForCausalLM
        source: Path | None = saved.folder
        if quantization is None and (saved.folder / GGUF_FILE).is_file() and "gguf_file" not in arguments:
            config = AutoConfig.from_pretrained(saved.folder, trust_remote_code=False)
            kind, weights = gguf.read(config, saved.folder / GGUF_FILE)
            source = None
            arguments |= {"config": config, "state_dict": weights}
        loaded: Any = kind.from_pretrained(source, dtype=dtype, output_loading_info=True, **arguments)
    model, info = loaded
    use_own_generation(model, saved.folder)
    for keys, problem in (
        ("missing_keys", "lack {} tensors that its config describes"),
        ("unexpected_keys", "have {} tensors that its config does not describe"),
    ):
        if names := sorted(info[keys]):
            raise ModelError(f"{what}: its files {problem.format(len(names))}: {named(names)}")
    guard_layers(model)  # its outputs on a CPU must not depend on whether that has instructions for bfloat16
    generate_once(model, what)
    return model


def _model_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model's config.json; empty if there is none.

    Raises:
        ModelError: the file is damaged.
    """
    file = folder / "config.json"
    values = read_json(file)
    if not isinstance(values.get("quantization_config") or {}, dict):
        raise ModelError(f"{file} is damaged: its quantization_config must be a JSON object")
    return values


def stored_as(folder: Path) -> str | None:
    """Return how the files of a complete model are quantized (`quant_method`); None if they are not.

    Raises:
        ModelError: the model's config.json is damaged.
    """
    method = (_model_config(folder).get("quantization_config") or {}).get("quant_method")
    return None if method is None else str(method)


def architecture(saved: Saved) -> Any:
    """Return transformers' config of a complete model, or of an adapter's base.

    Raises:
        ModelError: it cannot be loaded.
    """
    if not saved.adapter and (saved.folder / "config.json").is_file():
        with explained(str(saved.folder)):
            return AutoConfig.from_pretrained(saved.folder, trust_remote_code=False)
    return model_config(saved.config.model)
