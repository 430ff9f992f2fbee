"""How the row of a comparison was tuned before it was trained."""

import logging
import math
from collections.abc import Callable
from typing import Protocol

from pydantic import BaseModel, ValidationError

from qlora_exp.results.record import Record
from qlora_exp.utils.errors import first_line
from qlora_exp.utils.text import shortened

log = logging.getLogger(__name__)

TAG = "tuned"
"""Tag of a run whose settings were chosen by trials."""


class Tuned(BaseModel, ser_json_inf_nan="strings"):
    """How a row was tuned."""

    values: dict[str, bool | int | float | str]
    """The best values of the tuned keys."""
    budget: list[str]
    """For each rung, the number of trials and the length of their runs."""
    metric: str
    """What trials were judged by, on validation rows."""
    best: float
    """The metric of the best trial at full length."""
    first_best: float
    """The metric of the best trial in the first rung, which all trials ran."""
    first_median: float
    """The metric of the median trial there; infinite if half of them failed."""
    first_own: float
    """The metric of the trial with the row's own values there; NaN if there was none."""
    failed: int
    """Number of trials that failed there."""
    minutes: float
    """Time that all trials took together."""
    at_edge: list[str]
    """Tuned keys whose best value is the smallest or the largest that was tried."""

    @property
    def chosen(self) -> str:
        """The best values as text, with short keys."""
        items = self.values.items()
        return " ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in items)

    @property
    def text(self) -> str:
        """How the row was tuned, in one line."""
        parts = [f"{self.metric} {self.best:.4f} on validation rows", f"trials: {', '.join(self.budget)}"]
        parts.append(f"the median trial is {self.spread:.4f} worse than the best")
        if math.isfinite(self.first_own):
            parts.append(f"the trial with the row's own values is {abs(self.first_own - self.first_best):.4f} worse")
        if self.failed:
            parts.append(f"trials that failed: {self.failed}")
        if self.at_edge:
            parts.append(f"the best {', '.join(self.at_edge)} is the smallest or largest tried: widen the range")
        return f"{self.chosen}: {'; '.join(parts)}"

    @property
    def spread(self) -> float:
        """How much the median trial is worse than the best one, in the first rung."""
        return abs(self.first_median - self.first_best)


def tuned_of(record: Record) -> Tuned | None:
    """Return how the row of a run was tuned; None if it was not, or if the tag is damaged."""
    try:
        return Tuned.model_validate_json(record.tags[TAG]) if TAG in record.tags else None
    except ValidationError as error:  # anybody may write tags
        log.warning(
            "run %s: its tag `%s` cannot be read, so it counts as not tuned: %s", record.run_id, TAG, first_line(error)
        )
        return None


class _Row(Protocol):
    """A row of a comparison (`row.Row`)."""

    @property
    def tuned(self) -> Tuned | None: ...


COLUMNS: dict[str, Callable[[_Row], str]] = {
    "tuned": lambda row: row.tuned.chosen if row.tuned else "not tuned",
    "tuning min": lambda row: f"{row.tuned.minutes:,.1f}" if row.tuned else "",
    "median trial": lambda row: f"{row.tuned.spread:.4f} worse" if row.tuned else "",
}
"""Columns of a comparison with tuned rows: heading, and how to write a cell."""


def remark(ours: Tuned | None, theirs: Tuned | None) -> str:
    """Say what a verdict is worth if only one of the row and the baseline was tuned; empty if both or none were."""
    if bool(ours) == bool(theirs):
        return ""
    return f"only {'this row' if ours else 'the baseline'} was tuned"


def _short(value: object) -> str:
    return format(value, ".3g") if isinstance(value, float) and math.isfinite(value) else shortened(str(value), 40)
