"""Held-out rows that training rows give away: the same prompt, or nearly the same text.

Knows only the columns that `data` makes.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_WORDS = 5
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Leak:
    """A training row and the held-out row that it gives away."""

    train: int
    heldout: int
    kind: str
    """`exact`: the same prompt and input but for case, spaces and punctuation; `near`: overlapping text."""
    overlap: float
    """Share of five-word sequences that the two rows have in common (Jaccard index), 1.0 for an exact one."""


def find(train: Iterable[Mapping[str, Any]], heldout: Iterable[Mapping[str, Any]], threshold: float) -> list[Leak]:
    """The worst leak of each training row that has one, in order.

    Every pair that shares a five-word sequence is compared; held-out rows alone are kept in memory.

    Args:
        train: rows with `prompt`, `input` and `completion`.
        heldout: the same.
        threshold: overlap from which a pair counts as near.
    """
    questions: dict[bytes, int] = {}
    shingles: dict[int, list[int]] = {}
    sizes = []
    for index, row in enumerate(heldout):
        questions.setdefault(_question(row), index)
        own = _shingles(row)
        sizes.append(len(own))
        for shingle in own:
            shingles.setdefault(shingle, []).append(index)
    found = []
    for index, row in enumerate(train):
        if (same := questions.get(_question(row))) is not None:
            found.append(Leak(index, same, "exact", 1.0))
            continue
        own = _shingles(row)
        shared = Counter(other for shingle in own for other in shingles.get(shingle, ()))
        overlaps = {other: count / (len(own) + sizes[other] - count) for other, count in shared.items()}
        if overlaps and (worst := max(overlaps.values())) >= threshold:
            found.append(Leak(index, min(other for other in overlaps if overlaps[other] == worst), "near", worst))
    return found


def _question(row: Mapping[str, Any]) -> bytes:
    """Of plain text, which has no question, the text."""
    words = _WORD.findall(f"{row['prompt']}\0{row['input']}".casefold()) or _WORD.findall(row["completion"].casefold())
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()


def _shingles(row: Mapping[str, Any]) -> set[int]:
    words = _WORD.findall(f"{row['prompt']} {row['input']} {row['completion']}".casefold())
    return {hash(tuple(words[start : start + _WORDS])) for start in range(max(1, len(words) - _WORDS + 1))}
