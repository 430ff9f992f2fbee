"""Write the generated pages of docs/reference/: keys, PEFT's settings, options and commands.

Run `nox -s reference` after a change of a key, an option file, a command or its help, or another version of PEFT.
With `--check` it writes nothing, and fails if a page is not up to date; `nox -s lint` does that.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_exp.cli.main import FAMILIES, parsers
from qlora_exp.config.describe import entries, presets
from qlora_exp.config.describe.entries import Entry
from qlora_exp.config.describe.types import shown_value
from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.tables import peft_methods

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
_WRITTEN = "<!-- Written by `nox -s reference`. -->"


def main() -> None:
    """Write the pages, and say how many entries they have; or only check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    made = pages()
    if parser.parse_args().check:
        sys.exit("\n".join(filter(None, map(stale, made))) or None)
    total = 0
    for name, text in made.items():
        (FOLDER / name).write_text(text, "utf-8")
        count = sum(line.startswith("| `") for line in text.splitlines())
        print(f"docs/reference/{name}: {count} entries")
        total += count
    print(f"{total} entries")


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    made = {"keys.md": _keys(), "peft_settings.md": _settings(), "options.md": _options(), "commands.md": _commands()}
    return {name: "\n".join([*lines, ""]) for name, lines in made.items()}


def stale(name: str) -> str:
    """Return what to do about a page that is not what the code says; empty if it is."""
    file = FOLDER / name
    written = file.read_text("utf-8").splitlines() if file.is_file() else []
    made = pages()[name].splitlines()
    if written == made:
        return ""
    place = next((number for number, (old, new) in enumerate(zip(written, made, strict=False)) if old != new), 0)
    line = min(place, len(made) - 1)
    return f"docs/reference/{name}: not up to date; run `nox -s reference` (line {line + 1}: {made[line]:.100})"


def _keys() -> Iterator[str]:
    yield from ("# Keys of the config", "", _WRITTEN, "")
    yield (
        "Every key, its type, its default, and its value in the default run (plain `qlora-exp train`) where an option\n"
        "file changes it. `qlora-exp keys KEY` prints the same, with the options that set it. `null` is no value.\n"
        "`method` and `lora_variant` also take the settings of PEFT's methods: [PEFT's settings](peft_settings.md)."
    )
    default_run = compose([])
    loose: list[Entry] = []
    for name, section in entries.sections().items():
        if section is None:
            loose += entries.of_section(name)
            continue
        yield from ("", f"## {name}", "", _text(section.__doc__ or ""), "")
        yield from _table([_row(entry, getattr(getattr(default_run, name), entry.key.partition(".")[2], entry.default))
                           for entry in entries.of_section(name)])  # fmt: skip
    yield from ("", "## Keys outside of sections", "")
    yield from _table([_row(entry, getattr(default_run, entry.key)) for entry in loose])
    yield from ("", "## training.sft_config", "", "Further arguments of TRL's SFTConfig. Default: TRL's own.", "")
    rows = [[f"`{entry.key}`", _type(entry), entry.unit, _text(entry.meaning)] for entry in entries.sft_config()]
    yield from _lines(["Key", "Type", "Unit", "Meaning"], rows)


def _row(entry: Entry, in_run: object) -> list[str]:
    differs = in_run != entry.default and not isinstance(in_run, dict)
    also = f"; in the default run `{shown_value(in_run)}`" if differs else ""
    return [f"`{entry.key}`", _type(entry), f"`{shown_value(entry.default)}`{also}", entry.unit, _text(entry.meaning)]


def _table(rows: list[list[str]]) -> Iterator[str]:
    return _lines(["Key", "Type", "Default", "Unit", "Meaning"], rows)


def _settings() -> Iterator[str]:
    yield from ("# PEFT's settings, by method", "", _WRITTEN, "")
    yield (
        "What `method` takes with each of its options, as the installed PEFT declares and explains it, with PEFT's\n"
        "default and the value in the option's file. `qlora-exp keys method.r` says which methods have a setting.\n"
        "Settings that PEFT ignores with a method are left out; a config that sets them is refused."
    )
    types = presets.peft_types()
    for kind in sorted(set(types.values()), key=lambda kind: (kind != "LORA", kind)):
        names = [option for option, of in types.items() if of == kind]
        first = "lora" if "lora" in names else names[0]
        given = presets.values_of("method", first)
        yield from ("", f"## {', '.join(names)}", "", f"PEFT's `{peft_methods.methods()[kind]}`. ", "")
        rows = []
        for name in peft_methods.of_options(kind):
            entry = entries.setting(name, kind)
            own = f"; in {first}.yaml `{shown_value(given[entry.key])}`" if entry.key in given else ""
            default = f"`{shown_value(entry.default)}`{own}"
            rows.append([f"`method.{name}`", _type(entry), default, _text(entry.meaning) + _advice(entry)])
        yield from _lines(["Key", "Type", "Default", "Meaning"], rows)


def _advice(entry: Entry) -> str:
    given = (f"{each.text} ({each.basis}{f': {each.source}' if each.source else ''})" for each in entry.advice)
    return "".join(f" <br>*Advice*: {_text(text)}." for text in given)


def _options() -> Iterator[str]:
    yield from ("# Options of the config groups", "", _WRITTEN, "")
    yield (
        "`qlora-exp train GROUP=OPTION` chooses one option of each group: a file in `conf/GROUP/`, which sets keys.\n"
        "`qlora-exp keys GROUP=OPTION` prints what an option sets. Options of your own go into a folder with the same\n"
        "layout: `--config-dir FOLDER`."
    )
    default = dict(re.findall(r"^  - (\w+): (\w+)", (presets.root_file()).read_text("utf-8"), re.MULTILINE))
    for group, names in presets.options().items():
        chosen = {"hydra/launcher": "local", "hydra/sweeper": "grid"} | default
        also = "" if chosen.get(group) in (None, "null") else f" Default: `{chosen[group]}`."
        yield from ("", f"## {group}", "", f"{len(names)} options.{also}", "")
        yield from _lines(["Option", "What it is"], [[f"`{group}={name}`", _about(group, name)] for name in names])


def _about(group: str, name: str) -> str:
    """Describe an option: the comment in its file, and of a model its name on the hub."""
    model = presets.values_of(group, name).get("model.model_name_or_path") if group == "model" else None
    return f"{f'`{model}`. ' if model else ''}{_text(presets.comment(group, name))}"


def _commands() -> Iterator[str]:
    yield from ("# Commands", "", _WRITTEN, "")
    yield "`qlora-exp COMMAND --help` prints the same. [Exit codes](exit_codes.md) are those of every command."
    made = parsers()
    families = {title: [module.__name__ for module in modules] for title, modules in FAMILIES.items()}
    for title, modules in families.items():
        yield from ("", f"## {title[0].upper()}{title[1:]}")
        for name, parser in made.items():
            if parser.get_default("handler").__module__ in modules:
                yield from _command(name, parser)


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    text, _, examples = (parser.description or "").partition("\nexamples:\n")
    first, _, rest = text.partition("\n")
    yield from ("", f"### {name}", "", _prose(first))
    if rest.strip():
        yield from ("", _prose(rest.strip()))
    usage = " ".join(parser.format_usage().split()).removeprefix("usage: ")
    usage = textwrap.fill(usage, 110, subsequent_indent="    ", break_on_hyphens=False)
    if name == "train":
        usage = "qlora-exp train [GROUP=OPTION ...] [KEY=VALUE ...] [FLAGS]"
    yield from ("", "```text", usage, "```")
    rows = [*_flags_of_train()] if name == "train" else []
    if name == "train":
        examples = textwrap.dedent(_help_of_train().partition("  Examples:\n")[2].partition("\n\n")[0])
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction) and name != "train":
            value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
            flags = f"{', '.join(action.option_strings)} {value if isinstance(value, str) else ' '.join(value)}"
            choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
            rows.append([_text(f"`{flags.strip()}`"), f"{_text(action.help or '')}{choices}"])
    if rows:
        yield from ("", *_lines(["Argument", "Meaning"], rows))
    if examples:
        lines = examples.rstrip().splitlines()
        yield from ("", "```bash", *(re.sub(r"(?<=\S) {2,}(?!#)", "  # ", line.strip()) for line in lines), "```")


def _help_of_train() -> str:
    return (presets.root_file().parent / "hydra" / "help" / "qlora_exp.yaml").read_text("utf-8")


def _flags_of_train() -> Iterator[list[str]]:
    """Yield the flags in the footer of conf/hydra/help/qlora_exp.yaml, which is the help of `train`."""
    for line in _help_of_train().partition("footer: |\n")[2].partition("template:")[0].splitlines():
        if line.strip():
            flag, meaning = re.split(r" {2,}", line.strip(), maxsplit=1)
            yield [f"`{flag}`", _text(meaning)]


def _lines(headings: Sequence[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(cell.strip() for cell in row)} |"


def _type(entry: Entry) -> str:
    kind = entry.type.replace("|", "\\|")
    return f"`{kind}`" + (f", {entry.range}" if entry.range else "")


def _text(text: str) -> str:
    """Return text as a cell of a table: one line, in which nothing is taken for markup."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    plain = re.sub(r"([\\*_<>\[\]|])", r"\\\1", "\0".join(parts[::2])).split("\0")
    code = [part.replace("|", "\\|") for part in parts[1::2]]
    return "".join(a + b for a, b in zip(plain, [*code, ""], strict=True))


def _prose(text: str) -> str:
    return "\n\n".join(_text(paragraph) for paragraph in text.split("\n\n"))


if __name__ == "__main__":
    main()
