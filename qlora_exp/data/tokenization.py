"""Turn rows into tokens with labels. Does not depend on models: a tokenizer is enough."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, load_from_disk
from tqdm import tqdm

from qlora_exp.config.schema import Config
from qlora_exp.data.cleaning import CACHE_LAYOUT
from qlora_exp.data.end_of_turn import closed_once, end_of_turn
from qlora_exp.data.prompts import chat_template, render, turns
from qlora_exp.data.rows import SOURCE, fingerprint
from qlora_exp.data.template_checks import TemplateCheck
from qlora_exp.utils.cache import built
from qlora_exp.utils.digests import json_digest
from qlora_exp.utils.errors import DataError

IGNORED = -100
"""Label of a token that carries no loss, as in torch's cross entropy."""


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
    tokens = load_from_disk(str(folder))
    assert isinstance(tokens, Dataset)
    return tokens


def encoder(config: Config, tokenizer: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that gives the tokens of a row, as `tokenize` does; each source has a format of its own.

    It raises DataError for a row that cannot be learned as it is.
    """
    encoders = {
        name: _encoder(config.model_copy(update={"dataset": part}), tokenizer) for name, part in config.parts.items()
    }
    only = next(iter(encoders))
    return lambda row: encoders[row.get(SOURCE, only)](row)


def _encoder(config: Config, tokenizer: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    eos, learn_all = tokenizer.eos_token_id, not config.training.completion_only_loss
    eos_text = re.escape(tokenizer.eos_token)  # exported answers often end with it, and get it below or by the template
    template = TemplateCheck(config.dataset, tokenizer)
    end = cache(lambda: end_of_turn(tokenizer, chat_template(config.dataset, tokenizer)))

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        try:
            if config.dataset.format == "chat":
                template.check(row)
                _check_weights(row, learn_all)
                row = row | {"messages": closed_once(turns(row, config.dataset), tokenizer, end())}
            text = render(row, config.dataset, tokenizer, config.training.assistant_only_loss)
        except DataError as error:
            raise DataError(f"{' or '.join(config.dataset.paths)}, {row.get('place')}: {error}") from error
        ids: list[int] = []
        labels: list[int] = []
        prompt_length = 0
        for place, (piece, learned) in enumerate(text.pieces):
            first = place == 0 and not text.has_special_tokens
            if learned and not text.has_special_tokens:
                piece = re.sub(f"(?:{eos_text}\\s*)+$", "", piece)
            tokens = prompt_tokens(tokenizer, piece, special=first and not learned)
            prompt_length = len(ids)
            ids += tokens
            labels += tokens if learned or learn_all else [IGNORED] * len(tokens)
        reference = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        reference = reference.removesuffix(end().stop or "").strip()
        if not text.has_special_tokens:
            ids, labels = [*ids, eos], [*labels, eos]
        return {"input_ids": ids, "labels": labels, "prompt_length": prompt_length, "reference": reference}

    return encode


def _tokenize(rows: Dataset, config: Config, tokenizer: Any, folder: Path) -> None:
    encode = encoder(config, tokenizer)

    def counted(row: dict[str, Any]) -> dict[str, Any]:
        bar.update()
        return encode(row)

    with (
        tqdm(total=len(rows), desc="tokenizing", unit="row", leave=False, disable=None) as bar,
        TemporaryDirectory(prefix="qlora_exp-") as scratch,
    ):
        options: dict[str, Any] = {"load_from_cache_file": False, "cache_file_name": f"{scratch}/tokens.arrow"}
        encoded = rows.map(counted, remove_columns=rows.column_names, **options)
        encoded.with_format(None).save_to_disk(str(folder))  # without the transform of the rows


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
    tokens: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    added = special and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    return tokens[:-1] if added else tokens


def cut(rows: Dataset, tokens: Dataset, max_length: int) -> tuple[Dataset, Dataset]:
    """Return the held-out rows as text and as tokens truncated to `max_length`.

    Rows that have no answer token within `max_length` are left out.

    Raises:
        DataError: no rows are left.
    """
    keep = [i for i, labels in enumerate(tokens["labels"]) if any(label != IGNORED for label in labels[1:max_length])]
    if not keep:
        raise DataError(f"no held-out row has an answer token within training.max_length={max_length}; raise it")
    shorter = tokens.select(keep).map(
        lambda row: {"input_ids": row["input_ids"][:max_length], "labels": row["labels"][:max_length]},
        load_from_cache_file=False,
        keep_in_memory=True,
    )
    return rows.select(keep), shorter


def unrelated(rows: Dataset, config: Config, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """Return `rows` of the text that measures forgetting, and their tokens, truncated as the held-out rows are."""
    as_dataset = config.model_copy(update={"dataset": config.unrelated})
    return cut(rows, tokenize(rows, as_dataset, tokenizer), config.training.max_length)
