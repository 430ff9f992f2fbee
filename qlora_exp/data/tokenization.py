"""Turn rows into tokens with labels. Does not depend on models: a tokenizer is enough."""

import logging
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.mixture import REPLAY, of_source
from qlora_exp.data import columns, prompts
from qlora_exp.data.cleaning import CACHE_LAYOUT
from qlora_exp.data.columns import Row, lengths, lists, mapped
from qlora_exp.data.end_of_turn import closed_once, end_of_turn
from qlora_exp.data.prompts import Rendered, chat_template, render_all, turns
from qlora_exp.data.rows import SOURCE, fingerprint
from qlora_exp.data.template_checks import TemplateCheck, UnrenderedError
from qlora_exp.utils.cache import built, cache_dir
from qlora_exp.utils.digests import json_digest
from qlora_exp.utils.errors import DataError, ModelError
from qlora_exp.utils.units import MIB

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that carries no loss, as in torch's cross entropy."""
_LARGE = 100 * MIB
"""Bytes of disk that a run says it takes."""
_TOKENS = "tokens.arrow"
_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "prompt_length": pa.int32(),
        "reference": pa.string(),
    }
)


def tokenize(rows: Dataset, config: Config, tokenizer: Any) -> Dataset:
    """Return `input_ids` and `labels` of each row, not truncated; labels are -100 where no loss is taken.

    Prompt and completion are tokenized separately, so that the prompt has the same tokens in training as in generation.
    `reference` is the learned answer as text without special tokens and without the text that ends it, as generated
    answers are decoded.
    The result is cached: other runs with the same rows, format and tokenizer read it from there.
    """
    learned = [config.training.completion_only_loss, config.training.assistant_only_loss]
    parts = config.parts
    first = next(iter(parts.values()))
    inputs: list[Any] = [fingerprint(rows), first.format, first.system_message, learned]
    inputs += [tokenizer.backend_tokenizer.to_str(), first.chat_template or tokenizer.chat_template]
    inputs += [tokenizer.special_tokens_map]
    if SOURCE in rows.column_names:
        inputs += [[name, part.format, part.system_message, part.chat_template] for name, part in parts.items()]
        inputs += [json_digest(rows.with_format(None)[SOURCE][:])]
    folder = built(
        f"tokens-{json_digest([CACHE_LAYOUT, *inputs])}", lambda part: _tokenize(rows, config, tokenizer, part)
    )
    return Dataset.from_file(str(folder / _TOKENS))


def encoder(config: Config, tokenizer: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that gives the tokens of a row, as `tokenize` does; each source has a format of its own.

    It raises DataError for a row that cannot be learned as it is.
    """
    encode = _Encoder(config, tokenizer)
    return lambda row: encode([row])[0]


class _Encoder:
    """Turns rows into tokens, many at a time: that takes half as long as one by one."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self._of_parts = {
            name: _PartEncoder(config.model_copy(update={"dataset": part}), tokenizer, name)
            for name, part in config.parts.items()
        }

    def prepare(self) -> None:
        """Find out what all rows need, so that forks of this process have it and start none of their own for it."""
        for part in self._of_parts.values():
            part.end()
        prompts.end_renderer()

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Return the tokens of each row.

        Raises:
            DataError: a row cannot be learned as it is; the first one is named.
            ModelError: the chat template needs too much time or memory for a row.
        """
        seen = {name: part.template.seen for name, part in self._of_parts.items()}
        try:
            return self._encoded(rows)
        except (DataError, ModelError):
            if len(rows) == 1:
                raise
        for name, part in self._of_parts.items():
            part.template.seen = seen[name]
        return [self._encoded([row])[0] for row in rows]

    def _encoded(self, rows: list[Row]) -> list[Row]:
        only = next(iter(self._of_parts))
        sources = [row.get(SOURCE, only) for row in rows]
        encoded: list[Row] = [{}] * len(rows)
        for name in dict.fromkeys(sources):
            places = [place for place, source in enumerate(sources) if source == name]
            for place, tokens in zip(places, self._of_parts[name]([rows[place] for place in places]), strict=True):
                encoded[place] = tokens
        return encoded


class _PartEncoder:
    """Turns rows of one source into tokens."""

    def __init__(self, config: Config, tokenizer: Any, name: str) -> None:
        self._config, self._tokenizer, self._name = config, tokenizer, name
        # Exported answers often end with EOS, and get it below or by the template.
        self._eos = re.compile(f"(?:{re.escape(tokenizer.eos_token)}\\s*)+$")
        self.template = TemplateCheck(config.dataset, tokenizer)
        self.end = cache(lambda: end_of_turn(tokenizer, chat_template(config.dataset, tokenizer)))

    def __call__(self, rows: list[Row]) -> list[Row]:
        texts = self._rendered(rows)
        learn_all, eos = not self._config.training.completion_only_loss, self._tokenizer.eos_token_id
        pieces: dict[bool, list[str]] = {True: [], False: []}  # with the tokenizer's special tokens, and without
        kinds = []
        for text in texts:
            for place, (piece, learned) in enumerate(text.pieces):
                special = place == 0 and not text.has_special_tokens and not learned
                plain = learned and not text.has_special_tokens
                pieces[special].append(self._eos.sub("", piece) if plain else piece)
                kinds.append(special)
        found = {special: iter(_tokens(self._tokenizer, some, special)) for special, some in pieces.items()}
        tokens = iter([next(found[special]) for special in kinds])
        stop = self.end().stop or ""
        encoded = []
        for text in texts:
            ids: list[int] = []
            labels: list[int] = []
            for (_, learned), own in zip(text.pieces, tokens, strict=False):
                prompt_length, last = len(ids), own
                ids += own
                labels += own if learned or learn_all else [IGNORED] * len(own)
            reference = self._tokenizer.decode(last, skip_special_tokens=True).strip()
            reference = reference.removesuffix(stop).strip()
            if not text.has_special_tokens:
                ids, labels = [*ids, eos], [*labels, eos]
            encoded.append({"input_ids": ids, "labels": labels, "prompt_length": prompt_length, "reference": reference})
        return encoded

    def _rendered(self, rows: list[Row]) -> list[Rendered]:
        config, row = self._config, rows[0]
        try:
            if config.dataset.format == "chat":
                checked = []
                for row in rows:
                    self.template.check(row)
                    _check_weights(row, not config.training.completion_only_loss)
                    dialogue = closed_once(turns(row, config.dataset), self._tokenizer, self.end())
                    checked.append(row | {"messages": dialogue})
                rows = checked
            return render_all(rows, config.dataset, self._tokenizer, config.training.assistant_only_loss)
        except DataError as error:
            where = f"{' or '.join(config.dataset.paths)}, {row.get('place')}"
            raise type(error)(f"{where}: {of_source(str(error), self._name)}") from error


def _tokens(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    """Return the tokens of each text, as `prompt_tokens` does."""
    if not texts:
        return []
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
    added = special and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    return [ids[:-1] for ids in tokens] if added else tokens


def _tokenize(rows: Dataset, config: Config, tokenizer: Any, folder: Path) -> None:
    """Write the tokens of all rows into a file."""
    encode = _Encoder(config, tokenizer)
    if columns.processes(len(rows)) > 1:
        encode.prepare()

    def encoded(batch: list[Row]) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist(encode(batch), _SCHEMA)

    def write(some: Callable[..., Iterator[pa.RecordBatch]]) -> None:
        with ArrowWriter(path=str(folder / _TOKENS), features=Features.from_arrow_schema(_SCHEMA)) as writer:
            for batch in some(encoded, rows, "tokenizing"):
                writer.write_table(pa.Table.from_batches([batch]))
            writer.finalize()

    try:
        write(mapped)
    except UnrenderedError:
        # Each kind of message is tried once, so that one process may accept a row that another one refuses.
        encode = _Encoder(config, tokenizer)
        write(partial(mapped, alone=True))
    if (size := (folder / _TOKENS).stat().st_size) > _LARGE:
        log.info(
            "the tokens of %s rows take %s MiB of the cache, %s", f"{len(rows):,}", f"{size // MIB:,}", cache_dir()
        )


def _check_weights(row: dict[str, Any], learn_all: bool) -> None:
    """Refuse a dialogue with an answer that is not to be learned if all of it is."""
    if learn_all and any(message.get("train") is False for message in row.get("messages") or ()):
        raise DataError(
            "an answer is not to be learned (weight or train), but training.completion_only_loss=false learns all of a "
            "row; set it to true"
        )


def prompt_tokens(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Return the tokens of a text that an answer follows.

    Args:
        tokenizer: the model's tokenizer.
        text: the text.
        special: whether the tokenizer is to begin it with its special tokens. Some tokenizers also end every text with
            EOS, which is never in a prompt.
    """
    return _tokens(tokenizer, [text], special)[0]


def cut(rows: Dataset, tokens: Dataset, max_length: int) -> tuple[Dataset, Dataset]:
    """Return the held-out rows as text and as tokens truncated to `max_length`.

    Rows that have no answer token within `max_length` are left out.

    Raises:
        DataError: no rows are left.
    """
    keep = np.flatnonzero(_learning(tokens, max_length, first=1)).tolist()
    if not keep:
        raise DataError(f"no held-out row has an answer token within training.max_length={max_length}; raise it")
    kept = tokens.select(keep, keep_in_memory=True)
    if lengths(kept).max() > max_length:
        kept = kept.map(partial(_shortened, max_length), batched=True, load_from_cache_file=False, keep_in_memory=True)
    return rows.select(keep, keep_in_memory=True), kept


def for_training(tokens: Dataset, max_length: int | None) -> Dataset:
    """Return rows as a trainer takes them: `input_ids` and `labels`, truncated, without rows that have no label left.

    Rows are truncated when they are read, so that they stay files mapped into memory; TRL would copy all of them twice.

    Args:
        tokens: rows that `tokenize` returned.
        max_length: number of tokens that a row is truncated to; None: all rows as they are, for TRL to pack.
    """
    tokens = tokens.select_columns(["input_ids", "labels"])
    if max_length is None:
        return tokens
    keep = _learning(tokens, max_length, first=0)
    tokens = tokens if keep.all() else tokens.select(np.flatnonzero(keep).tolist(), keep_in_memory=True)
    too_long = lengths(tokens).max(initial=0) > max_length
    return tokens.with_transform(partial(_shortened, max_length)) if too_long else tokens


def _shortened(max_length: int, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    cut_off = {name: [row[:max_length] for row in batch[name]] for name in batch.keys() & {"input_ids", "labels"}}
    return batch | cut_off


def _learning(tokens: Dataset, max_length: int, first: int) -> np.ndarray:
    """Return for each row whether one of its labels from `first` to `max_length` carries loss."""
    found = [np.zeros(0, bool)]
    for (labels,) in lists(tokens, "labels"):
        places = labels.places()
        learned = (labels.values != IGNORED) & (places >= first) & (places < max_length)
        found.append(np.bincount(labels.rows()[learned], minlength=len(labels.ends)) > 0)
    return np.concatenate(found)


def unrelated(rows: Dataset, config: Config, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """Return `rows` of the text that measures forgetting, and their tokens, truncated as the held-out rows are."""
    as_dataset = config.model_copy(update={"dataset": config.unrelated})
    try:
        tokens = tokenize(rows, as_dataset, tokenizer)
    except DataError as error:
        raise DataError(of_source(str(error), REPLAY)) from error
    return cut(rows, tokens, config.training.max_length)
