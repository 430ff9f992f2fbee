"""`keys`: explain the keys of the config."""

import argparse
import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from qlora_exp.cli.parents import Commands, add_command
from qlora_exp.utils.errors import ConfigError, did_you_mean


def add_parsers(commands: Commands) -> None:
    """Add `keys`."""
    parser = add_command(commands, "keys", keys)
    what = "section of the config, such as training, or one key, such as training.max_steps; default: all"
    parser.add_argument("chosen", nargs="?", metavar="SECTION|KEY", help=what)


def keys(options: argparse.Namespace) -> None:
    """Explain the keys of the config: type, default and meaning.

    Prints `KEY: TYPE = DEFAULT`, then the value in the default run (plain
    `qlora-exp train`) if it differs, then the meaning.

    examples:
      qlora-exp keys                      every section and key
      qlora-exp keys training             one section
      qlora-exp keys training.max_steps   one key
      qlora-exp keys training.sft_config  further arguments of TRL's SFTConfig
    """
    from pydantic import BaseModel

    from qlora_exp.config import hydra_compose, idle
    from qlora_exp.config.schema import Config
    from qlora_exp.config.sections.base import PeftSettings
    from qlora_exp.config.tables import peft_methods, sft_arguments
    from qlora_exp.config.validate import SFT_CONFIG, known_keys, no_such_key

    # a source has the keys of the section
    chosen = re.sub(r"^dataset\.sources\.[^.]+\.(?!weight$)", "dataset.", options.chosen or "")
    sections = Config.model_fields
    names = [*sections, *(known for known in known_keys() if known not in idle.ALWAYS)]
    if chosen.startswith(f"{SFT_CONFIG}."):
        if chosen not in names:
            raise ConfigError(no_such_key(chosen))
        print(f"{chosen}: {_type(sft_arguments.accepted()[chosen.removeprefix(f'{SFT_CONFIG}.')])}")
        return
    if chosen and chosen not in names:
        same_name = [key for key in names if key.endswith(f".{chosen}")]
        hint = f"; did you mean '{same_name[0]}'?" if same_name else did_you_mean(chosen, names)
        raise ConfigError(f"no section or key '{chosen}'{hint} Sections: {', '.join(sections)}")
    section, _, key = chosen.partition(".")
    default_run = hydra_compose.compose([])
    for name, field in sections.items():
        if section not in ("", name):
            continue
        kind, value = field.annotation, getattr(default_run, name)
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            print(_describe(name, field, value))
            continue
        if not key:
            print(f"\n{name}: {(kind.__doc__ or '').strip()}")
        for inner_name, inner in kind.model_fields.items():
            if key in ("", inner_name) and f"{name}.{inner_name}" not in idle.ALWAYS:
                print(_describe(f"  {inner_name}", inner, getattr(value, inner_name)))
                if chosen == SFT_CONFIG:
                    for argument, accepted in sft_arguments.accepted().items():
                        print(f"      {argument}: {_type(accepted)}")
        if issubclass(kind, PeftSettings) and key not in kind.model_fields:
            print(f"  further keys for LoRA: {', '.join(peft_methods.settings('LORA'))}")


def _describe(name: str, field: Any, value: Any) -> str:
    """Describe one key; `value` is its value in the default run."""
    differs = value != field.default and not isinstance(value, dict)
    also = f"; {value!r} in the default run" if differs else ""
    meaning = "".join(f"\n      {line}" for line in (field.description or "").splitlines())
    return f"{name}: {_type(field.annotation)} = {field.default!r}{also}{meaning}"


def _type(kind: Any) -> str:
    """Write a type as a user would write its values."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(_type, inner)))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type, inner))}]"
    return "null" if kind is NoneType else getattr(kind, "__name__", str(kind))
