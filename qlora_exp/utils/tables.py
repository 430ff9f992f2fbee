"""Print tables on the terminal and write them as Markdown."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from qlora_exp.utils.display import markdown, shown


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that shows cells as they are: Markdown and HTML in them is escaped."""
    lines = [[markdown(heading) for heading in headings], ["---"] * len(headings)]
    lines += [[markdown(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def make_table(headings: Iterable[object], rows: Iterable[Iterable[object]], title: str | None = None) -> Table:
    """Return a table for the terminal that shows cells as they are, without secrets and control characters."""
    table = Table(*map(shown, headings), title=title and shown(title), title_justify="left")
    for row in rows:
        table.add_row(*map(shown, row))
    return table


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on the terminal."""
    Console(markup=False, emoji=False).print(make_table(headings, rows, title))
