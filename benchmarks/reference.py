"""Write pages of docs/reference from the code: keys, settings of PEFT, options, commands (`nox -s reference`).

A test fails when they are not up to date.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from qlora_exp.cli.keys import written_type
from qlora_exp.cli.main import FAMILIES, make_parser
from qlora_exp.config import hydra_compose, idle
from qlora_exp.config.schema import Config
from qlora_exp.config.tables import advice, peft_methods, sft_arguments
from qlora_exp.utils.display import markdown, markdown_code
from qlora_exp.utils.tables import markdown_table

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
WRITTEN = "<!-- Written by `nox -s reference` from the code; do not edit. -->"


def main() -> None:
    """Write the pages."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, text in pages().items():
        (FOLDER / f"{name}.md").write_text(text, "utf-8")
        print(f"{name}.md: {sum(line.startswith('| `') for line in text.splitlines())} entries")


def pages() -> dict[str, str]:
    """Return the text of each page by its name."""
    made = {"keys": _keys(), "peft_settings": _peft_settings(), "options": _options(), "commands": _commands()}
    return {name: "\n".join([WRITTEN, "", *lines]).rstrip() + "\n" for name, lines in made.items()}


def _keys() -> Iterator[str]:
    yield "# Keys of the config"
    yield ""
    yield (
        "Every key with its type, its default and its meaning. `qlora-exp keys SECTION.KEY` prints the same on the "
        "terminal, with the value in a run that you name. The default of a key is what a config without it gets; "
        "[options](options.md) of the config groups set others."
    )
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from ("", f"## {name}", "", _text(kind.__doc__ or ""), "")
            inner = kind.model_fields.items()
            rows = [_row(key, each) for key, each in inner if f"{name}.{key}" not in idle.ALWAYS]
            yield from _table(["key", "type", "default", "meaning"], rows)
    alone = [_row(name, field) for name, field in Config.model_fields.items() if not _is_section(field.annotation)]
    yield from ("", "## Keys without a section", "")
    yield from _table(["key", "type", "default", "meaning"], alone)
    yield from ("", "## training.sft_config", "", "Arguments of TRL's SFTConfig that have no key of their own.", "")
    accepted = sft_arguments.accepted().items()
    rows = [[f"`{name}`", markdown_code(written_type(kind))] for name, kind in accepted]
    yield from _table(["argument", "type"], rows)
    yield from _advice()


def _peft_settings() -> Iterator[str]:
    yield "# Settings of PEFT's methods"
    yield ""
    yield (
        "Any of them is a key of the section `method`, with PEFT's own name: `method.r=16`. LoRA's can stand in "
        "`lora_variant` too. Types, defaults and meanings are those of the installed PEFT; the files in `conf/method` "
        "set others ([options](options.md#method))."
    )
    for peft_type in sorted(peft_methods.methods()):
        yield from _method(peft_type)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _row(key: str, field: Any) -> list[str]:
    default = field.get_default(call_default_factory=True)
    shown = "" if _is_section(field.annotation) or isinstance(default, BaseModel) else markdown_code(_value(default))
    return [f"`{key}`", markdown_code(written_type(field.annotation)), shown, _text(field.description or "")]


def _value(value: Any) -> str:
    """Return a value as a config file or a command line has it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _advice() -> Iterator[str]:
    yield from ("", "## What is known about good values", "")
    yield "What each piece of advice rests on stands after it."
    yield ""
    rows = [
        [f"`{key}`", _text(each.text), each.basis + (f": {_text(each.source)}" if each.source else "")]
        for key, known in advice.ADVICE.items()
        for each in known
    ]
    yield from _table(["key", "advice", "basis"], rows)


def _method(peft_type: str) -> Iterator[str]:
    yield from ("", f"## {peft_type}", "", f"PEFT's {peft_methods.methods()[peft_type]}.", "")
    rows = []
    for name, kind in peft_methods.settings(peft_type).items():
        meaning = advice.MEANINGS.get(name, "") if peft_type == "LORA" else ""
        default = markdown_code(_value(peft_methods.default(peft_type, name)))
        said = meaning or peft_methods.explained(peft_type, name)
        rows.append([f"`{name}`", markdown_code(written_type(kind)), default, _text(said)])
    yield from _table(["setting", "type", "default", "meaning"], rows)


def _options() -> Iterator[str]:
    yield "# Options of the config groups"
    yield ""
    yield (
        "`GROUP=OPTION` on the command line takes a file of `conf/GROUP`. Here is what a file says of itself, and the "
        "keys that it sets. `qlora-exp train GROUP=OPTION --cfg job` prints the whole config."
    )
    root = hydra_compose.conf_dir()
    groups = sorted(path for path in root.rglob("*") if path.is_dir() and any(path.glob("*.yaml")))
    for folder in groups:
        group = folder.relative_to(root).as_posix()
        if group == "hydra/help":
            continue
        yield from ("", f"## {group}", "")
        rows = []
        for file in sorted(folder.glob("*.yaml")):
            text = file.read_text("utf-8")
            rows.append([f"`{group}={file.stem}`", _comment(text), _sets(text)])
        yield from _table(["option", "what it is", "sets"], rows)


def _comment(text: str) -> str:
    """Return the comment at the beginning of a file."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.removeprefix("#").strip())
    return _text(" ".join(lines))


_MANY = 8


def _sets(text: str) -> str:
    """Return the keys that a file sets, with their values; of many only the first."""
    loaded = yaml.safe_load(text) or {}
    flat = [f"{key}={value}" for key, value in _flat(loaded) if not key.startswith("defaults") and key != "name"]
    shown = [markdown_code(each if len(each) < 80 else f"{each[:77]}...") for each in flat[:_MANY]]
    return ", ".join(shown) + (f" and {len(flat) - _MANY} more" if len(flat) > _MANY else "")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _value(value)


def _commands() -> Iterator[str]:
    parser, commands = make_parser()
    yield "# Commands"
    yield ""
    yield (
        "`qlora-exp COMMAND --help` prints the same. Words such as `training.max_steps=3` are [keys](keys.md) and "
        "[options](options.md) of the config."
    )
    listed = str(parser.description)
    for title in FAMILIES:
        names = re.findall(r"^  ([a-z-]+)  ", listed.split(f"{title}:\n")[1].split("\n\n")[0], re.MULTILINE)
        yield from ("", f"## {title[0].upper()}{title[1:]}", "")
        for name in names:
            yield from _command(name, commands.choices[name])


def _command(name: str, command: argparse.ArgumentParser) -> Iterator[str]:
    about, _, examples = (command.description or "").partition("\nexamples:\n")
    yield from (f"### {name}", "", _paragraphs(about), "")
    if examples:
        lines = re.sub(r"^ +", "", examples, flags=re.MULTILINE).splitlines()
        yield from ("```bash", *(re.sub(r"(?<=\S) {2,}(?=\S)", "  # ", line) for line in lines), "```", "")
    rows = []
    for action in command._actions:  # argparse has no public list of them
        if isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
        takes = action.metavar if action.option_strings and action.nargs != 0 else None
        values = f" `{takes}`" if isinstance(takes, str) else ""
        if action.choices and action.option_strings:
            values = f" one of {', '.join(f'`{choice}`' for choice in action.choices)}"
        text = (action.help or "") % {"default": action.default} if action.help else ""
        rows.append([names + values, _text(text)])
    if rows:
        yield from _table(["argument", "meaning"], rows)
        yield ""


def _paragraphs(text: str) -> str:
    return "\n\n".join(_text(paragraph) for paragraph in text.strip().split("\n\n"))


def _table(headings: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Yield a Markdown table whose cells are Markdown already."""
    yield from markdown_table(headings, []).splitlines()
    yield from (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _text(text: str) -> str:
    """Return a docstring or a help text as one line of Markdown; web addresses stay links."""
    parts = re.split(r"(https?://[a-z][^\s,;)]+)", " ".join(text.split()))
    return "".join(_link(part) if re.match("https?://[a-z]", part) else _escaped(part) for part in parts)


def _link(address: str) -> str:
    return f"<{address.rstrip('.')}>{'.' * address.endswith('.')}"


def _escaped(text: str) -> str:
    """Escape what Markdown and HTML would read otherwise; code in backticks stays code."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else markdown(f"x{part}x")[1:-1] if part else "" for part in parts)


if __name__ == "__main__":
    main()
