"""Write a JSON schema of option files, so that an editor completes and checks them.

It is pydantic's schema of the config, adapted to what an option file may have: PEFT's settings, TRL's arguments, a
defaults list, `${...}` in the place of a value, and null where another file must give the value. It knows names, types
and ranges; what depends on several keys is checked when a run is composed.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from qlora_exp.config.describe import entries, presets
from qlora_exp.config.schema import Config
from qlora_exp.config.sections.mixture import source_keys
from qlora_exp.config.tables import peft_methods, sft_arguments
from qlora_exp.config.validate import OPEN_SECTIONS

DIALECT = "http://json-schema.org/draft-07/schema#"
"""The one that editors' YAML support reads."""
_ANYTHING_ELSE = [{"type": "string", "pattern": r"\$\{.*\}"}, {"type": "null"}]
"""What may stand in the place of any value: an interpolation, or null."""


def of_group(group: str) -> dict[str, Any]:
    """Return the schema of the option files of a group.

    Args:
        group: a config group. Its options set the keys of its section or, with `# @package _global_` in the first line,
            any key. A group that has both kinds gets a schema that takes either.
    """
    names = presets.options()[group]
    kinds = {presets.is_global(group, name) for name in names}
    parts = [_global() if anywhere else _section(group) for anywhere in sorted(kinds)]
    schema = parts[0] if len(parts) == 1 else {"anyOf": parts}
    head = {"$schema": DIALECT, "title": f"qlora_exp: an option of {group}"}
    return head | schema | ({"definitions": _definitions()} if True in kinds else {})


def of_any() -> dict[str, Any]:
    """Return the schema of files with `# @package _global_`, such as experiments."""
    return {"$schema": DIALECT, "title": "qlora_exp: any key", **_global(), "definitions": _definitions()}


def _section(group: str) -> dict[str, Any]:
    section = _definitions()[group]
    return section | {"properties": {"defaults": _defaults()} | section["properties"]}


def _global() -> dict[str, Any]:
    sections = {name: {"$ref": f"#/definitions/{name}"} for name in entries.sections()}
    hydra = {"description": "Hydra's own settings, such as mode, sweeper.params and run.dir.", "type": "object"}
    properties = {"defaults": _defaults(), **sections, "hydra": hydra}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _defaults() -> dict[str, Any]:
    """Describe a defaults list: an option of the same group, or `override /GROUP: OPTION`."""
    known: dict[str, Any] = {}
    for group, names in presets.options().items():
        one = {"anyOf": [{"enum": names}, {"type": ["string", "null"]}]}
        choice = one if group != "experiment" else {"anyOf": [*one["anyOf"], {"type": "array"}]}
        known |= dict.fromkeys((group, f"override /{group}"), choice)
    entry = {"type": "object", "properties": known, "additionalProperties": False, "maxProperties": 1}
    about = "Options that this file begins with (`- NAME` of its group), and those of other groups that it chooses."
    return {"description": about, "type": "array", "items": {"anyOf": [{"type": "string"}, entry]}}


@cache
def _definitions() -> dict[str, Any]:
    """Return the schema of each section, and of the keys outside of sections, by name."""
    whole = Config.model_json_schema(ref_template="#/{model}")
    found = {}
    for name, described in whole["properties"].items():
        section = whole["$defs"].get(described.get("$ref", "").removeprefix("#/"))
        found[name] = _value(described) if section is None else _open_to_others(name, section)
    return found


def _open_to_others(name: str, section: dict[str, Any]) -> dict[str, Any]:
    """Describe the keys of a section, with those that other libraries declare."""
    properties = {key: _value(kind) for key, kind in section["properties"].items()}
    if name in OPEN_SECTIONS:
        types = ["LORA"] if name == "lora_variant" else peft_methods.trainable()
        settings: dict[str, list[str]] = {}
        for kind in types:
            for setting in peft_methods.of_options(kind):
                settings.setdefault(setting, []).append(kind)
        properties |= {setting: _setting(setting, kinds) for setting, kinds in settings.items()}
    if name == "training":
        accepted = {key: _of_type(kind, sft_arguments.MEANINGS[key]) for key, kind in sft_arguments.accepted().items()}
        properties["sft_config"] |= _mapping(accepted)
    if name == "dataset":
        weight = _of_type(float, "Share of the training rows; the weights of all sources sum to 1.")
        keys = {key: properties[key] for key in source_keys() if key != "weight"} | {"weight": weight}
        properties["sources"] |= {
            "anyOf": [{"type": "object", "additionalProperties": _mapping(keys)}, *_ANYTHING_ELSE]
        }
    return {"description": section.get("description", ""), **_mapping(properties)} | {"type": ["object", "null"]}


def _mapping(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _setting(name: str, kinds: Iterable[str]) -> dict[str, Any]:
    """Describe a setting by the types that it has in the methods that have it."""
    types = {str(kind): kind for peft_type in kinds for kind in [peft_methods.settings(peft_type)[name]]}
    first = entries.methods_with(name)[0]
    schemas = [TypeAdapter(kind).json_schema() for kind in types.values()]
    about = entries.setting(name, first).meaning
    return _value({"description": about, "anyOf": schemas})


def _of_type(kind: Any, about: str) -> dict[str, Any]:
    return _value({"description": about, **TypeAdapter(kind).json_schema()})


def _value(kind: dict[str, Any]) -> dict[str, Any]:
    """Describe a value; an interpolation or null may stand in its place."""
    kept = {name: " ".join(str(kind[name]).split()) for name in ("description",) if name in kind}
    kept |= {"default": kind["default"]} if "default" in kind else {}
    own = {name: part for name, part in kind.items() if name not in (*kept, "title")}
    alternatives = own.pop("anyOf", [])
    return kept | {"anyOf": [_plain(part) for part in (*alternatives, *([own] if own else []))] + _ANYTHING_ELSE}


def _plain(kind: dict[str, Any]) -> dict[str, Any]:
    """Leave out what editors cannot use: pydantic's patterns are Python's, JSON's are ECMAScript's."""
    pattern = kind.get("pattern", "")
    return {name: part for name, part in kind.items() if name != "pattern" or not re.search(r"\(\?[^:=!]", pattern)}
