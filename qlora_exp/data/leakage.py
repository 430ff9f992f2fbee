"""Held-out rows that training rows give away: the same prompt, or nearly the same text.

Knows only the columns that `data` makes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from qlora_exp.utils.digests import text_digest

_WORDS = 5
_MANY = 10
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Leak:
    """A training row and the held-out row that it gives away."""

    train: int
    heldout: int
    kind: str
    """`exact`: asks the same but for case, spaces and a closing mark; `near`: overlapping text."""
    overlap: float
    """Share of five-word sequences that the two rows have in common (Jaccard index), 1.0 for an exact one.

    What many held-out rows have in common, such as a preamble, does not count.
    """


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
    sizes: list[int] = []
    for index, row in enumerate(heldout):
        questions.setdefault(_question(row), index)
        own = _shingles(row)
        sizes.append(len(own))
        for shingle in own:
            shingles.setdefault(shingle, []).append(index)
    many = max(_MANY, len(sizes) // 50)
    common = {shingle for shingle, rows in shingles.items() if len(rows) > many}
    for shingle in common:
        for other in shingles.pop(shingle):
            sizes[other] -= 1
    found = []
    for index, row in enumerate(tqdm(train, desc="looking for leaks", unit="row", leave=False, disable=None)):
        if (same := questions.get(_question(row))) is not None:
            found.append(Leak(index, same, "exact", 1.0))
            continue
        own = _shingles(row) - common
        shared = Counter(other for shingle in own for other in shingles.get(shingle, ()))
        overlaps = {other: count / (len(own) + sizes[other] - count) for other, count in shared.items()}
        if overlaps and (worst := max(overlaps.values())) >= threshold:
            found.append(Leak(index, min(other for other in overlaps if overlaps[other] == worst), "near", worst))
    return found


def _question(row: Mapping[str, Any]) -> bytes:
    """A digest of all that comes before the answer; of plain text, which has no question, of the text."""
    asked = _texts(row)[:-1]
    plain = [" ".join(text.casefold().split()) for text in (asked if any(asked) else [row["completion"]])]
    return text_digest("\0".join(plain).rstrip(".?!\0 "))


def _texts(row: Mapping[str, Any]) -> list[str]:
    """All of it in order, the answer last."""
    turns = [turn["content"] for turn in row.get("messages") or ()]
    return turns or [row["prompt"], row["input"], row["completion"]]


def _shingles(row: Mapping[str, Any]) -> set[int]:
    words = _WORD.findall(" ".join(_texts(row)).casefold())
    return {hash(tuple(words[start : start + _WORDS])) for start in range(max(1, len(words) - _WORDS + 1))}
