"""Count what cleaning did to the rows of a source, and say it."""

import logging
from collections import Counter
from dataclasses import dataclass, field

_MANY = 0.1
_REMEDIES = {
    "empty": "a prompt, an answer or a message has no text: correct the file, or name other columns "
    "(dataset.prompt_column, ...)",
    "without the columns": "correct the file, so that every row has the columns that the config names",
    "matching drop_matching": "dataset.drop_matching=null keeps them",
    "duplicates": "dataset.drop_duplicates=false keeps them",
    "leaks": "the same prompt as a held-out row, or a similar text: dataset.drop_leaks=none keeps them",
}


@dataclass
class Report:
    """What cleaning did to the rows of a source."""

    read: int = 0
    """Number of rows that the source has."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of rows left out, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """Place of the first row that was left out, by reason."""
    notes: dict[str, int] = field(default_factory=dict)
    """Number of rows that were changed, by what was changed."""
    unused: list[str] = field(default_factory=list)
    """Columns of the source that are not used."""

    def drop(self, reason: str, place: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.examples.setdefault(reason, place)

    def add(self, other: "Report") -> None:
        """Count what was left out and changed of later rows of the same source."""
        self.read += other.read
        for counts, more in ((self.dropped, other.dropped), (self.notes, other.notes)):
            for what, count in more.items():
                counts[what] = counts.get(what, 0) + count
        self.examples = other.examples | self.examples

    def plus(self, other: "Report") -> "Report":
        """Return the report of both sources together."""
        return Report(
            self.read + other.read,
            {
                reason: self.dropped.get(reason, 0) + other.dropped.get(reason, 0)
                for reason in {**self.dropped, **other.dropped}
            },
            other.examples | self.examples,
            dict(Counter(self.notes) + Counter(other.notes)),
            list(dict.fromkeys(self.unused + other.unused)),
        )

    def why(self) -> str:
        """Say in one line how many rows were left out, and what to do about it."""
        counts = {reason: count for reason, count in self.dropped.items() if count}
        parts = [f"{count} {reason} ({self._such_as(reason)}{_REMEDIES[reason]})" for reason, count in counts.items()]
        return f"{self.read} rows read" + "".join(f"; left out: {part}" for part in parts)

    def lines(self, name: str) -> list[tuple[int, str]]:
        """Return a log level and a line for each reason that rows were left out or changed for."""
        lines = []
        for reason, count in self.dropped.items():
            if count and reason != "leaks":  # which have a line of their own
                share = f"{count} of {self.read} rows ({count / self.read:.0%}) left out"
                level = logging.WARNING if count > _MANY * self.read else logging.INFO
                lines.append((level, f"{name}: {share}: {reason} ({self._such_as(reason)}{_REMEDIES[reason]})"))
        lines += [(logging.INFO, f"{name}: {what}: {count} rows") for what, count in self.notes.items()]
        if self.unused:
            lines.append((logging.INFO, f"{name}: columns that are not used: {', '.join(map(visible, self.unused))}"))
        return lines

    def _such_as(self, reason: str) -> str:
        return f"such as {self.examples[reason]}; " if reason in self.examples else ""


def visible(name: str) -> str:
    """Return a column's name, in quotes if a part of it would not be seen."""
    return name if name == name.strip() and name.isprintable() and name else repr(name)
