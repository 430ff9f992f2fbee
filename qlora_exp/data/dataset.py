"""Load rows, split them into training and held-out rows, and turn them into tokens with labels.

Rows of every source get the same columns. Does not depend on models: a tokenizer is enough.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, load_from_disk
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data import leakage
from qlora_exp.data.prompts import render
from qlora_exp.data.sources import read
from qlora_exp.libraries.datasets import content_key
from qlora_exp.utils.cache import built
from qlora_exp.utils.digests import json_digest, text_digest
from qlora_exp.utils.errors import DataError

IGNORED = -100
_ROWS, _DROPPED = "rows.arrow", "dropped.json"
_LAYOUT = 2  # increase it when cached rows and tokens of older code must not be used any more


@dataclass(frozen=True)
class Rows:
    """Training and held-out rows, with the columns `prompt`, `input`, `completion` (and `messages`, `entry`)."""

    train: Dataset
    heldout: Dataset
    dropped: dict[str, int]
    """Number of rows left out, by reason."""
    leaks: list[leakage.Leak]
    """Pairs of a training row and a held-out row that it gives away, before any row was left out."""


def fingerprint(rows: Dataset) -> str:
    """Return a digest of all rows, which depends on their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\0")
    return digest.hexdigest()[:16]


def load_rows(config: DatasetConfig) -> Rows:
    """Read, clean, split and limit the rows.

    Training rows that give a held-out row away are left out, as `dataset.drop_leaks` says.

    Raises:
        DataError: the source or a column does not exist, or no rows are left.
    """
    train, heldout, dropped = _split(config)
    leaks = leakage.find(train, heldout, config.leak_threshold)
    dropped["leaks"] = 0
    if config.drop_leaks != "none":
        leaking = {leak.train for leak in leaks if leak.kind == "exact" or config.drop_leaks == "near"}
        dropped["leaks"] = len(leaking)
        train = _pick(train, [index for index in range(len(train)) if index not in leaking])
    train = _first(train, config.max_train_rows)
    if not len(train) or not len(heldout):
        raise DataError(f"{config.path}: no rows are left for training or for evaluation ({_why(dropped)})")
    return Rows(train, heldout, dropped, leaks)


def load_heldout(config: DatasetConfig) -> Dataset:
    """Return the held-out rows only.

    Raises:
        DataError: the source or a column does not exist, or no rows are left.
    """
    _, heldout, dropped = _split(config)
    if not len(heldout):
        raise DataError(f"{config.path}: no held-out rows are left ({_why(dropped)})")
    return heldout


def _split(config: DatasetConfig) -> tuple[Dataset, Dataset, dict[str, int]]:
    """Return the training rows, the held-out rows up to their limit, and the number left out of both, by reason."""
    rows, dropped = _clean(read(config, config.path, config.split), config)
    if config.eval_path or config.eval_split:
        heldout, dropped_heldout = _clean(
            read(config, config.eval_path or config.path, config.eval_split or config.split), config
        )
        dropped = {reason: count + dropped_heldout[reason] for reason, count in dropped.items()}
        train = _pick(rows, order(len(rows), config.split_seed))
    else:
        size = config.eval_size
        if len(rows) < 2 or (isinstance(size, int) and size >= len(rows)):
            raise DataError(f"dataset.eval_size={size}: only {len(rows)} rows to split, too few ({_why(dropped)})")
        count = max(1, round(size * len(rows))) if size < 1 else int(size)
        shuffled = order(len(rows), config.split_seed)
        heldout, train = _pick(rows, shuffled[:count]), _pick(rows, shuffled[count:])
    return train, _first(heldout, config.max_eval_rows), dropped


def order(count: int, seed: int) -> list[int]:
    """Return a random order of `count` rows, the same that `datasets` produces with this random seed."""
    return np.random.default_rng(seed).permutation(count).tolist()


def _pick(rows: Dataset, chosen: list[int]) -> Dataset:
    """Select rows, with their indices in memory: `datasets` would write these to the cache, next to the rows."""
    return rows.select(chosen, keep_in_memory=True)


def _why(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) + " left out"


def _first(rows: Dataset, limit: int | None) -> Dataset:
    return rows.select(range(min(limit, len(rows)))) if limit else rows


def _clean(raw: Dataset, config: DatasetConfig) -> tuple[Dataset, dict[str, int]]:
    """Give rows the uniform columns, and leave out empty, unwanted and repeated ones.

    The result is a file in the cache, so that the rows are never all in memory.

    Returns:
        The rows, and the number left out, by reason.
    """
    if config.format == "text":
        columns = {"completion": config.text_column}
    elif config.messages_column:
        columns = {"messages": config.messages_column}
    else:
        columns = {"prompt": config.prompt_column, "completion": config.completion_column}
        if config.input_column:
            columns["input"] = config.input_column
    if missing := [column for column in columns.values() if column not in raw.column_names]:
        raise DataError(
            f"{config.path}: no column {', '.join(repr(column) for column in missing)}; "
            f"it has {', '.join(raw.column_names)}. Set dataset.prompt_column, dataset.completion_column, ... to yours"
        )
    settings = [columns, config.format, config.drop_matching, config.drop_duplicates]
    name = f"rows-{json_digest([_LAYOUT, content_key(raw), *settings])}"
    folder = built(name, lambda part: _write_clean(raw, config, columns, part))
    return Dataset.from_file(str(folder / _ROWS)), json.loads((folder / _DROPPED).read_text("utf-8"))


def _write_clean(raw: Dataset, config: DatasetConfig, columns: dict[str, str], folder: Path) -> None:
    unwanted = re.compile(config.drop_matching) if config.drop_matching else None
    own = {**columns, "entry": "entry"} if "entry" in raw.column_names else columns  # tasks of reasoning-gym
    features = {name: Value("string") for name in ("prompt", "input", "completion")}
    if "messages" in columns:
        features["messages"] = List({"role": Value("string"), "content": Value("string")})
    if "entry" in own:
        features["entry"] = Value("string")
    dropped = {"empty": 0, "matching drop_matching": 0, "duplicates": 0}
    seen: set[bytes] = set()
    with ArrowWriter(path=str(folder / _ROWS), features=Features(features)) as writer:
        for source in raw.select_columns(list(own.values())):
            row = _uniform({role: source[column] for role, column in own.items()})
            question = [row["prompt"], row["input"], row["messages"], config.format == "text" and row["completion"]]
            digest = text_digest(json.dumps(question))
            if not row["completion"].strip() or not (row["prompt"].strip() or config.format == "text"):
                dropped["empty"] += 1
            elif unwanted and unwanted.search(row["completion"]):
                dropped["matching drop_matching"] += 1
            elif config.drop_duplicates and digest in seen:
                dropped["duplicates"] += 1
            else:
                seen.add(digest)
                writer.write({name: row[name] for name in features})
        writer.finalize()
    (folder / _DROPPED).write_text(json.dumps(dropped), "utf-8")


def _uniform(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the uniform columns.

    `prompt`, `input` and `completion` are text; `messages` ends with the last assistant turn, or is None; `entry` is
    unchanged.
    """
    messages = row.get("messages")
    if messages:
        if missing := {"role", "content"} - messages[0].keys():
            raise DataError(
                f"dataset.messages_column: a message needs role and content; the first has {', '.join(messages[0])}"
                f" and no {' or '.join(sorted(missing))}"
            )
        answers = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        messages = messages[: answers[-1] + 1] if answers else []
        turns = [{"role": message["role"], "content": str(message["content"] or "")} for message in messages]
        return {
            "prompt": turns[-2]["content"] if len(turns) > 1 else "",
            "input": "",
            "completion": turns[-1]["content"] if turns else "",
            "messages": turns,
            "entry": None,
        }
    text = {role: "" if row.get(role) is None else str(row[role]) for role in ("prompt", "input", "completion")}
    return {**text, "input": text["input"].strip(), "messages": None, "entry": row.get("entry")}


def tokenize(rows: Dataset, config: Config, tokenizer: Any) -> Dataset:
    """Return `input_ids` and `labels` of each row, not truncated; labels are -100 where no loss is taken.

    Prompt and completion are tokenized separately, so that the prompt has the same tokens in training as in generation.
    The result is cached: other runs with the same rows, format and tokenizer read it from there.
    """
    learned = [config.training.completion_only_loss, config.training.assistant_only_loss]
    inputs = [fingerprint(rows), config.dataset.format, config.dataset.system_message, learned]
    inputs += [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    folder = built(f"tokens-{json_digest([_LAYOUT, *inputs])}", lambda part: _tokenize(rows, config, tokenizer, part))
    tokens = load_from_disk(str(folder))
    assert isinstance(tokens, Dataset)
    return tokens


def _tokenize(rows: Dataset, config: Config, tokenizer: Any, folder: Path) -> None:
    eos, learn_all = tokenizer.eos_token_id, not config.training.completion_only_loss

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        text = render(row, config.dataset, tokenizer, config.training.assistant_only_loss)
        ids: list[int] = []
        labels: list[int] = []
        prompt_length = 0
        for place, (piece, learned) in enumerate(text.pieces):
            first = place == 0 and not text.has_special_tokens
            tokens = tokenizer(piece, add_special_tokens=first and not learned)["input_ids"]
            if first and len(tokens) > 1 and tokens[-1] == eos:
                tokens = tokens[:-1]  # this tokenizer ends every text with EOS; the prompt must not have it
            prompt_length = len(ids)
            ids += tokens
            labels += tokens if learned or learn_all else [IGNORED] * len(tokens)
        if not text.has_special_tokens:
            ids, labels = [*ids, eos], [*labels, eos]
        bar.update()
        return {"input_ids": ids, "labels": labels, "prompt_length": prompt_length}

    with (
        tqdm(total=len(rows), desc="tokenizing", unit="row", leave=False, disable=None) as bar,
        TemporaryDirectory(prefix="qlora_exp-") as scratch,
    ):
        options: dict[str, Any] = {"load_from_cache_file": False, "cache_file_name": f"{scratch}/tokens.arrow"}
        rows.map(encode, remove_columns=rows.column_names, **options).save_to_disk(str(folder))


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
