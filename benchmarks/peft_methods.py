"""Write qlora_exp/config/peft_methods.json: PEFT's methods and their settings, as the installed PEFT declares them.

Run by `nox -s peft-methods`, after PEFT's version or `qlora_exp/models/bottleneck.py` has changed.
"""

import dataclasses
import inspect
import json
import types
import typing
from importlib.metadata import version
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from qlora_exp.config.peft_methods import FILE, PLAIN
from qlora_exp.models import bottleneck  # noqa: F401 - registers its method with PEFT

NAMES = {kind: name for name, kind in PLAIN.items()}


def main() -> None:
    FILE.write_text(written(), "utf-8")


def written() -> str:
    """A setting a line, so that a change of PEFT's is a short diff."""
    methods = []
    for peft_type, config in sorted(PEFT_TYPE_TO_CONFIG_MAPPING.items()):
        fields = ",\n".join(f"    {json.dumps(name)}: {json.dumps(kind)}" for name, kind in settings(config).items())
        head = f'  {json.dumps(peft_type.value)}: {{\n   "config": {json.dumps(config.__name__)},\n   "settings": '
        methods.append(f"{head}{{\n{fields}\n   }}\n  }}")
    every = ",\n".join(methods)
    return f'{{\n "peft": {json.dumps(version("peft"))},\n "methods": {{\n{every}\n }}\n}}\n'


def settings(config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    fields = sorted(field.name for field in dataclasses.fields(config) if field.init)
    return {name: described(hints[name]) for name in fields}


def described(kind: Any) -> Any:
    """A type in the vocabulary that `peft_methods` reads."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in NAMES:
        return NAMES[kind]
    if origin in (typing.Union, types.UnionType):
        alternatives: list[Any] = []
        for one in map(described, arguments):
            if one not in alternatives:
                alternatives.append(one)
        return alternatives[0] if len(alternatives) == 1 else {"union": alternatives}
    if origin is typing.Literal:
        return {"literal": list(arguments)}
    if origin is list:
        return {"list": described(arguments[0])}
    if origin is tuple:
        return {"tuple": [described(one) for one in arguments]}
    if origin is dict:
        return {"dict": [described(one) for one in arguments]}
    if inspect.isclass(kind) and issubclass(kind, str):  # an enumeration of texts
        return "str"
    if dataclasses.is_dataclass(kind):  # a nested config
        return "dict"
    raise TypeError(f"peft_methods has no word for the type {kind}")


if __name__ == "__main__":
    main()
