"""Print tables on the terminal and write them as Markdown."""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that shows cells as they are: Markdown and HTML in them is escaped."""
    lines = [headings, ["---"] * len(headings), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on the terminal."""
    table = Table(*headings, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(markup=False).print(table)


def _plain(cell: str) -> str:
    one_line = " ".join(cell.split())
    return re.sub(r"([\\|<`])", r"\\\1", one_line)
