"""Complete an override that is being typed on a command line: `GROUP=OPTION` or `KEY=VALUE`.

Completion answers while a user waits: nothing here may import torch or Hydra.
"""

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from qlora_exp.config.describe import entries, presets
from qlora_exp.config.schema import Config
from qlora_exp.config.tables import peft_methods, sft_arguments


def overrides(prefix: str) -> Iterator[str]:
    """Yield what a word may become: groups and sections, then the keys of a section, then options or values.

    Args:
        prefix: what is typed of the word. Of values in a list, `a,b`, the last one is completed.
    """
    name, equals, value = prefix.partition("=")
    if not equals:
        yield from _names(name)
        return
    before = value[: value.rfind(",") + 1]
    yield from (f"{name}={before}{each}" for each in _values(name))


def _names(prefix: str) -> Iterator[str]:
    section, dot, _ = prefix.partition(".")
    if not dot:
        groups = presets.options()
        yield from (f"{group}=" for group in groups)
        for name in entries.sections():
            if name in groups:
                yield f"{name}."
            else:  # a shell would put a blank behind a single name with a dot
                yield from (f"{entry.key}=" for entry in entries.of_section(name))
        return
    if section in entries.sections():
        yield from (f"{entry.key}=" for entry in entries.of_section(section))
    if section == "training":
        yield from (f"training.sft_config.{name}=" for name in sft_arguments.ACCEPTED)
    names = {name for each in _peft_types(section) for name in peft_methods.of_options(each)}
    yield from (f"{section}.{name}=" for name in sorted(names))


def _peft_types(section: str) -> list[str]:
    """List the methods whose settings a section takes."""
    return {"method": peft_methods.trainable(), "lora_variant": ["LORA"]}.get(section, [])


def _values(name: str) -> list[str]:
    """List the options of a group, or the values that the type of a key names."""
    if (options := presets.options().get(name)) is not None:
        return options
    section, _, key = name.partition(".")
    kind = entries.sections().get(section) if key else Config
    if kind is not None and (field := kind.model_fields.get(key or section)) is not None:
        return [*dict.fromkeys(_named(field.annotation))]
    types = [peft_methods.settings(each) for each in _peft_types(section)]
    found = [settings[key] for settings in types if key in settings]
    presented = [*peft_methods.PRESETS] if found and key == "target_modules" else []
    return [*dict.fromkeys([*presented, *(value for each in found for value in _named(each))])]


def _named(kind: Any) -> Iterator[str]:
    """Yield the values that a type names: those of literals and switches."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _named(get_args(kind)[0])
    elif origin is Literal:
        yield from map(str, get_args(kind))
    elif origin in (Union, UnionType):
        for part in get_args(kind):
            yield from _named(part)
    elif kind is bool:
        yield from ("true", "false")
    elif kind is NoneType:
        yield "null"
