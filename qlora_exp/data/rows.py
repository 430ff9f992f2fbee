"""Load rows of any source with the same columns, split off held-out rows, and leave out what must not be trained on."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data import leakage
from qlora_exp.data.sources import read
from qlora_exp.libraries.datasets import content_key
from qlora_exp.utils.cache import built
from qlora_exp.utils.digests import json_digest, text_digest
from qlora_exp.utils.errors import DataError

_ROWS, _DROPPED = "rows.arrow", "dropped.json"
CACHE_LAYOUT = 2  # increase it when cached rows and tokens of older code must not be used any more


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
    name = f"rows-{json_digest([CACHE_LAYOUT, content_key(raw), *settings])}"
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
