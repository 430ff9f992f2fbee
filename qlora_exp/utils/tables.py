"""Print tables on the terminal and write them as Markdown."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Column, Table

from qlora_exp.utils.display import markdown, shown


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that shows cells as they are: Markdown and HTML in them is escaped."""
    lines = [[markdown(heading) for heading in headings], ["---"] * len(headings)]
    lines += [[markdown(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex_table(headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """Return a LaTeX table for the package booktabs, with notes as comments; nothing in cells is a command."""
    import pandas as pd  # slow

    frame = pd.DataFrame([[*map(shown, row)] for row in rows], columns=[*map(shown, headings)])
    comments = (f"% {line}\n" for note in notes for line in shown(note).splitlines())
    return "".join(comments) + frame.to_latex(index=False, escape=True)


def make_table(
    headings: Iterable[object], rows: Iterable[Iterable[object]], title: str | None = None, whole: int = 0
) -> Table:
    """Return a table for the terminal that shows cells as they are, without secrets and control characters.

    Args:
        headings: headings of the columns.
        rows: cells of each row.
        title: title of the table.
        whole: number of columns, from the first, that are not broken into lines, so that they can be copied.
    """
    # Long words, such as paths, are continued on the next line: cut ones would look alike.
    columns = (Column(shown(heading), overflow="fold", no_wrap=place < whole) for place, heading in enumerate(headings))
    table = Table(*columns, title=title and shown(title), title_justify="left")
    for row in rows:
        table.add_row(*map(shown, row))
    return table


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], whole: int = 0) -> None:
    """Print a table on the terminal; see `make_table`."""
    Console(markup=False, emoji=False).print(make_table(headings, rows, title, whole))
