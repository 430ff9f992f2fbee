"""`keys`: explain the keys of the config."""

import argparse
import re
import textwrap
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from qlora_exp.cli.parents import Commands, add_command, add_overrides
from qlora_exp.utils.errors import ConfigError, did_you_mean

_INDENT, _WIDTH = " " * 6, 100


def add_parsers(commands: Commands) -> None:
    """Add `keys`."""
    parser = add_command(commands, "keys", keys)
    what = "section of the config, such as training, or one key, such as training.max_steps; default: all"
    parser.add_argument("chosen", nargs="?", metavar="SECTION|KEY", help=what)
    add_overrides(parser, "show values in this run, as for `train`, such as method=vera; default: the default run")


def keys(options: argparse.Namespace) -> None:
    """Explain the keys of the config: type, default and meaning.

    Prints `KEY: TYPE = DEFAULT`, then the value in the default run (plain
    `qlora-exp train`, or with the KEY=VALUE that you give) if it differs, then
    the meaning, and what is known about good values.

    examples:
      qlora-exp keys                      every section and key
      qlora-exp keys training             one section
      qlora-exp keys training.max_steps   one key
      qlora-exp keys method.r             a setting of PEFT: meaning, default, presets, advice
      qlora-exp keys method.r method=vera   the same of another method
      qlora-exp keys training.sft_config  further arguments of TRL's SFTConfig
    """
    from pydantic import BaseModel

    from qlora_exp.config import hydra_compose, idle
    from qlora_exp.config.schema import Config
    from qlora_exp.config.sections.base import PeftSettings
    from qlora_exp.config.tables import advice, peft_methods, sft_arguments
    from qlora_exp.config.validate import SFT_CONFIG, known_keys, no_such_key

    # a source has the keys of the section
    chosen = re.sub(r"^dataset\.sources\.[^.]+\.(?!weight$)", "dataset.", options.chosen or "")
    sections = Config.model_fields
    of_methods = (f"method.{name}" for peft_type in peft_methods.methods() for name in peft_methods.settings(peft_type))
    keys_of_runs = (known for known in known_keys() if known not in idle.ALWAYS)
    names = [*dict.fromkeys((*sections, *keys_of_runs, *of_methods))]
    if chosen.startswith(f"{SFT_CONFIG}."):
        if chosen not in names:
            raise ConfigError(no_such_key(chosen))
        print(f"{chosen}: {written_type(sft_arguments.accepted()[chosen.removeprefix(f'{SFT_CONFIG}.')])}")
        return
    if chosen and chosen not in names:
        same_name = [key for key in names if key.endswith(f".{chosen}")]
        hint = f"; did you mean '{same_name[0]}'?" if same_name else did_you_mean(chosen, names)
        raise ConfigError(f"no section or key '{chosen}'{hint} Sections: {', '.join(sections)}")
    section, _, key = chosen.partition(".")
    run = hydra_compose.compose(options.overrides)
    which = "this run" if options.overrides else "the default run"
    if section in _OF_PEFT and key and key not in sections[section].annotation.model_fields:  # type: ignore[union-attr]
        print("\n".join(_peft_setting(section, key, run.method.peft_type)))
        return
    for name, field in sections.items():
        if section not in ("", name):
            continue
        kind, value = field.annotation, getattr(run, name)
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            print(_describe(name, field, value, which))
            continue
        if not key:
            print(f"\n{name}: {(kind.__doc__ or '').strip()}")
        for inner_name, inner in kind.model_fields.items():
            if key in ("", inner_name) and f"{name}.{inner_name}" not in idle.ALWAYS:
                print(_describe(f"  {inner_name}", inner, getattr(value, inner_name), which))
                if key:
                    print(*_advice(chosen), sep="\n", end="\n" * bool(advice.on(chosen)))
                if chosen == SFT_CONFIG:
                    for argument, accepted in sft_arguments.accepted().items():
                        print(f"      {argument}: {written_type(accepted)}")
        if issubclass(kind, PeftSettings) and key not in kind.model_fields:
            print(f"  further keys for LoRA: {', '.join(peft_methods.settings('LORA'))}")
            print(f"  `qlora-exp keys {name}.KEY` explains one of them, or of another method's settings")


_OF_PEFT = ("method", "lora_variant")


def _peft_setting(section: str, name: str, chosen: str | None) -> Iterator[str]:
    """Yield lines that explain a setting of the chosen PEFT type, else of LoRA, else of the first that has it."""
    from qlora_exp.config.tables import advice, peft_methods

    peft_types = peft_methods.with_setting(name) if section == "method" else ["LORA"]
    shown = chosen if chosen in peft_types else peft_types[0]
    kind, default = written_type(peft_methods.settings(shown)[name]), peft_methods.default(shown, name)
    yield f"{section}.{name}: {kind} = {default!r}, of PEFT's {peft_methods.methods()[shown]}"
    meaning = advice.MEANINGS.get(name, "") if shown == "LORA" else ""
    yield textwrap.fill(
        meaning or peft_methods.explained(shown, name) or "PEFT does not explain it.",
        _WIDTH,
        initial_indent=_INDENT,
        subsequent_indent=_INDENT,
    )
    if allowed := peft_methods.allowed(name):
        yield f"{_INDENT}Allowed: {allowed}."
    others = [f"{each.lower()} ({peft_methods.default(each, name)!r})" for each in peft_types if each != shown]
    if others:
        text = f"Other methods have it too, with a default: {', '.join(others)}; method=NAME explains theirs."
        yield textwrap.fill(text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    presets = _presets(name)
    if presets:
        listed = "; ".join(f"{value}: {', '.join(options)}" for value, options in presets.items())
        yield textwrap.fill(f"Set by: {listed}", _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    if shown == "LORA":  # what is known is of LoRA
        yield from _advice(f"{section}.{name}")


def _presets(name: str) -> dict[str, list[str]]:
    """Return the options that set a setting of PEFT, by its value."""
    import yaml

    from qlora_exp.config.hydra_compose import conf_dir

    found: dict[str, list[str]] = {}
    for group in (*_OF_PEFT, "experiment"):
        for file in sorted((conf_dir() / group).glob("*.yaml")):
            values = yaml.safe_load(file.read_text("utf-8")) or {}
            for part in (values, *(values.get(section) or {} for section in _OF_PEFT)):
                if name in part and (part is not values or group == "lora_variant"):
                    found.setdefault(str(part[name]), []).append(f"{group}={file.stem}")
    return found


def _advice(key: str) -> Iterator[str]:
    from qlora_exp.config.tables import advice

    for each in advice.on(key):
        yield textwrap.fill(f"- {each}", _WIDTH, initial_indent=_INDENT, subsequent_indent=f"{_INDENT}  ")


def _describe(name: str, field: Any, value: Any, which: str) -> str:
    """Describe one key; `value` is its value in the run that `which` says."""
    differs = value != field.default and not isinstance(value, dict)
    also = f"; {value!r} in {which}" if differs else ""
    meaning = "".join(f"\n      {line}" for line in (field.description or "").splitlines())
    return f"{name}: {written_type(field.annotation)} = {field.default!r}{also}{meaning}"


def written_type(kind: Any) -> str:
    """Write a type as a user would write its values."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return written_type(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(written_type, inner)))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(written_type, inner))}]"
    return "null" if kind is NoneType else getattr(kind, "__name__", str(kind))
