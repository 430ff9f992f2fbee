"""Recorded runs that nobody trained."""

import json
from dataclasses import dataclass, field
from typing import Any

from qlora_exp.results.record import Record
from qlora_exp.utils.digests import text_digest

ROWS = [3.0, 3.5, 2.5, 4.0, 3.2, 2.8, 3.9, 3.1]


def shifted(by: float, wobble: float = 0.02) -> list[float]:
    """Shift the losses of rows, with a little noise that pairs cannot cancel."""
    return [row + by + wobble * (-1) ** index for index, row in enumerate(ROWS)]


@dataclass(frozen=True)
class Recorded(Record):
    """A run in memory."""

    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        return self.curves.get(metric, [])

    def text(self, path: str) -> str:
        return self.texts.get(path, "")

    def seed_losses(self) -> list[float]:
        return []


def recorded(
    losses=(), *, seed=1, outcome="ok", metrics=None, tags=None, curves=None, answers=(), texts=None, **params
):
    """Make a run in memory, with a loss for each held-out item, all of ten tokens."""
    given = {key.replace("__", "."): str(value) for key, value in params.items()} | {"seed": str(seed)}
    measured = {name: points[-1][1] for name, points in (curves or {}).items()}
    if losses:
        measured["after/loss"] = sum(losses) / len(losses)
    files = {
        "evaluation/after_losses.jsonl": "\n".join(json.dumps({"nll": 10 * loss, "tokens": 10}) for loss in losses),
        "evaluation/answers.json": json.dumps({"after": list(answers)}),
    }
    run_id = text_digest(json.dumps([given, outcome])).hex()[:32]
    rows = {"data.evaluation_fingerprint": "rows"}
    return Recorded(
        run_id, f"run {run_id[:4]}", rows | given, {"outcome": outcome, **(tags or {})}, measured | (metrics or {}),
        curves or {}, files | (texts or {}),
    )  # fmt: skip


def answer(prompt: str, text: str, reference: str = "yes", **scores: float) -> dict[str, Any]:
    """Return an answer as `answers.json` has it."""
    return {"prompt": prompt, "reference": reference, "answer": text, **scores}
