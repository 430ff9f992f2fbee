"""What works together: method, base and what a trainer does, as `probe` found it with the versions that are tested.

The verdicts are data (`compatibility.json`, written by `nox -s compatibility`); what it does not name was never tried,
and is not refused. Must not import torch: a combination that fails is refused within a second.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
WORKS = "works"
ASPECTS = ("trains", "gradient_checkpointing", "packing", "load_best_model_at_end", "resume", "merge")
"""`trains`: only what it adds changes, gradients are those of the base's values, saved and loaded it is the same."""
BASES = {"plain": "none", "4bit": "nf4_double", "8bit": "int8", "torchao": "torchao_int8", "quanto": "quanto_int4"}
"""Kinds of bases, each with the quantization that stands for it."""

_ignored = False


def refusal(kind: str, base: str, aspect: str) -> str | None:
    """Why `aspect` does not work, in a few words; None if it does, or if nobody tried.

    Args:
        kind: PEFT's type (`LORA`), with a variant of LoRA after a plus (`LORA+dora`); `FULL`: all parameters train.
        base: one of BASES.
        aspect: one of ASPECTS.
    """
    verdict = None if _ignored else _verdicts().get(kind, {}).get(base, {}).get(aspect)
    return None if verdict == WORKS else verdict


def kind_of(peft_type: str | None, variant: str) -> str:
    """The name that verdicts have for a method."""
    if peft_type != "LORA" or variant == "lora":
        return peft_type or "FULL"
    return with_variant if (with_variant := f"LORA+{variant}") in _verdicts() else "LORA"


@contextmanager
def ignored() -> Iterator[None]:
    """Refuse nothing inside: for trying it."""
    global _ignored
    _ignored = True
    try:
        yield
    finally:
        _ignored = False


@cache
def _verdicts() -> dict[str, dict[str, dict[str, str]]]:
    return json.loads(FILE.read_text("utf-8"))["verdicts"] if FILE.is_file() else {}
