"""Write the settings that the installed libraries declare, for checking configs without importing these libraries.

`qlora_exp/config/tables/peft_methods.json` has PEFT's methods with their settings, `peft_help.json` the default and
the help text of each setting, `sft_arguments.json` the arguments of TRL's SFTConfig. Run `nox -s library-settings`
after another version of PEFT, TRL or transformers, and after a change of `qlora_exp/models/bottleneck.py`.
"""

import argparse
import dataclasses
import enum
import inspect
import json
import re
import types
import typing
from importlib.metadata import version
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from trl.trainer.sft_config import SFTConfig

from qlora_exp.config.tables import peft_help, peft_methods, sft_arguments
from qlora_exp.config.tables.declared_types import PLAIN
from qlora_exp.models import bottleneck  # noqa: F401 - the import registers its method with PEFT

NAMES = {kind: name for name, kind in PLAIN.items()}


def main() -> None:
    """Write the files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    peft_methods.FILE.write_text(written_methods(), "utf-8")
    peft_help.FILE.write_text(written_help(), "utf-8")
    sft_arguments.FILE.write_text(written_arguments(), "utf-8")


def written_methods() -> str:
    """Return the text of peft_methods.json, one setting per line, so that a change in PEFT gives a short diff."""
    methods = []
    for peft_type, config in sorted(PEFT_TYPE_TO_CONFIG_MAPPING.items()):
        head = f'  {json.dumps(peft_type.value)}: {{\n   "config": {json.dumps(config.__name__)},\n   "settings": '
        methods.append(f"{head}{{\n{_lines(config, 4)}\n   }}\n  }}")
    entries = ",\n".join(methods)
    return f'{{\n "peft": {json.dumps(version("peft"))},\n "methods": {{\n{entries}\n }}\n}}\n'


def written_help() -> str:
    """Return the text of peft_help.json: for each setting, `[default, help]` for each distinct pair and its methods.

    Most settings have the same help in many methods, so that this is a fifth of a list by method.
    """
    texts: dict[str, dict[str, list[str]]] = {}
    for peft_type, config in sorted(PEFT_TYPE_TO_CONFIG_MAPPING.items()):
        for field in dataclasses.fields(config):
            if field.init and field.name in peft_methods.settings(peft_type.value):
                entry = json.dumps([_default(field), _plain(field.metadata.get("help", ""))], ensure_ascii=False)
                texts.setdefault(field.name, {}).setdefault(entry, []).append(peft_type.value)
    lines = []
    for name, entries in sorted(texts.items()):
        listed = ",\n".join(f"  [{json.dumps(methods)}, {entry[1:]}" for entry, methods in entries.items())
        lines.append(f" {json.dumps(name)}: [\n{listed}\n ]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _default(field: "dataclasses.Field[Any]") -> Any:
    """Return the default of a field as JSON has it."""
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value is dataclasses.MISSING or dataclasses.is_dataclass(value):
        return None
    return value.value if isinstance(value, enum.Enum) else sorted(value) if isinstance(value, set) else value


def _plain(text: str | tuple[str, ...]) -> str:
    """Return help as one line of plain text; of a link, its text and its address. Some of PEFT's helps are tuples."""
    text = text if isinstance(text, str) else " ".join(text)
    text = re.sub(r"<a href=['\"]([^'\"]*)['\"]>(.*?)</a>", r"\2 (\1)", text)
    text = re.sub(r"\[([^\]]+)\]\((http[^)]*)\)", r"\1 (\2)", text)
    return " ".join(text.split())


def written_arguments() -> str:
    """Return the text of sft_arguments.json, one argument per line."""
    libraries = "".join(f" {json.dumps(name)}: {json.dumps(version(name))},\n" for name in ("trl", "transformers"))
    return f'{{\n{libraries} "settings": {{\n{_lines(SFTConfig, 2)}\n }}\n}}\n'


def _lines(config: type, indent: int) -> str:
    fields = settings(config).items()
    return ",\n".join(f"{' ' * indent}{json.dumps(name)}: {json.dumps(kind)}" for name, kind in fields)


def settings(config: type) -> dict[str, Any]:
    """Return the settings of a config dataclass with the types of their values."""
    hints = typing.get_type_hints(config)
    fields = sorted(field.name for field in dataclasses.fields(config) if field.init)
    return {name: described(hints[name]) for name in fields}


def described(kind: Any) -> Any:
    """Convert a type annotation to the notation that `qlora_exp.config.tables.declared_types` reads."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in NAMES:
        return NAMES[kind]
    if origin in (typing.Union, types.UnionType):
        alternatives: list[Any] = []
        for alternative in map(described, arguments):
            if alternative not in alternatives:
                alternatives.append(alternative)
        return alternatives[0] if len(alternatives) == 1 else {"union": alternatives}
    if origin is typing.Literal:
        return {"literal": list(arguments)}
    if origin is list:
        return {"list": described(arguments[0])}
    if origin is tuple:
        return {"tuple": [described(argument) for argument in arguments]}
    if origin is dict:
        return {"dict": [described(argument) for argument in arguments]}
    if inspect.isclass(kind) and issubclass(kind, str):  # an enumeration of strings
        return "str"
    if dataclasses.is_dataclass(kind):  # a nested config
        return "dict"
    raise TypeError(f"the files cannot express the type {kind}: extend `described` and `config.tables.declared_types`")


if __name__ == "__main__":
    main()
