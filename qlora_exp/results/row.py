"""A row of a comparison: the runs of one configuration, which differ in the seed only."""

import math
from dataclasses import dataclass
from functools import cached_property

from qlora_exp.results import stats
from qlora_exp.results.record import Record
from qlora_exp.results.tuned import Tuned, tuned_of
from qlora_exp.utils.display import visible
from qlora_exp.utils.text import shortened


@dataclass(frozen=True, eq=False)
class Row:
    """One configuration: its runs differ in the seed only."""

    label: dict[str, str]
    """Keys that differ between the configurations, with the values of this configuration."""
    records: list[Record]
    """Runs with outcome `ok`."""
    failed: list[Record]
    """Runs with any other outcome."""

    @property
    def name(self) -> str:
        """The row's label as text, with complete keys and shortened values."""
        return " ".join(f"{key}={shortened(value)}" for key, value in self.label.items()) or "all"

    @property
    def short(self) -> str:
        """The same with short keys, for plots."""
        words = (f"{key.rpartition('.')[2]}={shortened(value, 40)}" for key, value in self.label.items())
        return visible(" ".join(words)) or "all"

    @cached_property
    def tuned(self) -> Tuned | None:
        """How the row was tuned; None if it was not, or not all of its runs."""
        found = [tuned_of(record) for record in self.records]
        return found[0] if found and None not in found else None

    def mean(self, metric: str) -> stats.Estimate | None:
        """Return the mean of a metric over the seeds; None unless every run has the metric, as a finite number."""
        if not self.records or self.unmeasured(metric):
            return None
        return stats.mean([record.metrics[metric] for record in self.records])

    def unmeasured(self, metric: str) -> str:
        """Say in how many runs a metric is missing or not a number; empty if all have it."""
        missing = sum(metric not in record.metrics for record in self.records)
        wrong = sum(not math.isfinite(record.metrics.get(metric, 0.0)) for record in self.records)
        counts = {"not measured": missing, "not a number": wrong}
        return "; ".join(f"{what} in {count} of {len(self.records)} runs" for what, count in counts.items() if count)
