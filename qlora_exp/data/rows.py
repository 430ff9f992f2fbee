"""Load rows with the same columns, split off held-out and validation rows, leave out leaks, and mix several sources.

Each source is split apart, so that its held-out rows are the same whatever it is mixed with. Leaks and repeated rows
are looked for among all.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from datasets import Dataset, concatenate_datasets

from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.config.sections.mixture import REPLAY, MixtureConfig, of_source
from qlora_exp.data import leakage, mixture
from qlora_exp.data.cleaning import clean, decoded
from qlora_exp.data.columns import Row, mapped
from qlora_exp.data.reading.sources import read
from qlora_exp.data.report import Report
from qlora_exp.utils.digests import text_digest
from qlora_exp.utils.errors import DataError

log = logging.getLogger(__name__)

SOURCE = "source"
"""Column with the name of a row's source, where there are several."""


@dataclass(frozen=True)
class Rows:
    """Training and held-out rows, with the columns `prompt`, `input`, `completion`, `place` in their source, and more.

    Rows of dialogues have `messages` and `tools`, tasks of reasoning-gym `entry`, rows of several sources `source`.
    """

    train: Dataset
    """Training rows, each once."""
    heldout: Dataset
    """Rows to evaluate on: the held-out rows or, with `dataset.evaluate_on=validation`, the validation rows."""
    report: Report
    """What was left out, of all."""
    leaks: list[leakage.Leak]
    """Pairs of a training row and a held-out row that it gives away, before any row was left out."""
    order: np.ndarray | None = None
    """The rows of an epoch as indices of `train`, which may repeat; None: all rows as they are."""
    portions: dict[str, mixture.Portion] = field(default_factory=dict)
    """How much of each source is trained on; empty if there is one."""

    @property
    def dropped(self) -> dict[str, int]:
        """Number of rows left out, by reason."""
        return self.report.dropped

    def epoch(self, train: Dataset) -> Dataset:
        """Return the rows of an epoch: of `self.train`, or of tokens of these rows."""
        return train if self.order is None else _pick(train, self.order.tolist())


class _Split(NamedTuple):
    """Rows by what they are for, and what was left out of all."""

    train: Dataset
    validation: Dataset
    heldout: Dataset
    report: Report


def fingerprint(rows: Dataset) -> str:
    """Return a digest of all rows, which depends on their order, but not on where they come from."""
    if (known := _fingerprints.get(rows)) is None:
        digest = hashlib.sha256()
        for text in mapped(_as_json, rows, "taking the fingerprint"):
            digest.update(text)
        known = _fingerprints[rows] = digest.hexdigest()[:16]
    return known


_fingerprints: WeakKeyDictionary[Dataset, str] = WeakKeyDictionary()  # a dataset does not change
_encode = json.JSONEncoder(sort_keys=True, default=str).encode


def _as_json(rows: list[Row]) -> bytes:
    texts = []
    for row in rows:
        values = {name: value for name, value in row.items() if name not in ("place", SOURCE) and value is not None}
        texts.append(f"{_encode(values)}\0")
    return "".join(texts).encode()


def sources_of(rows: Dataset) -> list[str]:
    """Return the source of each row; empty if all have the same."""
    sources: list[str] = rows.with_format(None)[SOURCE][:] if SOURCE in rows.column_names else []
    return sources if len({*sources}) > 1 else []


def load_rows(config: DatasetConfig, general: DatasetConfig | None = None) -> Rows:
    """Read, clean, split, limit and mix the rows.

    Training and validation rows that give a held-out row away are left out, as `dataset.drop_leaks` says, and so are
    training rows that give a validation row or a held-out row of general text away. The training rows do not depend on
    `dataset.evaluate_on`.

    Args:
        config: section `dataset`.
        general: section `unrelated`: text that `dataset.replay` takes rows of. None: there is none.

    Raises:
        DataError: a source or a column does not exist, or no rows are left.
    """
    parts = config.parts
    if isinstance(config, MixtureConfig) and config.replay and general is not None:
        parts[REPLAY] = general
    train, validation, heldout, report = _split_all(parts)
    leaks = leakage.find(train, heldout, config.leak_threshold)
    others = [("validation, held-out", validation, heldout), ("training, validation", train, validation)]
    others = others if len(validation) else []
    if general is not None and general.paths and any(part.format == general.format for part in parts.values()):
        others.append(("training, unrelated", train, _in_source(general, REPLAY, None).heldout))
    for pair, rows, given_away in others:
        leaks += [replace(leak, parts=pair) for leak in leakage.find(rows, given_away, config.leak_threshold)]
    report.dropped["leaks"] = 0
    if config.drop_leaks != "none":
        dropped = [leak for leak in leaks if leak.kind == "exact" or config.drop_leaks == "near"]
        train = _without(train, {leak.train for leak in dropped if leak.parts.startswith("training")}, report)
        validation = _without(
            validation, {leak.train for leak in dropped if leak.parts.startswith("validation")}, report
        )
    evaluated = validation if config.evaluate_on == "validation" else heldout
    if isinstance(config, MixtureConfig) and len(parts) > 1:
        train = _without(train, _repeated(train, parts), report, "duplicates")
        return _mixed(Rows(train, evaluated, report, leaks), parts, config)
    (part,) = parts.values()
    train = _first(train, part.max_train_rows)
    if not len(train) or not len(evaluated):
        raise DataError(f"{part.path}: no rows are left for training or for evaluation: {report.why()}")
    return Rows(train, _first(evaluated, part.max_eval_rows), report, leaks)


def _without(rows: Dataset, unwanted: set[int], report: Report, reason: str = "leaks") -> Dataset:
    """Leave out rows with these indices, and count them."""
    report.dropped[reason] = report.dropped.get(reason, 0) + len(unwanted)
    if unwanted:
        first = rows[min(unwanted)]
        report.examples.setdefault(reason, ", ".join(filter(None, [first.get(SOURCE), first["place"]])))
    return _pick(rows, [index for index in range(len(rows)) if index not in unwanted])


def load_heldout(config: DatasetConfig) -> Dataset:
    """Return the held-out rows of section `unrelated`, and log what was left out.

    Raises:
        DataError: the source or a column does not exist, or no rows are left.
    """
    _, _, heldout, report = _in_source(config, REPLAY, None)
    if not len(heldout):
        raise DataError(f"{config.path}: no held-out rows are left: {report.why()}")
    for level, line in report.lines(f"{config.name} (unrelated text)"):
        log.log(level, "%s", line)
    return heldout


def _split_all(parts: Mapping[str, DatasetConfig]) -> _Split:
    """Split each dataset apart, and return the rows of all, one after another."""
    if len(parts) == 1:
        ((name, part),) = parts.items()
        return _in_source(part, name, None)
    splits = {name: _in_source(part, name, name) for name, part in parts.items()}
    if (replayed := splits.get(REPLAY)) is not None:  # what is held out of general text measures forgetting
        none = _pick(replayed.heldout, [])
        splits[REPLAY] = _Split(replayed.train, none, none, Report())
    report = Report()
    for split in splits.values():
        report = report.plus(split.report)
    trains, validations, heldouts, _ = zip(*splits.values(), strict=True)
    return _Split(_joined(trains), _joined(validations), _joined(heldouts), report)


def _in_source(part: DatasetConfig, name: str, marked: str | None) -> _Split:
    try:
        return _split(part, marked)
    except DataError as error:
        raise DataError(of_source(str(error), name)) from error


def _joined(parts: Iterable[Dataset]) -> Dataset:
    return decoded(concatenate_datasets([part.with_format(None) for part in parts]))


def _split(config: DatasetConfig, source: str | None = None) -> _Split:
    """Read a dataset and split it; the held-out rows up to their limit. `source` is its name among several."""
    rows, report = _cleaned(config, config.path, config.split, source)
    shuffled = order(len(rows), config.split_seed)

    if config.eval_path or config.eval_split:
        path = config.eval_path or config.path
        try:
            heldout, heldout_report = _cleaned(config, path, config.eval_split or config.split, source)
        except DataError as error:
            key = "path" if config.eval_path else "split"
            raise DataError(re.sub(rf"^dataset\.{key}:", f"dataset.eval_{key}:", str(error))) from error
        report = report.plus(heldout_report)
    else:
        count = _count("dataset.eval_size", config.eval_size, len(rows), report)
        heldout, shuffled = _pick(rows, shuffled[:count]), shuffled[count:]
    count = 0
    if config.validation_size is not None:
        count = _count("dataset.validation_size", config.validation_size, len(shuffled), report)
        use = "the held-out rows of this run" if config.evaluate_on else "not used in this run"
        log.info("%s: %d rows are for validation: %s", config.name, count, use)
    heldout = _first(heldout, config.max_eval_rows)
    return _Split(_pick(rows, shuffled[count:]), _pick(rows, shuffled[:count]), heldout, report)


def _cleaned(config: DatasetConfig, path: str, split: str, source: str | None) -> tuple[Dataset, Report]:
    """Return the clean rows of a path, with a column that names their source if there are several."""
    rows, report = clean(read(config, path, split), config, path)
    if source is None:
        return rows, report
    report.examples = {reason: f"{source}, {place}" for reason, place in report.examples.items()}
    report.unused = [f"{source}.{column}" for column in report.unused]
    return rows.with_format(None).add_column(SOURCE, [source] * len(rows)), report


def _repeated(train: Dataset, parts: Mapping[str, DatasetConfig]) -> set[int]:
    """Return the rows that another source before has, if their own source leaves repeated rows out."""
    seen: set[bytes] = set()
    repeated = set()
    asked_in = [name for name in ("prompt", "input", "messages", "tools") if name in train.column_names]
    batches = train.with_format(None).iter(batch_size=1000)  # row by row takes twice as long
    rows = (row for batch in batches for row in zip(*map(batch.get, [SOURCE, "completion", *asked_in]), strict=True))
    for index, (source, completion, *turns) in enumerate(rows):
        asked = json.dumps([*filter(None, turns)])
        part, question, whole = parts[source], text_digest(asked), text_digest(json.dumps([asked, completion]))
        by_question = part.drop_duplicates is True and part.format != "text"
        if part.drop_duplicates and (question if by_question else whole) in seen:
            repeated.add(index)
        seen |= {question, whole}
    return repeated


def _mixed(rows: Rows, parts: Mapping[str, DatasetConfig], config: MixtureConfig) -> Rows:
    """Limit the rows of each source, and mix them.

    Raises:
        DataError: no rows of a source are left.
    """
    train = {name: found[: parts[name].max_train_rows] for name, found in _by_source(rows.train, parts).items()}
    heldout = {name: found[: parts[name].max_eval_rows] for name, found in _by_source(rows.heldout, parts).items()}
    for name in parts:
        if not len(train[name]) or not (len(heldout[name]) or name == REPLAY):
            why = f"are left for training or for evaluation: {rows.report.why()}"
            raise DataError(f"dataset.sources: no rows of {name} {why}")
    sizes = {name: len(found) for name, found in train.items()}
    trained = mixture.counts(sizes, config)
    train = {name: found[: trained[name]] for name, found in train.items()}  # the others are in no epoch
    return replace(
        rows,
        train=_pick(rows.train, np.concatenate([*train.values()]).tolist()),
        heldout=_pick(
            rows.heldout, np.concatenate([*heldout.values()])[mixture.evenly([*map(len, heldout.values())])].tolist()
        ),
        order=mixture.epoch([*map(len, train.values())], [trained[name] for name in train]),
        portions={name: mixture.Portion(sizes[name], trained[name], len(heldout[name])) for name in sizes},
    )


def _by_source(rows: Dataset, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the indices of the rows of each source."""
    sources = np.array(rows.with_format(None)[SOURCE][:], dtype=object)
    return {name: np.flatnonzero(sources == name) for name in names}


def _count(key: str, size: float, available: int, report: Report) -> int:
    """Return how many rows to split off."""
    if available < 2 or (isinstance(size, int) and size >= available):
        raise DataError(f"{key}={size}: only {available} rows to split, too few: {report.why()}")
    return max(1, round(size * available)) if size < 1 else int(size)


def order(count: int, seed: int) -> list[int]:
    """Return a random order of `count` rows, the same that `datasets` produces with this random seed."""
    return np.random.default_rng(seed).permutation(count).tolist()


def _pick(rows: Dataset, chosen: list[int]) -> Dataset:
    """Select rows, with their indices in memory: `datasets` would write these to the cache, next to the rows."""
    return rows.select(chosen, keep_in_memory=True)


def _first(rows: Dataset, limit: int | None) -> Dataset:
    return rows.select(range(min(limit, len(rows)))) if limit else rows
