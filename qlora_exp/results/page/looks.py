"""How rows are told apart in figures: colour, marker, line and a short name, each different from all others.

The colours are those of Okabe and Ito (2008), for colour-blind readers; no two rows differ in the colour alone.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.results.compare import Comparison
from qlora_exp.results.row import Row
from qlora_exp.utils.display import shown
from qlora_exp.utils.text import shortened

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = (
    ("o", "circle"), ("s", "square"), ("D", "diamond"), ("^", "triangle-up"),
    ("v", "triangle-down"), ("P", "cross"), ("*", "star"), ("X", "x"),
)  # fmt: skip
"""Markers as Matplotlib and Plotly name them."""
_DASHES = ((), (6, 3), (2, 2), (8, 3, 2, 3), (12, 4), (8, 3, 2, 3, 2, 3), (1, 4), (12, 4, 2, 4))
"""Lengths of lines' dashes and gaps, in points; the first line is solid."""
_NAMES = {"loss": "held-out loss", "rougeL": "ROUGE-L", "unrelated_loss": "loss on unrelated text"}
_UNITS = {"loss": "nats per token", "unrelated_loss": "nats per token"}


@dataclass(frozen=True)
class Look:
    """The look of a row: no two of the first 64 have the same marker in the same colour, nor the same line."""

    colour: str
    marker: str
    """As Matplotlib names it."""
    symbol: str
    """The same marker, as Plotly names it."""
    dashes: tuple[int, ...]
    """Lengths of dashes and gaps; empty for a solid line."""


def look(index: int) -> Look:
    """Return the look of the row with this index; looks repeat after 512 rows."""
    count = len(COLOURS)
    rest, colour = divmod(index, count)
    marker = _MARKERS[(colour + rest + rest // count) % count]
    return Look(COLOURS[colour], *marker, _DASHES[rest % count])


def names(rows: Sequence[Row], most: int) -> list[str]:
    """Return the labels of rows as names of at most `most` characters, no two of them alike.

    Where complete names are too long, all names have shorter keys, as `lora r=8 alpha=16`, or none, as `lora 8 16`.
    """
    forms = [[shown(row.short) for row in rows]]
    forms += [
        [shown(" ".join(map(word, row.label.items()))) or "all" for row in rows] for word in (_short_word, _value)
    ]
    for form in forms:
        if len(set(form)) == len(form) and max(map(len, form)) <= most:
            return form
    return distinct(forms[1], most)


def _short_word(item: tuple[str, str]) -> str:
    key, value = item
    is_name = value[:1].isalpha() and value not in ("True", "False", "None")
    return _value(item) if is_name else f"{re.split('[._]', key)[-1]}={_value(item)}"


def _value(item: tuple[str, str]) -> str:
    return shortened(item[1], 40)


def distinct(texts: Sequence[str], most: int) -> list[str]:
    """Shorten texts to at most `most` characters, so that no two become alike.

    What is too long is cut in the middle; where that makes two alike, a digest of the whole replaces the end. Equal
    texts are numbered: labels may differ only in what is not shown, such as a secret.
    """
    cut = [_middle_cut(text, most) for text in texts]
    count = Counter(cut)
    cut = [shortened(text, most) if count[name] > 1 else name for name, text in zip(cut, texts, strict=True)]
    taken: set[str] = set()
    for name in cut:
        number, candidate = 1, name
        while candidate in taken:
            number += 1
            candidate = f"{name[: most - len(str(number)) - 2]} #{number}"
        taken.add(candidate)
        cut[len(taken) - 1] = candidate
    return cut


def _middle_cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def metric_label(comparison: Comparison) -> str:
    """Return the metric with its unit and direction, for an axis."""
    metric = comparison.metric
    unit = f", {unit}" if (unit := _UNITS.get(metric, shown(comparison.unit))) else ""
    return f"{metric_name(metric)}{unit} ({'lower' if comparison.lower_is_better else 'higher'} is better)"


def metric_name(metric: str) -> str:
    """Return the name of a metric for people."""
    return _NAMES.get(metric, metric.removeprefix("metric/").replace("_", " "))
