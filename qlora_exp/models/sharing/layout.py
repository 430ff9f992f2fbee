"""Lay out batches of several jobs as the arguments of one pass through a base model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

MARKS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments of a base model that say where rows which follow one another in a sequence begin and end."""


def more_than_rows(arguments: Mapping[str, Any]) -> list[str]:
    """Return which arguments of a base model besides rows ask for something."""
    rows = {"input_ids", "attention_mask", "return_dict"}
    if arguments.get("attention_mask") is None:
        rows.update(MARKS)
    return [name for name, value in arguments.items() if name not in rows and value is not None and value is not False]


def padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Pad (rows, tokens, ...) with zeros to `length` tokens."""
    missing = length - tensor.shape[1]
    return pad(tensor, (*(0, 0) * (tensor.ndim - 2), 0, missing)) if missing else tensor


def padded_rows(ids: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the rows of all batches, each padded to the longest.

    Args:
        ids: each batch's tokens, (rows, tokens).
        masks: each batch's attention mask, of the same shape.
    """
    longest = max(each.shape[1] for each in ids)
    return {
        "input_ids": torch.cat([padded(each, longest) for each in ids]),
        "attention_mask": torch.cat([padded(each, longest) for each in masks]),
    }


def in_one_sequence_each(
    ids: Sequence[torch.Tensor], positions: Sequence[torch.Tensor], marks: Sequence[str]
) -> dict[str, Any]:
    """Return the sequence of each batch, in which its rows follow one another.

    Padding is a row of its own at the end of a sequence, which the attention of the others does not see.

    Args:
        ids: each batch's tokens, (1, tokens).
        positions: each token's place in its row, of the same shape.
        marks: which of `MARKS` to return.
    """
    longest = max(each.shape[1] for each in ids)
    places = torch.cat([_continued(each, longest) for each in positions])
    begins = places == 0
    ends = pad(begins.flatten().nonzero().flatten(), (0, 1), value=places.numel()).to(torch.int32)
    most = int(ends.diff().max())
    found = {
        "position_ids": places,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": most,
        "max_length_k": most,
        "seq_idx": (begins.cumsum(dim=1) - 1).to(torch.int32),
    }
    return {"input_ids": torch.cat([padded(each, longest) for each in ids])} | {name: found[name] for name in marks}


def _continued(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Continue positions of (1, tokens) to `length` tokens with those of another row."""
    more = torch.arange(length - positions.shape[1], dtype=positions.dtype, device=positions.device)
    return torch.cat([positions, more[None]], dim=1)
