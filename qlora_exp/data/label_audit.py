"""The label audit: count and show which tokens of the training rows carry loss."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from qlora_exp.config.sections.mixture import REPLAY
from qlora_exp.data.columns import lengths, lists
from qlora_exp.data.end_of_turn import EndOfTurn
from qlora_exp.data.tokenization import IGNORED
from qlora_exp.utils.errors import DataError

log = logging.getLogger(__name__)

_FEW = 0.9
"""Share of rows with a learned end below which a warning is logged."""


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
    """Share of rows in which what ends an answer carries loss: the chat template's own token or text, else EOS."""
    end_token: str | None
    """That token; None if the chat template puts no token after an answer."""
    end_text: str | None
    """The text that the chat template puts after an answer where it puts no token; None if nothing."""
    sample: str
    """First row that carries loss, decoded, with [[the tokens that carry loss]] in double brackets.

    Double brackets of the text itself are written with backslashes.
    """


def audit(tokens: Dataset, max_length: int, tokenizer: Any, end: EndOfTurn, source: str | None = None) -> LabelAudit:
    """Count the tokens and rows that carry loss, and mark these tokens in a sample row.

    Warn if many rows that are learned do not teach the model where an answer ends.

    Args:
        tokens: rows as tokens, not truncated.
        max_length: number of tokens that a row is truncated to.
        tokenizer: the model's tokenizer.
        end: what the prompt format puts after an answer.
        source: which source the rows are of, for messages; None if there is one.

    Raises:
        DataError: no token of any row would carry loss.
    """
    total = supervised = truncated = shortened = dropped = ended = cut = first = 0
    where = f"{source}: " if source else ""
    sample = ""
    token = tokenizer.eos_token_id if end.token is None else end.token
    for ids, labels in lists(tokens, "input_ids", "labels"):
        places, row_of, count = labels.places(), labels.rows(), len(labels.ends)
        # The first token is never predicted.
        learned = (labels.values != IGNORED) & (places > 0) & (places < max_length)
        learns = np.bincount(row_of[learned], minlength=count) > 0
        truncated += int((ids.lengths > max_length).sum())
        shortened += int((learns & (ids.lengths > max_length)).sum())
        dropped += count - int(learns.sum())
        total += int(np.minimum(ids.lengths, max_length).sum())
        supervised += int(learned.sum())
        if end.stop is None:
            ended += len(np.unique(row_of[learned & (labels.values == token)]))
        else:
            texts = np.split(labels.values[learned], np.cumsum(np.bincount(row_of[learned], minlength=count))[:-1])
            ended += sum(end.stop in tokenizer.decode(text.tolist()) for text in texts)
            references = tokens.select(range(first, first + count)).with_format(None)["reference"][:]
            cut += sum(end.stop in reference for reference in references)
        if learns.any() and not sample:
            row = tokens[first + int(learns.argmax())]
            sample = _mark(row["input_ids"][:max_length], row["labels"][:max_length], tokenizer)
        first += count
    if not supervised:
        found = lengths(tokens)
        raise DataError(
            f"{where}no token of the {len(tokens)} training rows carries loss: every prompt fills "
            f"training.max_length={max_length}, and rows have {found.min():,} to {found.max():,} tokens; raise it, or "
            "shorten the prompts"
        )
    count = len(tokens)
    if ended < _FEW * (used := count - dropped) and source != REPLAY:  # general text need not end
        log.warning("%s%s", where, _endless(ended / used, shortened / used, tokenizer, end))
    if cut:
        log.warning(
            "%slabels: the answers of %d of %d rows contain %r, the text that ends an answer, so that generated "
            "answers are cut there; use a chat template that ends its turns with a special token",
            where,
            cut,
            count,
            end.stop,
        )
    return LabelAudit(
        rows=count,
        tokens=total,
        supervised_tokens=supervised,
        supervised_share=supervised / total,
        truncated_rows_share=truncated / count,
        dropped_rows_share=dropped / count,
        eos_learned_share=ended / count,
        end_token=None if end.token is None else tokenizer.convert_ids_to_tokens(end.token),
        end_text=end.stop,
        sample=sample,
    )


def together(audits: Mapping[str, LabelAudit]) -> LabelAudit:
    """Return the audit of the rows of several sources; the token and the text that end an answer are the first's."""
    first, *_ = audits.values()
    rows, tokens, supervised = (
        sum(getattr(each, name) for each in audits.values()) for name in ("rows", "tokens", "supervised_tokens")
    )
    shares = {
        name: sum(getattr(each, name) * each.rows for each in audits.values()) / rows
        for name in ("truncated_rows_share", "dropped_rows_share", "eos_learned_share")
    }
    return replace(
        first,
        rows=rows,
        tokens=tokens,
        supervised_tokens=supervised,
        supervised_share=supervised / tokens,
        sample="\n\n".join(f"{name}: {each.sample}" for name, each in audits.items()),
        **shares,
    )


def _endless(share: float, truncated: float, tokenizer: Any, end: EndOfTurn) -> str:
    """Say why the rows do not teach the model to stop, and what to do."""
    if end.token is None and end.stop is None:
        after = f"only {end.text!r}" if end.text else "nothing"
        return (
            f"labels: the chat template puts {after} after an answer: answers "
            "end only at evaluation.max_new_tokens; use dataset.format=prompt_completion, whose answers end with EOS, "
            "or a chat template that ends its turns with a special token"
        )
    what = repr(end.stop) if end.token is None else tokenizer.convert_ids_to_tokens(end.token)
    return (
        f"labels: {what}, which ends an answer, carries loss in only {share:.0%} of the rows that are learned "
        f"({truncated:.0%} are truncated): the model does not learn where an answer ends; raise training.max_length, "
        "or shorten the rows"
    )


def _mark(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            piece = tokenizer.decode(ids[start:end]).replace("[[", r"\[\[").replace("]]", r"\]\]")
            text += piece if labels[start] == IGNORED else f"[[{piece}]]"
            start = end
    return text
