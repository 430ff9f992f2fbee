"""Cut the texts of messages to what an MLflow store can hold. The journal has them whole.

The limits are those of MLflow's own checks and of its database columns, which count characters. SQLite has no limits,
so only PostgreSQL and others show what is too long.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from qlora_exp.utils.names import LONGEST_NAME, valid_names

_RUN_NAME, _TAG, _PARAM, _DATASET_NAME, _SOURCE, _MODEL_NAME = 250, 8000, 6000, 500, 10_000, 500


def fit_message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with every text as it is sent; a fitting message is returned unchanged."""
    match message:
        case {"op": "start", "tags": tags, "run_name": name}:
            return message | {"tags": _fit_values(tags, _TAG), "run_name": fit(name, _RUN_NAME)}
        case {"op": "resume", "tags": tags}:
            return message | {"tags": _fit_values(tags, _TAG)}
        case {"op": "tags", "values": values}:
            return message | {"values": _fit_values(values, _TAG)}
        case {"op": "params", "values": values}:
            return message | {"values": _fit_values(values, _PARAM)}
        case {"op": "dataset", "name": name, "source": source}:
            return message | {"name": fit(name, _DATASET_NAME), "source": fit(source, _SOURCE)}
        case {"op": "model", "name": name}:
            return message | {"name": fit(name, _MODEL_NAME)}
    return message


def fit(text: str, limit: int) -> str:
    """Cut a text, and end it with a digest of all of it, so that different texts stay different.

    NUL, which PostgreSQL does not accept, is replaced. What is added may also stand in a model's name.
    """
    text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    mark = f" ({len(text)} characters, SHA-256 {digest})"
    return text[: limit - len(mark)] + mark


def lost_its_end(param: str) -> bool:
    """Check whether an older version cut the value of a param, without a digest."""
    return len(param) == _PARAM and not re.search(r"SHA-256 [0-9a-f]{16}\)$", param)


def _fit_values(values: Mapping[str, str], limit: int) -> dict[str, str]:
    too_long = [key for key in values if len(key) > LONGEST_NAME or "\0" in key]
    keys = {key: key for key in values} | valid_names(too_long)
    return {keys[key]: fit(value, limit) for key, value in values.items()}
