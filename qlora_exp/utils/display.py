"""Make text harmless where it is shown: on terminals, in spreadsheets, Markdown and HTML.

Names, values and answers come from records and models, which somebody else may have made.
"""

import logging
import re
import shlex
from typing import TextIO

from qlora_exp.utils.secrets import redact

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, characters that change the order in which text is shown, half characters."""
NEWLINES = "\n\t"
"""Control characters that may stay in text of several lines."""
_NAMES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # noqa: RUF001 - spreadsheets accept the wide forms too


def visible(text: str, keep: str = "") -> str:
    r"""Replace control characters, line separators and bidirectional overrides by escapes such as `\x1b`.

    Args:
        text: any text.
        keep: control characters that stay, such as "\n\t".
    """
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else _escaped(match[0]), text)


def visible_json(text: str) -> str:
    r"""Replace these characters in JSON by its own escapes, such as `\u202e`, so that it means the same."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def shown(text: object, keep: str = "") -> str:
    """Return text as it may be shown: without secrets, and with control characters replaced as in `visible`."""
    return visible(redact(str(text)), keep)


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines as `shown` returns them; a line break in one of them is replaced too."""
    for line in lines:
        print(shown(line), file=file)


def pasteable(*words: str, uri: str | None = None) -> str:
    """Return a command of this program for the shell; `uri` is the MLflow store as in the config."""
    return shlex.join(["qlora-exp", *words, *(["--uri", uri] if uri else [])])


def markdown(text: str) -> str:
    """Return one line of Markdown that shows `text` as it is: Markdown and HTML in it is escaped."""
    one_line = " ".join(visible(text, keep=NEWLINES).split())
    return re.sub(r"([\\|<>`*\[\]~&]|(?<!\w)_|_(?!\w)|^[#+-](?= ))", r"\\\1", one_line)


def markdown_code(text: str) -> str:
    """Return `text` as one line of code in Markdown."""
    one_line = " ".join(visible(text, keep=NEWLINES).split())
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", one_line)), default=0))
    space = " " if "`" in one_line else ""
    return f"{fence}{space}{one_line}{space}{fence}"


def csv_cell(value: object) -> object:
    """Return a value for a cell of a CSV file, which no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if text.startswith(_FORMULA) and not _is_number(text) else text


def _escaped(char: str) -> str:
    return _NAMES.get(char) or (f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class RedactingFormatter(logging.Formatter):
    """Log formatter that removes secrets and control characters from its lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, including its traceback."""
        return shown(super().format(record), keep=NEWLINES)
