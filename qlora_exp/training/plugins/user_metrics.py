"""Score answers by metrics of installed packages.

A metric is a function of two lists of texts, answers and references. It returns one number for each answer, or one for
all of them. What it declares, as attributes: `higher_is_better`, and optionally `range` and `unit` of its scores.
"""

import logging
import math
import numbers
from collections.abc import Callable, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from qlora_exp.config import plugins
from qlora_exp.config.plugins import Facts, Plugin
from qlora_exp.config.sections.evaluation import EvaluationConfig
from qlora_exp.utils.errors import ConfigError, type_and_first_line

log = logging.getLogger(__name__)

PREFIX = "metric/"
"""What the names of their scores begin with, in results and in samples."""
_SLACK = 1e-9
"""How far rounding may take a score out of its range."""
_ANYTHING = (-math.inf, math.inf)


@dataclass(frozen=True)
class Metric:
    """A metric, imported and checked."""

    plugin: Plugin
    function: Callable[..., Any]
    facts: Facts
    range: tuple[float, float] = _ANYTHING
    """Lowest and highest possible score."""
    asks_for: tuple[str, ...] = ()
    """Which of `prompts` and `rows` it takes."""

    def __call__(
        self, answers: Sequence[str], references: Sequence[str], prompts: Sequence[str], rows: Sequence[Mapping]
    ) -> float | list[float]:
        """Return a score for each answer, or one for all.

        Raises:
            Exception: whatever the metric raises.
            TypeError, ValueError: what it returns are not such scores.
        """
        known = {"prompts": prompts, "rows": rows}
        further = {name: deepcopy(list(known[name])) for name in self.asks_for}  # copies: it may change them
        scores = self.function(list(answers), list(references), **further)
        if _is_single(scores):
            return self._score(scores, "the score")
        if isinstance(scores, str | bytes | Mapping | Set):
            raise TypeError(f"it returned a {type(scores).__name__}, not a number or a list with one for each answer")
        try:
            values = list(scores)
        except TypeError as error:
            kind = type(scores).__name__
            raise TypeError(f"it returned {kind}, not a number or a list with one for each answer") from error
        if len(values) != len(answers):
            raise ValueError(f"it returned {len(values)} scores for {len(answers)} answers")
        return [self._score(value, f"score {number}") for number, value in enumerate(values, 1)]

    def _score(self, value: Any, which: str) -> float:
        if hasattr(value, "item") and _is_single(value):  # of numpy or torch
            value = value.item()
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{which} is {value!r:.60}, which is not a number")
        low, high = self.range
        if not low - _SLACK <= (score := float(value)) <= high + _SLACK or math.isinf(score):  # or NaN
            limits = "" if self.range == _ANYTHING else f" from {low:g} to {high:g}"
            raise ValueError(f"{which} is {score:g}, not a finite number{limits}")
        return score


def _is_single(value: Any) -> bool:
    return isinstance(value, numbers.Number) or getattr(value, "ndim", None) == 0


def load(name: str) -> Metric:
    """Import a metric and check what it declares; this runs code of its package.

    Raises:
        ConfigError: it is not installed, cannot be imported, or is no such function.
    """
    plugin = plugins.find("metric", name)
    function, asks_for = plugin.function(("answers", "references"), ("prompts", "rows"))
    higher = getattr(function, "higher_is_better", None)
    if not isinstance(higher, bool):
        raise ConfigError(
            f"{plugin} does not say what is better: set {plugin.value.partition(':')[2]}.higher_is_better = True (or "
            "False) below the function"
        )
    facts = plugin.facts.model_copy(update={"higher_is_better": higher, "unit": _unit(plugin, function)})
    return Metric(plugin, function, facts, _range(plugin, function), asks_for)


def _unit(plugin: Plugin, function: Any) -> str:
    unit, most = getattr(function, "unit", ""), plugins.LONGEST_UNIT
    if not isinstance(unit, str) or len(unit) > most:
        raise ConfigError(f"{plugin} has the unit {unit!r:.60}, which is no text of at most {most} characters")
    return unit


def _range(plugin: Plugin, function: Any) -> tuple[float, float]:
    limits = getattr(function, "range", (None, None))
    try:
        low, high = (end if limit is None else float(limit) for end, limit in zip(_ANYTHING, limits, strict=True))
    except (TypeError, ValueError):
        low = high = math.nan
    if not low < high:
        raise ConfigError(
            f"{plugin} has the range {limits!r:.60}, which is not (lowest, highest), two numbers or None for no limit"
        )
    return low, high


def of_config(config: EvaluationConfig) -> list[str]:
    """List the metrics of packages that score answers with this config."""
    names = [name for name in config.metrics if name not in plugins.BUILT_IN["metric"]]
    return list(dict.fromkeys(names)) if config.generate_rows else []


def try_out(names: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()) -> dict[str, Facts]:
    """Let each of these metrics score two answers, a right one and an empty one, before anything costs time.

    Args:
        names: names of metrics of packages.
        rows: two held-out rows. Without rows, a metric that takes them is imported but not called.

    Returns:
        What each declares, by name.

    Raises:
        ConfigError: a metric cannot be used; the message says why.
    """
    metrics = {name: load(name) for name in names}
    references = [_answer(row) for row in rows] or ["The cat sat on the mat.", "42"]
    prompts = [str(row.get("prompt") or "") for row in rows] or ["Where did the cat sit?", "What is 6 times 7?"]
    for metric in metrics.values():
        if not rows and "rows" in metric.asks_for:
            continue
        try:
            metric([references[0], ""], references, prompts, rows)
        except (Exception, SystemExit) as error:  # it may raise anything
            raise ConfigError(
                f"{metric.plugin} fails on two answers, of which one is right and one empty: "
                f"{type_and_first_line(error)}"
            ) from error
    return {name: metric.facts for name, metric in metrics.items()}


def _answer(row: Mapping[str, Any]) -> str:
    """Return the right answer of a row, before it is tokenized."""
    messages = row.get("messages") or [{}]
    return str(row.get("completion") or messages[-1].get("content") or "")


def score(
    names: Sequence[str], samples: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float | list[float]], dict[str, str]]:
    """Score answers; a metric that fails does not stop the others, nor the run.

    Args:
        names: names of metrics.
        samples: `answer`, `reference` and `prompt` of each answer.
        rows: their held-out rows.

    Returns:
        A score for each answer or one for all, and why metrics failed; both by name.
    """
    scores: dict[str, float | list[float]] = {}
    failed: dict[str, str] = {}
    answers, references, prompts = ([sample[key] for sample in samples] for key in ("answer", "reference", "prompt"))
    for name in names:
        try:
            scores[name] = load(name)(answers, references, prompts, rows)
        except (Exception, SystemExit) as error:  # it may raise anything
            failed[name] = type_and_first_line(error)
            log.warning("metric %s is not measured, because it failed: %s", name, failed[name])
    return scores, failed
