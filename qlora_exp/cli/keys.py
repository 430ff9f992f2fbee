"""`keys`: explain the keys of the config."""

import argparse
import io
import re
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from qlora_exp.cli.parents import Commands, add_command, completed
from qlora_exp.utils.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from qlora_exp.config.describe.entries import Entry
    from qlora_exp.config.schema import Config

_MOST_OPTIONS = 6
"""Options listed for one value of a key; the others are counted."""


def add_parsers(commands: Commands) -> None:
    """Add `keys`."""
    parser = add_command(commands, "keys", keys)
    what = (
        "sections of the config, such as training, keys, such as training.max_steps, or options, such as tracking=local"
        "; default: all keys. method=NAME with keys of method: the method whose settings to explain; default: LoRA, "
        "and how others differ"
    )
    chosen = parser.add_argument("chosen", nargs="*", metavar="SECTION|KEY|GROUP=OPTION", help=what)
    chosen.completer = _completed  # type: ignore[attr-defined]


def _completed(prefix: str, **_: Any) -> list[str]:
    """List the sections and keys, or the options of a group, that begin with a prefix."""
    from qlora_exp.config.describe import presets

    if "=" in prefix and prefix.partition("=")[0] in presets.options():
        return completed(prefix)
    words = [word.removesuffix("=") for word in completed(prefix.partition("=")[0])]
    return [*dict.fromkeys(word if "." in prefix else word.removesuffix(".") for word in words)]


def keys(options: argparse.Namespace) -> None:
    """Explain the keys of the config: type, default and meaning; and what its options are.

    Prints `KEY: TYPE = DEFAULT`, then the value in the default run (plain
    `qlora-exp train`) if it differs, then the meaning. Of one key also: range,
    unit, the options and experiments that set it, and advice with its basis
    (measured here, published, or rule of thumb). Of an option: what its file
    says of it, the options of other groups that it chooses, and its values.

    examples:
      qlora-exp keys                        every section and key
      qlora-exp keys training               one section
      qlora-exp keys training.max_steps     one key
      qlora-exp keys method.r method.lora_alpha   two keys
      qlora-exp keys method.r               a setting of PEFT: LoRA's, and how other methods differ
      qlora-exp keys method method=loha     every setting of a method
      qlora-exp keys method.r method=loha   one of them
      qlora-exp keys training.sft_config    further arguments of TRL's SFTConfig
      qlora-exp keys tracking=local         an option: what it is, and what it sets
      qlora-exp keys hydra/launcher         the options of a group
    """
    # Alone it is an option like others; with keys it says whose settings to explain.
    of_keys = any("=" not in word for word in options.chosen)
    methods = [word.removeprefix("method=") for word in options.chosen if of_keys and word.startswith("method=")]
    if len(methods) > 1:
        raise ConfigError(f"method={' method='.join(methods)}: name one method")
    words = dict.fromkeys(word for word in options.chosen if not (of_keys and word.startswith("method=")))
    explained = [_explained(word, *methods) for word in words or [""]]  # a mistake in one is reported before the others
    print("\n".join(explained), end="")


def _explained(word: str, *method: str) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        _explain(word, *method)
    return printed.getvalue()


def _explain(word: str, method: str | None = None) -> None:
    """Print what `keys` prints of a section or a key; "": of all."""
    from qlora_exp.config import hydra_compose
    from qlora_exp.config.describe import entries, presets
    from qlora_exp.config.validate import OPEN_SECTIONS, SFT_CONFIG

    # A source has the keys of the section, and a weight, which the key `sources` explains.
    chosen = re.sub(r"^dataset\.sources\.[^.]+\.weight$", "dataset.sources", word)
    chosen = re.sub(r"^dataset\.sources\.[^.]+\.", "dataset.", chosen)
    section, _, name = chosen.partition(".")
    group, equals, option = word.partition("=")
    if equals and group in presets.options():
        _print_option(group, option)
        return
    if word in presets.options() and word not in entries.sections():
        names = ", ".join(presets.options()[word])
        print(textwrap.fill(f"options: {names}", 120, **_INDENTED))
        print(f"  `qlora-exp keys {word}=NAME` explains one")
        return
    if method is not None:
        types = presets.peft_types()
        if method not in types:
            raise ConfigError(f"method={method}: no option with PEFT settings{did_you_mean(method, types)}")
        if section != "method":
            raise ConfigError(f"method={method} is for the keys of method: keys method method={method}")
        _print_settings(method, types[method], name)
        return
    declared = {entry.key: entry for each in entries.sections() for entry in entries.of_section(each)}
    declared |= {entry.key: entry for entry in entries.sft_config()}
    default_run = hydra_compose.compose([])
    if section in OPEN_SECTIONS and name and chosen not in declared and entries.methods_with(name):
        _print_setting(section, name, default_run)
    elif chosen in declared:
        _print_one(declared[chosen], default_run)
        if chosen == SFT_CONFIG:
            _print_listed(entry for entry in declared.values() if entry.key.startswith(f"{chosen}."))
    elif not name and (not section or section in entries.sections()):
        _print_sections(section, default_run)
    else:
        raise ConfigError(_unknown(chosen, [*entries.sections(), *declared]))


def _unknown(chosen: str, known: list[str]) -> str:
    """Return the message for what is neither a section nor a key."""
    from qlora_exp.config.describe import entries
    from qlora_exp.config.tables import peft_methods
    from qlora_exp.config.validate import OPEN_SECTIONS, SFT_CONFIG, no_such_key

    if chosen.startswith(f"{SFT_CONFIG}."):
        return no_such_key(chosen)
    if chosen.partition(".")[0] == "hydra":
        return _of_hydra(chosen)
    key, equals, _ = chosen.partition("=")
    if equals and key in known:
        return f"{chosen}: no option, but the value of a key, which `qlora-exp keys {key}` explains"
    settings = {name: None for kind in peft_methods.trainable() for name in peft_methods.of_options(kind)}
    names = [*known, *(f"{section}.{name}" for section in OPEN_SECTIONS for name in settings)]
    same_name = [key for key in names if key.endswith(f".{chosen}")]
    hint = f"; did you mean '{same_name[0]}'?" if same_name else did_you_mean(chosen, names)
    return f"no section or key '{chosen}'{hint} Sections: {', '.join(entries.sections())}"


def _of_hydra(key: str) -> str:
    """Return the message for a key of Hydra, with the command that prints it."""
    from qlora_exp.config.describe import presets

    part = ".".join(key.partition("=")[0].split(".")[:2])
    group, command = part.replace(".", "/"), "qlora-exp train --cfg hydra"
    if (names := presets.options().get(group)) is not None:
        shown = f"`{command} -p {part} {group}=NAME` prints it (NAME: {', '.join(names)})"
        return f"{key}: a key of Hydra; {shown}, and `qlora-exp keys {group}=NAME` explains an option"
    return f"{key}: a key of Hydra; `{command}{f' -p {part}' if part != 'hydra' else ''}` prints it"


def _print_option(group: str, option: str) -> None:
    """Print what an option is: the comment in its file, what it chooses, and the values that it sets."""
    from qlora_exp.config.describe import presets
    from qlora_exp.config.describe.types import shown_value

    names = presets.options()[group]
    if option not in names:
        hint = did_you_mean(option, names)
        raise ConfigError(f"{group}: no option '{option}'{hint} Options: {', '.join(names)}")
    text = f"{group}={option}: {presets.comment(group, option)}".removesuffix(": ")
    print(textwrap.fill(text, 120, **(_INDENTED | {"initial_indent": ""})))
    for name, chosen in presets.chosen_by(group, option).items():
        print(f"  {name}={chosen}")
    for key, value in presets.values_of(group, option).items():
        if not key.rpartition(".")[2].startswith("_"):  # Hydra's own, such as _target_
            is_group = key in presets.options()  # a sweep over options
            name = f"{key}=" if is_group else f"{key.replace('/', '.')}: "
            print(textwrap.fill(f"{name}{shown_value(value)}", 120, **_INDENTED))


def _print_sections(section: str, default_run: "Config") -> None:
    """Print one section, or all."""
    from qlora_exp.config.describe import entries
    from qlora_exp.config.tables import peft_methods
    from qlora_exp.config.validate import OPEN_SECTIONS

    for name, kind in entries.sections().items():
        if section not in ("", name):
            continue
        if kind is not None:
            print(f"\n{name}: {(kind.__doc__ or '').strip()}")
        for entry in entries.of_section(name):
            print(_head(entry, default_run, entry.key if kind is None else f"  {entry.key.partition('.')[2]}"))
        if name in OPEN_SECTIONS:
            names = ", ".join(peft_methods.of_options("LORA"))
            print(textwrap.fill(f"settings of PEFT's LoraConfig: {names}", 120, **_INDENTED))
            print(
                f"      `qlora-exp keys {name}.r` explains one; `qlora-exp keys method method=loha` lists those of LoHa"
            )


def _print_one(entry: "Entry", default_run: "Config") -> None:
    print(_head(entry, default_run))
    _print_details(entry)


def _head(entry: "Entry", default_run: "Config", name: str = "") -> str:
    """Describe one key in brief."""
    from qlora_exp.config.describe.types import shown_value

    value: Any = default_run
    for part in entry.key.split("."):
        value = getattr(value, part, entry.default)
    differs = value != entry.default and not isinstance(value, dict)
    also = f"; {shown_value(value)} in the default run" if differs else ""
    meaning = "".join(f"\n      {line}" for line in entry.meaning.splitlines())
    return f"{name or entry.key}: {entry.type} = {shown_value(entry.default)}{also}{meaning}"


def _print_details(entry: "Entry") -> None:
    """Print the range, the unit, the options that set a key, and advice."""
    for title, text in {"range": entry.range, "unit": entry.unit}.items():
        if text:
            print(f"  {title}: {text}")
    for line in _set_by(entry.key):
        print(textwrap.fill(line, 120, **_INDENTED))
    for advice in entry.advice:
        source = f": {advice.source}" if advice.source else ""
        print(textwrap.fill(f"advice: {advice.text} [{advice.basis}{source}]", 120, **_INDENTED))


_INDENTED: dict[str, Any] = {
    "initial_indent": "  ",
    "subsequent_indent": "      ",
    "break_long_words": False,
    "break_on_hyphens": False,
}


def _set_by(key: str) -> Iterator[str]:
    """Yield a line for each group with options that set a key."""
    from qlora_exp.config.describe import presets

    for group, values in presets.setting(key).items():
        parts = []
        for value, names in values.items():
            more = f" and {len(names) - _MOST_OPTIONS} more" if len(names) > _MOST_OPTIONS else ""
            parts.append(f"{value} in {', '.join(names[:_MOST_OPTIONS])}{more}")
        yield f"{group}=: {'; '.join(parts)}"


def _print_listed(listed: "Iterator[Entry]") -> None:
    for entry in listed:
        bounds = f" ({entry.range})" if entry.range else ""
        print(f"      {entry.key.rpartition('.')[2]}: {entry.type}{bounds}. {entry.meaning}")


def _print_setting(section: str, name: str, default_run: "Config") -> None:
    """Explain a setting of PEFT: LoRA's, or that of the first method that has it; then how other methods differ."""
    from qlora_exp.config.describe import entries, presets

    first, *others = entries.methods_with(name)
    if section == "lora_variant" and first != "LORA":
        raise ConfigError(f"lora_variant.{name}: LoRA has no such setting; `qlora-exp keys method.{name}` explains it")
    entry = entries.setting(name, first, section)
    names: dict[str, list[str]] = {}
    for option, kind in presets.peft_types().items():
        names.setdefault(kind, []).append(option)
    print(f"{_wrapped(entry, default_run)}\n  of method={', '.join(names[first])}")
    _print_details(entry)
    if section == "method":
        for line in _of_others(name, entry, sorted((option, kind) for kind in others for option in names[kind])):
            print(line)


def _of_others(name: str, first: "Entry", methods: list[tuple[str, str]]) -> Iterator[str]:
    """Yield how a setting differs in other methods, given by their option and PEFT type."""
    from qlora_exp.config.describe import entries
    from qlora_exp.config.describe.types import shown_value

    same = []
    for option, kind in methods:
        other = entries.setting(name, kind)
        if (other.type, other.default) == (first.type, first.default):
            same.append(option)
        else:
            text = textwrap.shorten(other.meaning.removeprefix("PEFT: "), 90, placeholder=" ...")
            yield f"  method={option}: {other.type} = {shown_value(other.default)}. {text}"
    if same:
        yield textwrap.fill(f"same type and default: method={', '.join(same)}", 120, **_INDENTED)
    if methods:
        yield f"  `qlora-exp keys {first.key} method=NAME` explains that of another method"


def _print_settings(option: str, peft_type: str, name: str) -> None:
    """Explain the settings of one method, or one of them."""
    from qlora_exp.config.describe import entries, presets
    from qlora_exp.config.describe.types import shown_value
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.config.tables import peft_methods

    names = peft_methods.of_options(peft_type)
    if name and name not in names:
        raise ConfigError(f"method.{name}: method={option} has no such setting{did_you_mean(name, names)}")
    given = presets.values_of("method", option)
    for each in [name] if name else names:
        entry = entries.setting(each, peft_type)
        if name:
            print(_wrapped(entry, compose([])))
            _print_details(entry)
        own = f"; {shown_value(given[entry.key])} with method={option}" if entry.key in given else ""
        text = textwrap.shorten(entry.meaning, 200, placeholder=" ...")
        if not name:
            print(textwrap.fill(f"{each}: {entry.type} = {shown_value(entry.default)}{own}. {text}", 120, **_INDENTED))


def _wrapped(entry: "Entry", default_run: "Config") -> str:
    """Describe a setting of PEFT, whose help has long lines."""
    first, *lines = _head(entry, default_run).splitlines()
    wrapped = [textwrap.fill(line.strip(), 120, **(_INDENTED | {"initial_indent": "      "})) for line in lines]
    return "\n".join([first, *wrapped])
