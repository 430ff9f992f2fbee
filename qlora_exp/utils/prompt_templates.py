"""Templates of prompts: a text with names of columns in braces, such as `Question: {question}`."""

from collections.abc import Mapping
from string import Formatter


def columns(template: str) -> list[str]:
    """Return the names of the columns in a template, each once, in order.

    Raises:
        ValueError: it names none, or has braces with something else in them.
    """
    names: list[str] = []
    for _, name, spec, conversion in Formatter().parse(template):
        if name is None:
            continue
        if not name or spec or conversion:
            raise ValueError("braces must contain the name of a column and nothing else; {{ and }} are braces as text")
        names.append(name)
    if not names:
        raise ValueError("names no column; write its name in braces, such as 'Question: {question}'")
    return list(dict.fromkeys(names))


def filled(template: str, values: Mapping[str, str]) -> str:
    """Return a template with the value of each column in the place of its name."""
    return "".join(text + ("" if name is None else values[name]) for text, name, *_ in Formatter().parse(template))


def unescaped(text: str) -> str:
    r"""Replace `\n` by a line break, `\t` by a tab and two backslashes by one, which a command line cannot express."""
    # Split, so that the second of two backslashes begins no sign.
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in text.split("\\\\"))
