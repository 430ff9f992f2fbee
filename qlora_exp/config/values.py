"""The config as plain values: flat, as YAML, and the part of it that can change a result."""

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from qlora_exp.config.schema import Config


def to_yaml(config: Config) -> str:
    """The whole config as YAML, which `from_dict(yaml.safe_load(...))` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


APART = ("tracking", "sweep", "search")
"""Sections that change no run's result."""


def what_counts(values: dict[str, Any]) -> dict[str, Any]:
    """Of a config as plain nested values, what can change a run's result: not how it is tracked, swept or planned."""
    counts = {key: value for key, value in values.items() if key not in APART}
    return counts | {
        "model": {key: value for key, value in dict(counts.get("model") or {}).items() if key != "architecture"}
    }


def flatten(config: Config) -> dict[str, Any]:
    """The config as dotted keys (`method.r`) and plain values; a free mapping or list is one value.

    `model.architecture`, which only plans read, is left out.
    """

    def walk(prefix: str, section: BaseModel) -> Iterator[tuple[str, Any]]:
        for name, value in section:
            if isinstance(value, BaseModel):
                yield from walk(f"{prefix}{name}.", value)
            else:
                yield f"{prefix}{name}", value

    return {key: value for key, value in walk("", config) if key != "model.architecture"}
