"""Arrange the rows of a step in its batches, with less padding or none, and order rows by length.

A step has the same rows however they are arranged. Their losses are sums over tokens, divided by the number of learned
tokens of the whole step, so that only rounding differs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.trainer_pt_utils import LengthGroupedSampler

from qlora_exp.data.tokenization import IGNORED

Batch = dict[str, Any]
"""`input_ids`, `labels` and `attention_mask`, each (rows, tokens)."""


class ByLength(LengthGroupedSampler):
    """Sampler that groups rows of similar length, in an order that depends only on the seed and the epoch.

    So a resumed run continues in the same order. The sampler of transformers draws the order from the global random
    state, which differs in a resumed run.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Seed the order of an epoch; accelerate calls this before each epoch."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


def arranged(batches: Sequence[Batch], padding: str, multiple: int = 1) -> list[Batch]:
    """Return the same rows in as many batches, arranged as `padding` says.

    Args:
        batches: the batches of a step, padded on the right.
        padding: `batch`, `by_length` or `free`, as in `training.padding`.
        multiple: number of tokens of which the length of each batch is a multiple.
    """
    if padding == "free":
        return [without_padding(batch) for batch in batches]
    if padding == "by_length" and len(batches) > 1:
        return by_length(batches, multiple)
    return [*batches]


def by_length(batches: Sequence[Batch], multiple: int = 1) -> list[Batch]:
    """Divide the rows into as many batches, the longest rows into the first one.

    So the fullest batch comes before there are gradients. If not all are full, the one that is not gets the rows with
    which there is least padding. A step with a batch that only keeps a process busy, which has
    no labels, stays as it is: its row must not count.
    """
    if not all(bool((batch["labels"] != IGNORED).any()) for batch in batches):
        return [*batches]
    lengths = [length for batch in batches for length in batch["attention_mask"].sum(dim=1).tolist()]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])  # equal lengths keep their order
    width = max(batch["input_ids"].shape[1] for batch in batches)
    rows = {
        name: torch.cat([pad(batch[name], (0, width - batch[name].shape[1]), value=fill) for batch in batches])
        for name, fill in (("input_ids", 0), ("labels", IGNORED), ("attention_mask", 0))
    }
    size = len(batches[0]["input_ids"])

    def padded(places: list[int]) -> int:
        return -(-lengths[places[0]] // multiple) * multiple

    chosen = min(_divisions(order, size), key=lambda parts: sum(len(part) * padded(part) for part in parts))
    return [{name: values[places, : padded(places)] for name, values in rows.items()} for places in chosen]


def _divisions(order: list[int], size: int) -> Iterator[list[list[int]]]:
    """Yield each division into parts of `size` in this order, with the smaller one, if there is one, in each place."""
    rest = len(order) % size
    for place in range(len(order) // size + 1 if rest else 1):
        before = place * size
        parts = [order[:before][begin : begin + size] for begin in range(0, before, size)]
        parts += [order[before : before + rest]] if rest else []
        after = order[before + rest :]
        yield [*parts, *(after[begin : begin + size] for begin in range(0, len(after), size))]


def without_padding(batch: Batch) -> Batch:
    """Put the rows of a batch one after another into one sequence, with the marks of their ends that models read.

    Returns:
        What TRL's collator makes of packed rows: positions start again with each row, whose first token is not learned.
    """
    kept = batch["attention_mask"].bool()
    lengths = kept.sum(dim=1)
    ends = pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    positions = (kept.cumsum(dim=1) - 1)[kept]
    longest = int(lengths.max())
    rows = torch.arange(len(lengths), dtype=torch.int32, device=kept.device)
    return {
        "input_ids": batch["input_ids"][kept][None],
        "labels": batch["labels"][kept].masked_fill(positions == 0, IGNORED)[None],
        "position_ids": positions[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": rows.repeat_interleave(lengths)[None],
    }


def count_rows(inputs: Batch) -> int:
    """Return the number of rows of a batch, padded or one after another."""
    ends = inputs.get("cu_seq_lens_q")
    return len(inputs["input_ids"]) if ends is None else len(ends) - 1


def sums_of_rows(positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sum values of tokens over each row of a batch in which the rows follow one another, by the tokens' positions."""
    rows = ((positions[0] == 0).cumsum(0) - 1)[-values.shape[1] :]
    return values.new_zeros(int(rows[-1]) + 1).double().index_add(0, rows, values[0, -len(rows) :].double())
