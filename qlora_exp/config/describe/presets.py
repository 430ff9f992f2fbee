"""Read which shipped option files set a key, and to what."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qlora_exp.config.conf_folder import GROUPS, conf_dir
from qlora_exp.config.describe.types import shown_value

_GLOBAL = re.compile(r"^#\s*@package\s+_global_\s*$", re.MULTILINE)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def root_file() -> Path:
    """Return the file of the root config, whose defaults list names an option of each group."""
    return conf_dir() / "config.yaml"


def comment(group: str, option: str) -> str:
    """Return the comment at the head of an option's file, as one paragraph."""
    lines = (conf_dir() / group / f"{option}.yaml").read_text("utf-8").splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head += [] if _GLOBAL.match(line) else [line.lstrip("# ")]
    return " ".join(head)


def options() -> dict[str, list[str]]:
    """Return the shipped options of each group, those of Hydra's groups among them."""
    groups = {name: sorted(file.stem for file in (conf_dir() / name).glob("*.yaml")) for name in GROUPS}
    return groups | {
        f"hydra/{name}": sorted(file.stem for file in (conf_dir() / "hydra" / name).glob("*.yaml"))
        for name in ("launcher", "sweeper")
    }


def is_global(group: str, option: str) -> bool:
    """Return whether an option's file sets keys of any section (`# @package _global_`), not of its group's only."""
    return _GLOBAL.search((conf_dir() / group / f"{option}.yaml").read_text("utf-8")) is not None


@cache
def values_of(group: str, option: str) -> dict[str, Any]:
    """Return the keys that an option sets, with their values; of a sweep, those it varies, as `4,8,16`.

    Options that it begins with (`defaults: [lora]`) count, options of other groups that it chooses do not.
    """
    text = (conf_dir() / group / f"{option}.yaml").read_text("utf-8")
    found = yaml.load(text, _LOADER) or {}
    parents = [entry for entry in found.pop("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    swept = found.pop("hydra", {}).get("sweeper", {}).get("params", {})
    own = found if _GLOBAL.search(text) else {group: found}
    inherited = {key: value for parent in parents for key, value in values_of(group, parent).items()}
    return inherited | dict(_flat("", own)) | swept


def _flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and not prefix:
            yield from _flat(f"{key}.", value)
        else:
            yield f"{prefix}{key}", value


def chosen_by(group: str, option: str) -> dict[str, str]:
    """Return the options of other groups that an option chooses: by group, such as `quantization`."""
    found = yaml.load((conf_dir() / group / f"{option}.yaml").read_text("utf-8"), _LOADER) or {}
    chosen: dict[str, str] = {}
    for entry in found.get("defaults", []):
        if isinstance(entry, dict):
            chosen |= {name.removeprefix("override ").lstrip("/"): str(value) for name, value in entry.items()}
        elif entry != "_self_":
            chosen |= chosen_by(group, entry)
    return chosen


def setting(key: str) -> dict[str, dict[str, list[str]]]:
    """Return the values that options give a key: by group, each value as text with the options that have it.

    Reads only the files in which the key's last part occurs, so that this takes milliseconds.
    """
    name, groups = key.rpartition(".")[2], {}
    for group in GROUPS:
        values: dict[str, list[str]] = {}
        for option in _mentioning(group, name):
            given = values_of(group, option)
            if key in given:
                values.setdefault(" ".join(shown_value(given[key]).split()), []).append(option)
        if values:
            groups[group] = values
    return groups


def _mentioning(group: str, name: str) -> list[str]:
    """List the options of a group whose file has a name, or begins with one that may have it."""
    texts = {file.stem: file.read_text("utf-8") for file in sorted((conf_dir() / group).glob("*.yaml"))}
    return [option for option, text in texts.items() if name in text or "\ndefaults:" in text]


def peft_types() -> dict[str, str]:
    """Return the PEFT type of each option of `method` that has one."""
    found = {option: values_of("method", option).get("method.peft_type") for option in options()["method"]}
    return {option: kind for option, kind in found.items() if kind}
