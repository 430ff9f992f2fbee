"""Find training rows that give a held-out row away: the same prompt, or nearly the same text.

Depends only on the columns that `data.rows` creates.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from qlora_exp.data.dialogues import said
from qlora_exp.utils.digests import text_digest

_WORDS = 5
_MANY = 10
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Leak:
    """A training row and the held-out row that it gives away; or one of them is a validation row, see `parts`."""

    train: int
    heldout: int
    kind: str
    """`exact`: the same prompt, apart from case, spaces and the closing mark; `near`: overlapping text."""
    overlap: float
    """Share of five-word sequences that the two rows have in common (Jaccard index); 1.0 for an exact leak.

    Sequences that many held-out rows contain, such as a preamble, do not count.
    """
    parts: str = "training, held-out"
    """Which rows the two indices count: also `validation, held-out` or `training, validation`."""


def find(train: Iterable[Mapping[str, Any]], heldout: Iterable[Mapping[str, Any]], threshold: float) -> list[Leak]:
    """Return the worst leak of each training row that has one, in the order of the training rows.

    Every pair of rows that shares a five-word sequence is compared. Only held-out rows are kept in memory.

    Args:
        train: rows with `prompt`, `input` and `completion`.
        heldout: rows with the same columns.
        threshold: smallest overlap of a near leak.
    """
    questions: dict[bytes, int] = {}
    shingles: dict[int, list[int]] = {}
    sizes: list[int] = []
    for index, row in enumerate(heldout):
        questions.setdefault(_question(row), index)
        row_shingles = _shingles(row)
        sizes.append(len(row_shingles))
        for shingle in row_shingles:
            shingles.setdefault(shingle, []).append(index)
    many = max(_MANY, len(sizes) // 50)
    common = {shingle for shingle, rows in shingles.items() if len(rows) > many}
    for shingle in common:
        for other in shingles.pop(shingle):
            sizes[other] -= 1
    leaks = []
    for index, row in enumerate(tqdm(train, desc="looking for leaks", unit="row", leave=False, disable=None)):
        if (same := questions.get(_question(row))) is not None:
            leaks.append(Leak(index, same, "exact", 1.0))
            continue
        row_shingles = _shingles(row) - common
        shared = Counter(other for shingle in row_shingles for other in shingles.get(shingle, ()))
        overlaps = {other: count / (len(row_shingles) + sizes[other] - count) for other, count in shared.items()}
        if overlaps and (worst := max(overlaps.values())) >= threshold:
            leaks.append(Leak(index, min(other for other in overlaps if overlaps[other] == worst), "near", worst))
    return leaks


def _question(row: Mapping[str, Any]) -> bytes:
    """Return a digest of everything before the answer; for plain text, which has no question, of the text."""
    before_answer = _texts(row)[:-1]
    normalized = [
        " ".join(text.casefold().split()) for text in (before_answer if any(before_answer) else [row["completion"]])
    ]
    return text_digest("\0".join(normalized).rstrip(".?!\0 "))


def _texts(row: Mapping[str, Any]) -> list[str]:
    """Return all texts of a row in order, the answer last."""
    tools = [json.dumps(row["tools"])] if row.get("tools") else []
    turns = [said(turn) for turn in row.get("messages") or ()]
    return [*tools, *turns] or [row["prompt"], row["input"], row["completion"]]


def _shingles(row: Mapping[str, Any]) -> set[int]:
    words = _WORD.findall(" ".join(_texts(row)).casefold())
    return {hash(tuple(words[start : start + _WORDS])) for start in range(max(1, len(words) - _WORDS + 1))}
