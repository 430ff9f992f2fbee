"""Load rows of any source with the same columns, split off held-out and validation rows, and leave out leaks."""

import hashlib
import json
import logging
from dataclasses import dataclass, replace

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
    """Rows to evaluate on: the held-out rows or, with `dataset.evaluate_on=validation`, the validation rows."""
    report: Report
    """What was left out, of all."""
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

    Training and validation rows that give a held-out row away are left out, as `dataset.drop_leaks` says, and so are
    training rows that give a validation row away. The training rows do not depend on `dataset.evaluate_on`.

    Raises:
        DataError: the source or a column does not exist, or no rows are left.
    """
    train, validation, heldout, report = _split(config)
    leaks = leakage.find(train, heldout, config.leak_threshold)
    if len(validation):
        for parts, (rows, given_away) in {
            "validation, held-out": (validation, heldout),
            "training, validation": (train, validation),
        }.items():
            leaks += [replace(leak, parts=parts) for leak in leakage.find(rows, given_away, config.leak_threshold)]
    report.dropped["leaks"] = 0
    if config.drop_leaks != "none":
        dropped = [leak for leak in leaks if leak.kind == "exact" or config.drop_leaks == "near"]
        train = _without(train, {leak.train for leak in dropped if leak.parts.startswith("training")}, report)
        validation = _without(
            validation, {leak.train for leak in dropped if leak.parts.startswith("validation")}, report
        )
    train = _first(train, config.max_train_rows)
    evaluated = validation if config.evaluate_on == "validation" else heldout
    if not len(train) or not len(evaluated):
        raise DataError(f"{config.path}: no rows are left for training or for evaluation: {report.why()}")
    return Rows(train, _first(evaluated, config.max_eval_rows), report, leaks)


def _without(rows: Dataset, leaking: set[int], report: Report) -> Dataset:
    """Leave out rows with these indices, and count them."""
    report.dropped["leaks"] += len(leaking)
    if leaking:
        report.examples.setdefault("leaks", rows[min(leaking)]["place"])
    return _pick(rows, [index for index in range(len(rows)) if index not in leaking])


def load_heldout(config: DatasetConfig) -> Dataset:
    """Return the held-out rows only, and log what was left out.

    Raises:
        DataError: the source or a column does not exist, or no rows are left.
    """
    _, _, heldout, report = _split(config)
    if not len(heldout):
        raise DataError(f"{config.path}: no held-out rows are left: {report.why()}")
    for level, line in report.lines(config.name):
        log.log(level, "%s", line)
    return heldout


def _split(config: DatasetConfig) -> tuple[Dataset, Dataset, Dataset, Report]:
    """Return training, validation and held-out rows (these up to their limit), and what was left out of all."""
    rows, report = clean(read(config, config.path, config.split), config, config.path)
    shuffled = order(len(rows), config.split_seed)
    if config.eval_path or config.eval_split:
        path = config.eval_path or config.path
        heldout, heldout_report = clean(read(config, path, config.eval_split or config.split), config, path)
        report = report.plus(heldout_report)
    else:
        count = _count("eval_size", config.eval_size, len(rows), report)
        heldout, shuffled = _pick(rows, shuffled[:count]), shuffled[count:]
    count = 0
    if config.validation_size is not None:
        count = _count("validation_size", config.validation_size, len(shuffled), report)
        use = "the held-out rows of this run" if config.evaluate_on else "not used in this run"
        log.info("%s: %d rows are for validation: %s", config.name, count, use)
    heldout = _first(heldout, config.max_eval_rows)
    return _pick(rows, shuffled[count:]), _pick(rows, shuffled[:count]), heldout, report


def _count(key: str, size: float, available: int, report: Report) -> int:
    """Return how many rows to split off."""
    if available < 2 or (isinstance(size, int) and size >= available):
        raise DataError(f"dataset.{key}={size}: only {available} rows to split, too few: {report.why()}")
    return max(1, round(size * available)) if size < 1 else int(size)


def order(count: int, seed: int) -> list[int]:
    """Return a random order of `count` rows, the same that `datasets` produces with this random seed."""
    return np.random.default_rng(seed).permutation(count).tolist()


def _pick(rows: Dataset, chosen: list[int]) -> Dataset:
    """Select rows, with their indices in memory: `datasets` would write these to the cache, next to the rows."""
    return rows.select(chosen, keep_in_memory=True)


def _first(rows: Dataset, limit: int | None) -> Dataset:
    return rows.select(range(min(limit, len(rows)))) if limit else rows
