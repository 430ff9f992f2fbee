"""Load rows of any source with the same columns, split off held-out rows, and leave out what must not be trained on."""

import hashlib
import json
import logging
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data import leakage
from qlora_exp.data.cleaning import Report, clean
from qlora_exp.data.sources import read
from qlora_exp.utils.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Training and held-out rows, with the columns `prompt`, `input`, `completion`, `place` in their source, and more.

    Rows of dialogues have `messages` and `tools`, tasks of reasoning-gym `entry`.
    """

    train: Dataset
    heldout: Dataset
    report: Report
    """What was left out, of both."""
    leaks: list[leakage.Leak]
    """Pairs of a training row and a held-out row that it gives away, before any row was left out."""

    @property
    def dropped(self) -> dict[str, int]:
        """Number of rows left out, by reason."""
        return self.report.dropped


def fingerprint(rows: Dataset) -> str:
    """Return a digest of all rows, which depends on their order, but not on where they come from."""
    digest = hashlib.sha256()
    for row in rows:
        values = {name: value for name, value in row.items() if name != "place" and value is not None}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode() + b"\0")
    return digest.hexdigest()[:16]


def load_rows(config: DatasetConfig) -> Rows:
    """Read, clean, split and limit the rows.

    Training rows that give a held-out row away are left out, as `dataset.drop_leaks` says.

    Raises:
        DataError: the source or a column does not exist, or no rows are left.
    """
    train, heldout, report = _split(config)
    leaks = leakage.find(train, heldout, config.leak_threshold)
    report.dropped["leaks"] = 0
    if config.drop_leaks != "none":
        leaking = {leak.train for leak in leaks if leak.kind == "exact" or config.drop_leaks == "near"}
        report.dropped["leaks"] = len(leaking)
        if leaking:
            report.examples["leaks"] = train[min(leaking)]["place"]
        train = _pick(train, [index for index in range(len(train)) if index not in leaking])
    train = _first(train, config.max_train_rows)
    if not len(train) or not len(heldout):
        raise DataError(f"{config.path}: no rows are left for training or for evaluation: {report.why()}")
    return Rows(train, heldout, report, leaks)


def load_heldout(config: DatasetConfig) -> Dataset:
    """Return the held-out rows only, and log what was left out.

    Raises:
        DataError: the source or a column does not exist, or no rows are left.
    """
    _, heldout, report = _split(config)
    if not len(heldout):
        raise DataError(f"{config.path}: no held-out rows are left: {report.why()}")
    for level, line in report.lines(config.name):
        log.log(level, "%s", line)
    return heldout


def _split(config: DatasetConfig) -> tuple[Dataset, Dataset, Report]:
    """Return the training rows, the held-out rows up to their limit, and what was left out of both."""
    rows, report = clean(read(config, config.path, config.split), config, config.path)
    if config.eval_path or config.eval_split:
        path = config.eval_path or config.path
        heldout, heldout_report = clean(read(config, path, config.eval_split or config.split), config, path)
        report = report.plus(heldout_report)
        train = _pick(rows, order(len(rows), config.split_seed))
    else:
        size = config.eval_size
        if len(rows) < 2 or (isinstance(size, int) and size >= len(rows)):
            raise DataError(f"dataset.eval_size={size}: only {len(rows)} rows to split, too few: {report.why()}")
        count = max(1, round(size * len(rows))) if size < 1 else int(size)
        shuffled = order(len(rows), config.split_seed)
        heldout, train = _pick(rows, shuffled[:count]), _pick(rows, shuffled[count:])
    return train, _first(heldout, config.max_eval_rows), report


def order(count: int, seed: int) -> list[int]:
    """Return a random order of `count` rows, the same that `datasets` produces with this random seed."""
    return np.random.default_rng(seed).permutation(count).tolist()


def _pick(rows: Dataset, chosen: list[int]) -> Dataset:
    """Select rows, with their indices in memory: `datasets` would write these to the cache, next to the rows."""
    return rows.select(chosen, keep_in_memory=True)


def _first(rows: Dataset, limit: int | None) -> Dataset:
    return rows.select(range(min(limit, len(rows)))) if limit else rows
