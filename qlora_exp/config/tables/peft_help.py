"""PEFT's own help and default of each setting of its methods, and what each method does with it.

`nox -s library-settings` writes `peft_help.json` from the installed PEFT, so that `qlora-exp keys` need not import it.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Help:
    """Default and help of one setting of a method.

    Attributes:
        default: PEFT's default, before any option file; None also where PEFT needs a value.
        text: PEFT's help, as one line of plain text.
    """

    default: Any
    text: str


@cache
def _table() -> dict[str, list[tuple[list[str], Any, str]]]:
    return json.loads(FILE.read_text("utf-8"))


def methods_with(name: str) -> dict[str, Help]:
    """Return the PEFT types that have a setting, with its default and help in each; empty if none has it."""
    found = {kind: Help(default, text) for kinds, default, text in _table().get(name, []) for kind in kinds}
    return {kind: found[kind] for kind in sorted(found)}


def names() -> list[str]:
    """List the settings that any method has."""
    return list(_table())
