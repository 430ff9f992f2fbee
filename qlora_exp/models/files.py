"""Find a model's files, and check what they say before anything slow is imported.

Most mistakes with a model can be seen in its config.json, which is plain JSON, and in the names of its files. Must not
import torch.
"""

import json
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.config.sections.quantization import QuantizationConfig
from qlora_exp.config.tables import compatibility
from qlora_exp.config.tables.peft_methods import PRESETS
from qlora_exp.config.values import CONFIG_FILE
from qlora_exp.libraries.transformers import model_types
from qlora_exp.models import builtin
from qlora_exp.utils.errors import ConfigError, ModelError, did_you_mean, first_line, nearest
from qlora_exp.utils.units import MIB

_EXTRA, _GPTQMODEL = "qlora-exp[quantizers]", "GPTQModel' 'optimum"
_PACKAGES = {
    "torchao": ("torchao", _EXTRA),
    "quanto": ("optimum.quanto", _EXTRA),
    "gptq": ("gptqmodel", _GPTQMODEL),
    "awq": ("gptqmodel", _GPTQMODEL),
}
"""Module that each quantization method needs, and what to install for it."""
_OWN_LAYERS = {"falcon": "FalconLinear"}
"""Families whose linear layers have a class of their own, which bitsandbytes does not quantize."""
NO_PICKLE = "its weights are a pickle, which is never opened here: convert them to .safetensors (save_pretrained)"
_COUNT = re.compile(
    r"^(?!.*(?:size|length|dim|width|theta)).*(?:layer|block_count|expert|num_heads|n_head|head_count|num_labels)",
    re.IGNORECASE,
)
"""Keys whose numbers say how many things are built, not how wide they are (`shared_expert_intermediate_size`)."""
_MOST = 20_000
"""Largest such number. Published models have some hundreds of layers, and up to 16384 experts in each (Doge)."""
_LARGEST_FILE = 64 * MIB
"""Largest config file; that of a tokenizer with its vocabulary has tens of MiB."""
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BLOOM = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_LINEAR = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    **dict.fromkeys(("granite", "olmo2", "smollm3", "stablelm"), _LLAMA),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), _BLOOM),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "c_proj", "c_fc")),
    "gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}
"""The linear layers of common families, without the output layer."""
NO_MODULE = "method.target_modules: '{}' matches no module of this model"
GGUF_FILE = "model.gguf"
"""Name of the file that `export --to gguf` writes."""
EXPORT_FILE = "export.json"
"""Name of the file in which `export` and `merge` say what they wrote."""
_ADAPTER = "adapter_config.json"
_INDEX = "model.safetensors.index.json"
_TOKENIZER = ("*token*", "vocab*", "*.model", "*.spm", "tekken.json")


def locate(config: ModelConfig) -> str:
    """Return a hub id or a local folder that transformers can load; build built-in and random models first.

    Raises:
        ModelError: there is no such folder, or it holds an adapter.
    """
    name = config.model_name_or_path
    if name.startswith(builtin.PREFIXES):
        return str(builtin.folder_of(name, dict(config.random_config)))
    return str(folder) if (folder := check_place(name)) else name


def check_place(name: str) -> Path | None:
    """Return the local folder of a model; None if it is a built-in model, or one of the hub.

    Raises:
        ModelError: there is no such folder, or it holds an adapter.
        ConfigError: there is no such built-in model.
    """
    builtin.check_name(name)
    folder = Path(name).expanduser()
    if name.startswith(builtin.PREFIXES) or not (folder.is_dir() or name.startswith((".", "/", "~"))):
        return None
    if not folder.is_dir():
        raise ModelError(f"model.model_name_or_path: there is no folder {name}")
    if (folder / _ADAPTER).is_file():
        raise _adapter(name, folder / _ADAPTER)
    if (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        raise _output(name, folder)
    return folder


def _adapter(name: str, file: Path) -> ModelError:
    base = _read(file).get("base_model_name_or_path")
    of_run = (file.parent / CONFIG_FILE).is_file()
    train_on = f" model.adapter={file.parent} to train on from the adapter" if of_run else ""
    return ModelError(
        f"model.model_name_or_path: {name} holds an adapter, not a model"
        + (f"; its base is {base}: use model.model_name_or_path={base}{train_on}, or" if base else ";")
        + " merge it into its base first (`qlora-exp merge RUN --out FOLDER`), then use that folder"
    )


def _output(name: str, folder: Path) -> ModelError:
    """Return why the output folder of a run is no model, and where its model or adapter is."""
    saved = folder / "model"
    if (saved / _ADAPTER).is_file():
        instead = f"it trained an adapter: train on from it with model.adapter={folder} and its base"
    else:
        instead = f"use {saved}" if saved.is_dir() else "it saved no model"
    return ModelError(f"model.model_name_or_path: {name} is the output folder of a run, not a model; {instead}")


def exported(folder: Path) -> str | None:
    """Say how a model in a folder was exported, and from what; None if `export` or `merge` did not write it."""
    facts = read_json(folder / EXPORT_FILE)
    if not facts:
        return None
    form, run = facts.get("form"), facts.get("run_id")
    source = f"run {run}" if run else facts.get("source")
    how = "merged" if form == "merged" else f"exported as {form}"
    return f"{how} from {source} on {facts.get('model_name_or_path')}"


def hub_error(config: ModelConfig, error: str, exists: bool = True) -> ModelError:
    """Return why a model cannot be fetched from the hub.

    Args:
        config: the model.
        error: what the hub's client says.
        exists: False if the hub has no such model.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name = config.model_name_or_path
    try:
        return _adapter(name, Path(hf_hub_download(name, _ADAPTER, revision=config.revision)))
    except (HfHubHTTPError, HFValidationError, OSError):  # not an adapter either
        pass
    if not exists:
        return ModelError(
            f"{name}: no such model on the hub, and no such local folder (a private model needs HF_TOKEN)"
        )
    return ModelError(
        f"{name}: is not a local folder, and cannot be fetched from the hub; check the name"
        f"{f', the revision {config.revision!r}' if config.revision else ''} and the network.\n{error}"
    )


def check(config: Config, trains: bool = True) -> None:
    """Check what can be seen without the model: its files, its quantization, and whether a method can train its family.

    Args:
        config: the run's config.
        trains: whether the run is to start, so that weights and a tokenizer are needed; a plan needs neither.

    Raises:
        ModelError: a file is missing, damaged, or quantized in another way, or a package is missing.
        ConfigError: there is no such built-in model, or the method fails on all models of this family.
    """
    name, quantization = config.model.model_name_or_path, config.quantization
    if trains:
        require_package(quantization)
    folder = None
    if config.model.architecture.get("_name_or_path") == name:  # a plan of a model whose files are elsewhere
        values = config.model.architecture
    elif (folder := check_place(name)) is None:
        values = builtin.described(name) or _cached(config.model)
    else:
        values = _read(folder / "config.json")
        if trains:
            _check_complete(folder)
    if not values:
        return
    made = exported(folder) if folder else None
    check_files(f"{name} ({made})" if made else name, quantization, values.get("quantization_config"))
    own, inner = str(values.get("model_type", "")), values.get("text_config")
    family = str(inner.get("model_type", own)) if isinstance(inner, dict) else own
    if quantization.bitsandbytes and own in _OWN_LAYERS:
        raise ModelError(unquantized(name, quantization, "most", _OWN_LAYERS[own]))
    if own and "auto_map" not in values and not name.startswith(builtin.PREFIXES):
        _check_family(name, own)
    _check_targets(config.peft_settings.get("target_modules"), _LINEAR.get(own, ()))
    kind = compatibility.kind_of(config.method.kind, config.lora_variant.name)
    if why := compatibility.family_refusal(kind, family):
        raise ConfigError(f"{config.cannot_train}: {why}")


def check_files(name: str, quantization: QuantizationConfig, stored: Any) -> None:
    """Check that a model's files are quantized as configured, or not quantized if the loader will do it.

    Transformers would use the quantization of the files, whatever is configured.

    Args:
        name: the model's name.
        quantization: the run's config.
        stored: `quantization_config` of the model's own config; None if its files are not quantized.

    Raises:
        ModelError: the files are quantized in another way, or are not quantized and must be (GPTQ, AWQ).
    """
    asked = quantization.quant_method
    if stored is None:
        if asked in ("gptq", "awq"):
            raise ModelError(
                f"{name}: its files are not quantized, but quantization={asked} needs quantized files; choose another "
                f"quantization, or a model published in {asked.upper()} format"
            )
        return
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method", "bitsandbytes")
    if method == "bitsandbytes":
        double = "_double" if stored.get("bnb_4bit_use_double_quant") else ""
        theirs = "int8" if stored.get("load_in_8bit") else f"{stored.get('bnb_4bit_quant_type', 'fp4')}{double}"
        double = "_double" if quantization.bnb_4bit_use_double_quant else ""
        ours = "int8" if quantization.load_in_8bit else f"{quantization.bnb_4bit_quant_type}{double}"
        fits = quantization.bitsandbytes and ours == theirs
    else:
        theirs, fits = method, method == asked and method in ("gptq", "awq")
    if not fits:
        choice = f"quantization={theirs}" if method in ("bitsandbytes", "gptq", "awq") else "another model"
        raise ModelError(f"{name}: its files are quantized already ({method}): choose {choice}")


def _cached(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model of the hub, if a copy is on this machine; an empty one if it can be fetched.

    Raises:
        ModelError: there is no copy and no network, or the hub has no models with such names.
    """
    if not config.from_hub:
        return {}
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(config.model_name_or_path, "config.json", revision=config.revision)
    except HFValidationError as error:
        raise hub_error(config, first_line(error), exists=False) from error
    if isinstance(file, str):
        return _read(Path(file))
    if constants.HF_HUB_OFFLINE:
        raise hub_error(config, "there is no copy on this machine, and no network (HF_HUB_OFFLINE)")
    return {}


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ModelError(f"{file.parent}: not a complete model: it has no {file.name}")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model; empty if there is no such file.

    Raises:
        ModelError: the file is damaged, or names a number of layers, heads, ... that no model has.
    """
    try:
        if not file.is_file():
            return {}
        if file.stat().st_size > _LARGEST_FILE:
            raise ModelError(f"{file} is damaged: it is larger than {_LARGEST_FILE // MIB} MiB")
        values = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is damaged: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} is damaged: it must be a JSON object")
    check_counts(file, values)
    return values


def check_counts(file: Path, values: Any, key: str = "") -> None:
    """Check the numbers in a config that say how many things are built.

    Raises:
        ModelError: one is larger than in any model; the message names `file` and the key.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            check_counts(file, value, str(name))
    elif isinstance(values, list):
        if len(values) > _MOST and _COUNT.search(key):
            raise ModelError(f"{file}: {key} has {len(values):,} entries; no model has more than {_MOST}")
        for value in values:
            check_counts(file, value, key)
    elif isinstance(values, int | float) and values > _MOST and _COUNT.search(key):
        raise ModelError(f"{file}: {key} is {values:.3g}; no model has more than {_MOST}")


def _check_complete(folder: Path) -> None:
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER):
        raise ModelError(
            f"{folder}: not a complete model: it has no tokenizer (tokenizer.json); save the model's tokenizer there "
            "too: tokenizer.save_pretrained(FOLDER)"
        )
    shards = {*_read(folder / _INDEX).get("weight_map", {}).values()} if (folder / _INDEX).is_file() else set()
    if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
        raise ModelError(f"{folder}: not a complete model: it lacks {', '.join(missing)}, which {_INDEX} names")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")):
        raise ModelError(f"{folder}: {NO_PICKLE}")
    if any(folder.glob("*.gguf")):
        made = exported(folder)
        raise ModelError(
            f"{folder}{f' ({made})' if made else ''}: its weights are in a GGUF file, which no run trains: use the "
            "model that it was made from, or export that as merged (`qlora-exp merge RUN --out FOLDER`)"
        )
    raise ModelError(f"{folder}: not a complete model: it has no weights (model.safetensors)")


def _check_family(name: str, family: str) -> None:
    if family not in (known := model_types()):
        raise ModelError(
            f"{name}: the installed transformers has no model of type {family}"
            f"{did_you_mean(family, sorted(known))} Upgrade transformers, or choose another model"
        )


def _check_targets(wanted: Any, linear: tuple[str, ...]) -> None:
    """Refuse names of modules that are misspelled or of another family; the model itself is asked about all others."""
    of_others = {name for names in _LINEAR.values() for name in names} - {*linear}
    for target in wanted if isinstance(wanted, list) and linear else ():
        if target not in linear and (target in of_others or ("." not in target and nearest(target, linear))):
            raise ConfigError(no_module(f"{NO_MODULE.format(target)}{did_you_mean(target, linear)}", linear))


def no_module(start: str, linear: Iterable[str], end: str = "") -> str:
    """Say what can be named in `target_modules`, after a sentence that says what is wrong there."""
    names = ", ".join(linear) or "none"
    return f"{start.rstrip('.')}; name some of its linear layers in a list: {names}{end}; presets: {', '.join(PRESETS)}"


def require_package(quantization: QuantizationConfig) -> None:
    """Check that the package that quantizes is installed.

    Raises:
        ModelError: it is not.
    """
    if not installed(quantization.quant_method):
        raise ModelError(
            f"quantization={quantization.name} needs a missing package: "
            f"pip install '{_PACKAGES[quantization.quant_method][1]}'"
        )


def installed(quant_method: str) -> bool:
    """Return whether the package that this quantization method needs is installed."""
    module, _ = _PACKAGES.get(quant_method, ("bitsandbytes", ""))
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # raised if the parent package is missing
        return False


def unquantized(name: str, quantization: QuantizationConfig, share: str, classes: str) -> str:
    """Say that a quantized base would stay as it is."""
    return (
        f"{name}: quantization={quantization.name} would leave {share} of its weights as they are, because it does not "
        f"quantize layers of class {classes}: choose quantization=none with method=lora, or another model"
    )
