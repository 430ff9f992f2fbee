"""The label audit: count and show which tokens of the training rows carry loss."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from qlora_exp.data.tokenization import IGNORED
from qlora_exp.utils.errors import DataError


@dataclass(frozen=True)
class LabelAudit:
    """How much of the training rows carries loss, counted on the tokens that training will use."""

    rows: int
    tokens: int
    supervised_tokens: int
    supervised_share: float
    truncated_rows_share: float
    """Share of rows longer than max_length: their end, EOS included, is not learned."""
    dropped_rows_share: float
    """Share of rows truncated before their first answer token: nothing is learned from them."""
    eos_learned_share: float
    """Share of rows whose EOS carries loss."""
    sample: str
    """First row that carries loss, decoded, with [[the tokens that carry loss]] in double brackets."""


def audit(tokens: Dataset, max_length: int, tokenizer: Any) -> LabelAudit:
    """Count the tokens and rows that carry loss, and mark these tokens in a sample row.

    Raises:
        DataError: no token of any row would carry loss.
    """
    total = supervised = truncated = dropped = eos = 0
    sample = ""
    for row in tokens:
        ids, labels = row["input_ids"][:max_length], row["labels"][:max_length]
        learned = [label for label in labels[1:] if label != IGNORED]  # the first token is never predicted
        truncated += len(row["input_ids"]) > max_length
        dropped += not learned
        total += len(ids)
        supervised += len(learned)
        eos += tokenizer.eos_token_id in learned
        if learned and not sample:
            sample = _mark(ids, labels, tokenizer)
    if not supervised:
        raise DataError(
            f"no token of the {len(tokens)} training rows carries loss: every prompt fills "
            f"training.max_length={max_length}; raise it, or shorten the prompts"
        )
    count = len(tokens)
    return LabelAudit(
        rows=count,
        tokens=total,
        supervised_tokens=supervised,
        supervised_share=supervised / total,
        truncated_rows_share=truncated / count,
        dropped_rows_share=dropped / count,
        eos_learned_share=eos / count,
        sample=sample,
    )


def _mark(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            piece = tokenizer.decode(ids[start:end])
            text += piece if labels[start] == IGNORED else f"[[{piece}]]"
            start = end
    return text
