"""Convert the config to plain values: flat, as YAML, or only the part that can change a result."""

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from qlora_exp.config.schema import Config


def to_yaml(config: Config) -> str:
    """Return the complete config as YAML. `from_dict(yaml.safe_load(...))` turns it back into an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


APART = ("tracking", "sweep", "search")
"""Sections that do not change a run's result."""
_EMPTY_IN_OLDER_RECORDS = (("training", "lr_scheduler_kwargs"),)
"""Keys that records of older versions lack; empty, they say the same."""


def result_values(values: dict[str, Any]) -> dict[str, Any]:
    """Keep only the values that can change a run's result, not how the run is tracked, swept or planned.

    Args:
        values: a config as nested dictionaries.
    """
    counts = {key: value for key, value in values.items() if key not in APART}
    for section, key in (("model", "architecture"), *_EMPTY_IN_OLDER_RECORDS):
        kept = dict(counts.get(section) or {})
        if key == "architecture" or not kept.get(key):
            kept.pop(key, None)
        counts[section] = kept
    return counts


def flatten(config: Config) -> dict[str, Any]:
    """Flatten the config to dotted keys (`method.r`) with plain values. A free mapping or list is one value.

    `model.architecture` is left out: only memory plans read it.
    """

    def walk(prefix: str, section: BaseModel) -> Iterator[tuple[str, Any]]:
        for name, value in section:
            if isinstance(value, BaseModel):
                yield from walk(f"{prefix}{name}.", value)
            else:
                yield f"{prefix}{name}", value

    return {key: value for key, value in walk("", config) if key != "model.architecture"}
