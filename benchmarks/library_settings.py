"""Write the settings that the installed libraries declare, for checking configs without importing these libraries.

`qlora_exp/config/tables/peft_methods.json` has PEFT's methods with their settings, `peft_help.json` what PEFT says of
them, `sft_arguments.json` the arguments of TRL's SFTConfig. Run `nox -s library-settings` after another version of
PEFT, TRL or transformers, and after a change of `qlora_exp/models/bottleneck.py`.
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

from qlora_exp.config.tables import peft_methods, sft_arguments
from qlora_exp.config.tables.declared_types import PLAIN
from qlora_exp.models import bottleneck  # noqa: F401 - the import registers its method with PEFT

NAMES = {kind: name for name, kind in PLAIN.items()}


def main() -> None:
    """Write the files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    peft_methods.FILE.write_text(written_methods(), "utf-8")
    peft_methods.HELP_FILE.write_text(written_help(), "utf-8")
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
    """Return the text of peft_help.json: default and help of each setting of each method, one per line."""
    methods = []
    for peft_type, config in sorted(PEFT_TYPE_TO_CONFIG_MAPPING.items()):
        fields = {field.name: field for field in dataclasses.fields(config) if field.init}
        lines = [f"  {json.dumps(name)}: {json.dumps(explained(fields[name]))}" for name in sorted(fields)]
        methods.append(f" {json.dumps(peft_type.value)}: {{\n{f',{chr(10)}'.join(lines)}\n }}")
    return f"{{\n{f',{chr(10)}'.join(methods)}\n}}\n"


def explained(field: Any) -> dict[str, Any]:
    """Return a field's default, as JSON or as Python writes it, and its help without markup."""
    default = field.default if field.default is not dataclasses.MISSING else None
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(default, enum.Enum):
        default = default.value
    if not isinstance(default, bool | int | float | str | list | dict | None):
        default = repr(default)
    said = field.metadata.get("help", "")
    said = said if isinstance(said, str) else " ".join(said)  # PEFT has a comma too many in places
    text = re.sub(r"<a href='([^']*)'>(.*?)</a>", r"\2 (\1)", said)
    text = re.sub(r"\[([^\]]*)\]\((https?://[^)]*)\)", r"\1 (\2)", text)
    return {"default": default, "help": " ".join(text.split())}


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
