"""Make names that MLflow accepts."""

import hashlib
import posixpath
import re
from collections.abc import Iterable

LONGEST_NAME = 250
"""Most characters in the name of a metric, param or tag."""


def valid_names(names: Iterable[str]) -> dict[str, str]:
    """Map each name to one that MLflow accepts for a metric; different names stay different.

    A character that MLflow does not accept becomes `-`: `recall@5` -> `recall-5`. If that name is taken, a digest of
    the original is added.
    """
    names = list(dict.fromkeys(names))
    valid = {name: name for name in names if _valid(name) == name}
    taken = set(valid)
    for name in names:
        if name not in valid:
            new_name = _valid(name)
            valid[name] = _with_digest(new_name, name) if new_name in taken else new_name
            taken.add(valid[name])
    return {name: valid[name] for name in names}


def _valid(name: str) -> str:
    parts = [re.sub(r"[^\w.\- :]", "-", part) for part in name.split("/")]
    valid = "/".join("-" if part in ("", ".", "..") else part for part in parts)
    # MLflow normalizes names as paths; "..x" at the start would point out of the folder.
    if posixpath.normpath(valid) != valid or valid.startswith(".."):
        valid = f"-{valid[1:]}"
    return valid if len(valid) <= LONGEST_NAME else _with_digest(valid, name)


def _with_digest(valid: str, name: str) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{valid[: LONGEST_NAME - 9]}-{digest}"
