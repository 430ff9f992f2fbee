"""Look up which combinations of method, kind of base and trainer feature or engine work.

`studies.probe` and `studies.engines` test them with the pinned library versions; `nox -s compatibility` writes the
verdicts to `compatibility.json`, on each kind of base and on tiny models of each family. A combination that the file
does not list was never tested, and is not rejected. This module must not import torch: a combination that fails on a
kind of base is rejected within a second.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
WORKS = "works"
REFUSED = "refused: "
"""Start of a family's verdict if `models.checks` refuses the combination: by what the model has, not by its family."""
ASPECTS = ("trains", "gradient_checkpointing", "packing", "load_best_model_at_end", "resume", "merge")
"""Tested aspects. `trains`: only the added parameters change, gradients match those of the base's (dequantized)
weights, and the saved and reloaded model is the same."""
ENGINES = ("ddp", "fsdp")
"""Engines that share a run among processes. `studies.engines` tests each with two processes on ENGINE_BASES."""
ENGINE_BASES = ("plain", "4bit")
DIFFERS = "differs: "
"""Start of an engine's verdict if the processes train, but by the method's own rules otherwise than one process."""
BASES = {"plain": "none", "4bit": "nf4_double", "8bit": "int8", "torchao": "torchao_int8", "quanto": "quanto_int4"}
"""Kinds of bases, each with the quantization option that is tested for it."""

_ignored = False


def refusal(kind: str, base: str, aspect: str) -> str | None:
    """Return in a few words why `aspect` does not work; None if it works or was never tested.

    Args:
        kind: PEFT type (`LORA`), with the variant of LoRA after a plus (`LORA+dora`), or the kind of full fine-tuning.
        base: key of BASES.
        aspect: item of ASPECTS or ENGINES.
    """
    verdict = None if _ignored else _verdicts().get(kind, {}).get(base, {}).get(aspect)
    return None if verdict == WORKS or (verdict or "").startswith(DIFFERS) else verdict


def differs(kind: str, base: str, engine: str) -> bool:
    """Return whether processes train otherwise than one, by the method's own rules; arguments as for `refusal`."""
    return _verdicts().get(kind, {}).get(base, {}).get(engine, "").startswith(DIFFERS)


def family_refusal(kind: str, family: str) -> str | None:
    """Return in a few words why a method fails on all models of a family; None if no test found that.

    Args:
        kind: as for `refusal`.
        family: transformers' `model_type`.
    """
    verdict: str = _results().get("families", {}).get(family, {}).get(kind, WORKS)
    if _ignored or verdict == WORKS or verdict.startswith(REFUSED):
        return None
    return f"{verdict} (tested on a tiny {family} model; see docs/reference/compatibility.md)"


def kind_of(method: str, variant: str) -> str:
    """Return the name under which the verdicts list a method (its `kind`) with a variant of LoRA."""
    if method != "LORA" or variant == "lora":
        return method
    return with_variant if (with_variant := f"LORA+{variant}") in _verdicts() else "LORA"


@contextmanager
def ignored() -> Iterator[None]:
    """Reject no combination inside, so that it can be tested."""
    global _ignored
    _ignored = True
    try:
        yield
    finally:
        _ignored = False


def is_ignored() -> bool:
    """Return whether no combination is rejected now, so that it can be tested."""
    return _ignored


@cache
def _results() -> dict[str, Any]:
    return json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {}


def _verdicts() -> dict[str, dict[str, dict[str, str]]]:
    verdicts: dict[str, dict[str, dict[str, str]]] = _results().get("verdicts", {})
    return verdicts
