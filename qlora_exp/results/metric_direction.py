"""Which metrics are better when they are higher, and what runs recorded of metrics and losses of installed packages."""

from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from qlora_exp.config.plugins import Facts
from qlora_exp.results.record import Record
from qlora_exp.utils.errors import ConfigError

_HIGHER = ("rougeL", "exact_match", "task_score", "token_accuracy", "_per_second", "tokens_per_gb_second", "mfu")
_PLUGINS = ("metric.", "loss.")
"""Beginnings of the tags with facts."""


def lower_is_better(metric: str) -> bool:
    """Return whether a lower value of a metric of this package is better: of losses, seconds and bytes it is.

    Not for scores of lm-eval and of installed packages: their direction is recorded with the run.

    Args:
        metric: name with or without the phase (`after/rougeL`, `rougeL`).
    """
    return "source_loss/" in metric or not metric.endswith(_HIGHER)


def facts_of(records: Sequence[Record]) -> dict[str, list[Facts]]:
    """Return what runs recorded of each metric and loss of packages, without repetitions, by tag (`metric.NAME`)."""
    facts: dict[str, list[Facts]] = {}
    for record in records:
        for tag in sorted(key for key in record.tags if key.startswith(_PLUGINS)):
            try:
                recorded = Facts.model_validate_json(record.tags[tag])
            except ValidationError:  # anybody may write tags
                continue
            if recorded not in facts.setdefault(tag, []):
                facts[tag].append(recorded)
    return facts


def recorded_facts(metric: str, facts: Mapping[str, Sequence[Facts]]) -> Facts:
    """Return what was recorded of the metric `metric/NAME` of a package.

    Args:
        metric: its name.
        facts: what `facts_of` returned.

    Raises:
        ConfigError: the runs do not say, or do not agree, whether higher is better.
    """
    known = facts.get(metric.replace("/", ".", 1), ())
    if len({each.higher_is_better for each in known} - {None}) != 1:
        problem = "do not agree" if len(known) > 1 else "do not say"
        raise ConfigError(f"--metric {metric}: these runs {problem} whether higher values are better")
    return known[-1]
