"""Convert the config to plain values: flat, as YAML, or only the part that can change a result."""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePath, PureWindowsPath
from typing import Any

import yaml
from pydantic import BaseModel

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.method import PARTS
from qlora_exp.utils.secrets import redacted, redacted_tags

CONFIG_FILE = "qlora_exp.yaml"
"""Name of the file with the config, in a run's output folder and with each model that a run saved or exported."""


def to_yaml(config: Config) -> str:
    """Return the complete config as YAML, without secrets.

    `from_dict(yaml.safe_load(...))` turns it back into an equal config, if it has none.
    """
    return values_to_yaml(config.model_dump(mode="json"))


def values_to_yaml(values: Mapping[str, Any]) -> str:
    """Return a config, given as nested dictionaries, as YAML without secrets."""
    # Before they are written: `***` in YAML text would be a reference to an anchor.
    clean = redacted(dict(values))
    if "tracking" in values:
        clean["tracking"]["tags"] = redacted_tags(values["tracking"]["tags"])
    return yaml.safe_dump(clean, sort_keys=False, allow_unicode=True)


_NAMES_FILES = re.compile(
    r"(?:model|method|lora_variant)\.(?!new_tokens$).*|(?:dataset|unrelated)\.(?:sources\.[^.]+\.)?(?:eval_)?path"
    r"|evaluation\.lm_eval_include_path|training\.resume_from_checkpoint"
)
"""Keys whose values may be files or folders."""
_ABSOLUTE = re.compile(r"(?:file:|[/~]|\\\\|[A-Za-z]:[\\/])[^\n]*")


_SOURCES = "dataset.sources"


def without_places(values: Mapping[str, Any], local: Collection[str] = ()) -> dict[str, Any]:
    """Remove from a config what is valid on this machine only, to share it.

    Section `tracking` is left out. An absolute path becomes the file's name in the working folder, `./NAME`.

    Args:
        values: a config as nested dictionaries, or with dotted keys.
        local: relative paths that are replaced like absolute ones.
    """
    shared: dict[str, Any] = {}
    for key, value in values.items():
        if key.split(".")[0] == "tracking":
            continue
        if isinstance(value, Mapping) and "." not in key:
            shared[key] = {name: _without_place(f"{key}.{name}", item, local) for name, item in value.items()}
        else:
            shared[key] = _without_place(key, value, local)
    return shared


def _without_place(key: str, value: Any, local: Collection[str]) -> Any:
    if key.startswith(_SOURCES) and isinstance(value, Mapping):
        return {name: _without_place(f"{key}.{name}", item, local) for name, item in value.items()}
    return _names_only(value, local) if _NAMES_FILES.fullmatch(key) else value


def _names_only(value: Any, local: Collection[str] = ()) -> Any:
    """Replace each string in nested lists and dictionaries that is an absolute path, or in `local`, by `./NAME`."""
    if isinstance(value, Mapping):
        return {_names_only(name, local): _names_only(item, local) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_names_only(item, local) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("[", "{")):  # a list or a mapping as text
        return re.sub(r"(['\"])([^'\"]*)\1", lambda match: f"{match[1]}{_names_only(match[2], local)}{match[1]}", value)
    if value not in local and not _ABSOLUTE.fullmatch(value):
        return value
    path = PureWindowsPath(value) if "\\" in value else PurePath(value)
    return f"./{path.name}"


def names_of_paths(values: Any, local: Collection[str]) -> Any:
    """Replace paths in the content of a JSON file by names, under keys that say that they are paths."""
    if isinstance(values, list):
        return [names_of_paths(item, local) for item in values]
    if not isinstance(values, dict):
        return values
    return {
        key: (_names_only if key.endswith(("_path", "_file", "_dir")) else names_of_paths)(item, local)
        for key, item in values.items()
    }


APART = ("tracking", "sweep", "search", "tuning")
"""Sections that do not change a run's result."""
_OF_ONE_START = ("name", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "ddp_timeout")
"""Keys of `distributed` that say where the processes are and how they find each other, not what they compute."""
_OF_ROWS = ("validation_size", "evaluate_on", "prompt_template", "chat_template", "history_column", "system_column")
_OF_MIXTURES = ("sources", "mixing_temperature", "stopping", "replay")
_EMPTY_IN_OLDER_RECORDS = (
    ("model", "adapter"),
    ("model", "new_tokens"),
    *(("method", key) for key in PARTS),
    ("quantization", "bnb_4bit_experts"),
    ("training", "lr_scheduler_kwargs"),
    ("training", "tune"),
    ("training", "activation_offloading"),
    ("training", "tiled_mlp"),
    ("training", "padding"),
    ("training", "recomputed_layers"),
    ("training", "sft_config"),
    ("optimizer", "optim_args"),
    ("optimizer", "optim_target_modules"),
    *((section, key) for section in ("dataset", "unrelated") for key in _OF_ROWS),
    *(("dataset", key) for key in _OF_MIXTURES),
)
"""Keys that records of older versions lack; empty, they say the same."""


def result_values(values: dict[str, Any]) -> dict[str, Any]:
    """Keep only the values that can change a run's result, not how the run is tracked, swept or planned.

    Args:
        values: a config as nested dictionaries.
    """
    counts = {key: value for key, value in values.items() if key not in APART}
    if given := (training := counts.get("training") or {}).get("sft_config"):  # null is as not given
        counts["training"] = training | {"sft_config": {key: item for key, item in given.items() if item is not None}}
    for section, key in (("model", "architecture"), *_EMPTY_IN_OLDER_RECORDS):
        kept = dict(counts.get(section) or {})
        if key == "architecture" or not kept.get(key):
            kept.pop(key, None)
        counts[section] = kept
    shared = {key: value for key, value in (counts.pop("distributed", None) or {}).items() if key not in _OF_ONE_START}
    return counts | {"distributed": shared} if shared.get("engine", "none") != "none" else counts


def flatten(config: Config) -> dict[str, Any]:
    """Flatten the config to dotted keys (`method.r`) with plain values. A free mapping or list is one value.

    Sources have keys of their own (`dataset.sources.NAME.path`). `model.architecture` is left out: only memory plans
    read it.
    """

    def walk(prefix: str, section: BaseModel) -> Iterator[tuple[str, Any]]:
        for name, value in section:
            if isinstance(value, BaseModel):
                yield from walk(f"{prefix}{name}.", value)
            elif f"{prefix}{name}" == _SOURCES:
                for source, keys in value.items():
                    yield from ((f"{_SOURCES}.{source}.{key}", item) for key, item in keys.items())
            else:
                yield f"{prefix}{name}", value

    return {key: value for key, value in walk("", config) if key != "model.architecture"}
