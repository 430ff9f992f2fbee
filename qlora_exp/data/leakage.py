"""Find training rows that give a held-out row away: the same prompt, or nearly the same text.

Depends only on the columns that `data.rows` creates.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from datasets import Dataset

from qlora_exp.data.cleaning import CACHE_LAYOUT
from qlora_exp.data.columns import BATCH, Row, mapped
from qlora_exp.data.dialogues import said
from qlora_exp.libraries.datasets import content_key
from qlora_exp.utils.cache import built
from qlora_exp.utils.digests import json_digest, text_digest

_LEAKS = "leaks.json"
_WORTH_KEEPING = 20_000
"""Number of rows: with fewer, looking for leaks again takes a second."""
_WORDS = 5
_MANY = 10
_WORD = re.compile(r"\w+")
_SPACED = "".join(chr(code).lower() if _WORD.match(chr(code)) else " " for code in range(128))
_COMPARED = ("prompt", "input", "completion", "messages", "tools")
# Odd numbers, so that no bit of a word's hash is lost; one for each place of a word in a sequence.
_FACTORS = np.random.default_rng(0).integers(0, 1 << 63, _WORDS, np.uint64) * np.uint64(2) + np.uint64(1)
_FILTER_BITS = 1 << 27
_FILTER_SHIFT = np.uint64(64 - 27)

Rows: TypeAlias = Dataset | Sequence[Row]


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


def find(train: Rows, heldout: Rows, threshold: float) -> list[Leak]:
    """Return the worst leak of each training row that has one, in the order of the training rows.

    Every pair of rows that shares a five-word sequence is compared; sequences are compared by 64-bit hashes. Many rows
    are shared among processes, and their leaks are kept in the cache.

    Args:
        train: rows with `prompt`, `input` and `completion`: a dataset, or a list.
        heldout: rows with the same columns.
        threshold: smallest overlap of a near leak.
    """
    if not (isinstance(train, Dataset) and isinstance(heldout, Dataset)) or len(train) + len(heldout) < _WORTH_KEEPING:
        return _found(train, heldout, threshold)
    key = json_digest([CACHE_LAYOUT, content_key(train), content_key(heldout), threshold])

    def build(folder: Path) -> None:
        leaks = [astuple(leak) for leak in _found(train, heldout, threshold)]
        (folder / _LEAKS).write_text(json.dumps(leaks), "utf-8")

    kept = built(f"leaks-{key}", build) / _LEAKS
    return [Leak(*values) for values in json.loads(kept.read_text("utf-8"))]


def _found(train: Rows, heldout: Rows, threshold: float) -> list[Leak]:
    parts = [*mapped(_fingerprints, _texts_only(heldout), "reading held-out rows")]
    questions: dict[bytes, int] = {}
    for row, question in enumerate(question for part in parts for question in part.questions):
        questions.setdefault(question, row)
    index = _Index(parts)

    def compare(rows: list[Row]) -> list[tuple[int, int, str, float]]:
        found = _fingerprints(rows)
        same = {
            row: other for row, digest in enumerate(found.questions) if (other := questions.get(digest)) is not None
        }
        near = index.worst(found, threshold)
        leaks = {row: (other, "near", overlap) for row, other, overlap in near}
        leaks |= {row: (other, "exact", 1.0) for row, other in same.items()}
        return [(row, *leaks[row]) for row in sorted(leaks)]

    leaks, first = [], 0
    for found in mapped(compare, _texts_only(train), "looking for leaks"):
        leaks += [Leak(first + row, other, kind, overlap) for row, other, kind, overlap in found]
        first += BATCH
    return leaks


def _texts_only(rows: Rows) -> Rows:
    """Return rows without the columns that are not compared."""
    if not isinstance(rows, Dataset):
        return rows
    return rows.select_columns([name for name in _COMPARED if name in rows.column_names])


class _Fingerprints(NamedTuple):
    """What is compared of rows."""

    questions: list[bytes]
    """Digest of the question of each row."""
    rows: np.ndarray
    """Row of each five-word sequence, ascending."""
    hashes: np.ndarray
    """Hash of each five-word sequence; each once in a row."""


def _fingerprints(rows: list[Row]) -> _Fingerprints:
    words = [_words(" ".join(_texts(row))) for row in rows]
    counts = np.array([*map(len, words)])
    # Python's own hashes: the same in forks of a process, and as good as random.
    hashes = np.fromiter(map(hash, chain.from_iterable(words)), np.int64, counts.sum()).view(np.uint64)
    behind = np.concatenate([hashes, np.zeros(_WORDS, np.uint64)])
    starts = np.cumsum(counts) - counts
    sequences = np.maximum(counts - _WORDS + 1, 1)
    row_of = np.repeat(np.arange(len(rows)), sequences)
    place = np.arange(len(row_of)) - np.repeat(np.cumsum(sequences) - sequences, sequences)
    at, left = starts[row_of] + place, counts[row_of]  # rows with fewer words have one sequence, of all their words
    mixed = np.minimum(left, _WORDS).astype(np.uint64)
    for offset, factor in enumerate(_FACTORS):
        mixed += np.where(offset < left, behind[at + offset], np.uint64(0)) * factor
    # In a row each sequence counts once; the few that occur twice are found among all rows at once.
    marked = np.sort(mixed ^ (row_of.astype(np.uint64) * _FACTORS[0]))
    if len(twice := np.unique(marked[1:][marked[1:] == marked[:-1]])):
        suspected = np.flatnonzero(np.isin(mixed ^ (row_of.astype(np.uint64) * _FACTORS[0]), twice))
        pairs = np.stack([row_of[suspected].astype(np.uint64), mixed[suspected]])
        _, first = np.unique(pairs, axis=1, return_index=True)
        keep = np.ones(len(mixed), bool)
        keep[suspected] = False
        keep[suspected[first]] = True
        row_of, mixed = row_of[keep], mixed[keep]
    return _Fingerprints([*map(_question, rows)], row_of.astype(np.int32), mixed)


def _words(text: str) -> list[str]:
    """Return the words of a text in small letters: a regular expression takes five times as long for ASCII."""
    return text.translate(_SPACED).split() if text.isascii() else _WORD.findall(text.casefold())


class _Index:
    """The held-out rows by their five-word sequences, in arrays: several million take a few hundred megabytes."""

    def __init__(self, parts: list[_Fingerprints]) -> None:
        """Build it; `parts` are removed from the list, so that their memory is free as soon as it can be."""
        count = sum(len(part.questions) for part in parts)
        firsts = range(0, count, BATCH)
        offset = [part.rows + first for part, first in zip(parts, firsts, strict=True)]
        rows = np.concatenate([np.zeros(0, np.int32), *offset])
        del offset
        hashes = np.concatenate([np.zeros(0, np.uint64), *(part.hashes for part in parts)])
        parts.clear()
        self._sizes = np.bincount(rows, minlength=count)
        order = np.argsort(hashes, kind="stable")  # stable: the rows of a sequence stay ascending
        self._rows, hashes = rows[order], hashes[order]
        del rows, order
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)])
        self._hashes, self._starts = hashes[starts], starts.astype(np.uint32)  # of fewer than 2**32 sequences
        del hashes
        counts = np.diff(starts, append=len(self._rows)).astype(np.uint32)
        del starts
        common = counts > max(_MANY, count // 50)
        self._sizes -= np.bincount(self._rows[np.repeat(common, counts)], minlength=count)
        counts[common] = 0  # which tell nothing
        self._counts = counts
        self._filter = np.zeros(_FILTER_BITS // 8, np.uint8)  # most sequences of training rows are in no held-out row
        bits = self._hashes >> _FILTER_SHIFT
        np.bitwise_or.at(self._filter, bits >> np.uint64(3), np.uint8(1) << (bits & np.uint64(7)).astype(np.uint8))

    def worst(self, found: _Fingerprints, threshold: float) -> Iterator[tuple[int, int, float]]:
        """Yield each row that has an overlap of at least `threshold`, with the first row of the largest, and that."""
        bits = found.hashes >> _FILTER_SHIFT
        passed = np.flatnonzero(
            self._filter[bits >> np.uint64(3)] >> (bits & np.uint64(7)).astype(np.uint8) & np.uint8(1)
        )
        hashes, row_of = found.hashes[passed], found.rows[passed].astype(np.int64)
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        known = self._hashes[at] == hashes if len(self._hashes) else np.zeros(0, bool)
        at, row_of = at[known], row_of[known]
        shared = self._counts[at].astype(np.int64)
        sizes = np.bincount(found.rows, minlength=len(found.questions))
        sizes -= np.bincount(row_of[shared == 0], minlength=len(found.questions))
        if not shared.sum():
            return
        runs = np.repeat(self._starts[at].astype(np.int64) - (np.cumsum(shared) - shared), shared) + np.arange(
            shared.sum()
        )
        pairs, counts = np.unique(np.repeat(row_of, shared) * len(self._sizes) + self._rows[runs], return_counts=True)
        rows, others = np.divmod(pairs, len(self._sizes))
        overlaps = counts / (sizes[rows] + self._sizes[others] - counts)
        order = np.lexsort((others, -overlaps, rows))
        _, firsts = np.unique(rows[order], return_index=True)
        for best in order[firsts]:
            if overlaps[best] >= threshold:
                yield int(rows[best]), int(others[best]), float(overlaps[best])


def _question(row: Mapping[str, Any]) -> bytes:
    """Return a digest of everything before the answer; for plain text, which has no question, of the text."""
    first = next((place for place, turn in enumerate(row.get("messages") or ()) if turn.get("train")), None)
    before_answer = _texts(row)[:-1] if first is None else _texts({**row, "messages": row["messages"][:first]})
    normalized = [
        " ".join(text.casefold().split()) for text in (before_answer if any(before_answer) else [row["completion"]])
    ]
    return text_digest("\0".join(normalized).rstrip(".?!\0 "))


def _texts(row: Mapping[str, Any]) -> list[str]:
    """Return all texts of a row in order, the answer last."""
    tools = [json.dumps(row["tools"])] if row.get("tools") else []
    turns = [said(turn) for turn in row.get("messages") or ()]
    return [*tools, *turns] or [row["prompt"], row["input"], row["completion"]]
