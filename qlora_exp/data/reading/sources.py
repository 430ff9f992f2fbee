"""Read rows from their source: the built-in FAQ, Python's documentation, reasoning-gym tasks, files, the hub.

Rows keep the columns of their source; `data.cleaning` makes the columns uniform.
"""

import importlib.util
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from tqdm import tqdm

from qlora_exp.config.sections.dataset import REASONING_GYM, DatasetConfig, looks_local, saved_dataset
from qlora_exp.data.reading import readers
from qlora_exp.data.reading.readers import Row
from qlora_exp.data.scoring import Scorer, is_possible
from qlora_exp.environment import data_files
from qlora_exp.environment.data_files import File
from qlora_exp.libraries.datasets import content_key
from qlora_exp.utils.digests import file_digest, json_digest
from qlora_exp.utils.errors import DataError, did_you_mean, last_line

log = logging.getLogger(__name__)

FAQ = "embedded:construction_faq"
PYTHON_DOCS = "embedded:python_docs"


@dataclass(frozen=True)
class Source:
    """Rows with the columns of their source."""

    columns: list[str]
    """Names of the columns; of a JSON file, those of its first rows."""
    key: str
    """Digest of the content."""
    rows: Callable[[Collection[str]], Iterable[Row]]
    """Reads the rows, each with its place in the source; values of columns other than the given ones may be missing."""
    files: Sequence[File] = ()
    """Files of JSON lines that the rows are in, if several processes may read them (`pieces`)."""
    fills_with_null: bool = False
    """Whether all dictionaries in a column have the same keys, with null for what a dictionary does not have."""


def read(config: DatasetConfig, path: str, split: str) -> Source:
    """Find the rows of `path`.

    Raises:
        DataError: the rows cannot be found, fetched or read.
    """
    if path == FAQ:
        return _files([_faq_file()])
    if path.startswith(REASONING_GYM):
        return _listed(_generate(path.removeprefix(REASONING_GYM), config))
    if path == PYTHON_DOCS:
        return _listed(_python_docs())
    if path.startswith("embedded:"):
        raise DataError(f"dataset.path: there is no '{path}'{did_you_mean(path, [FAQ, PYTHON_DOCS])}")
    if saved_dataset(path):
        return _saved(path, split)
    if looks_local(path):
        source = _files(data_files.find(path))
        return _beginning(source, config) if config.streaming else source
    try:
        rows = load_dataset(path, config.subset, split=split, revision=config.revision, streaming=config.streaming)
        return _listed(_first(rows, config)) if isinstance(rows, IterableDataset) else _dataset(rows)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"dataset.path: '{path}' is not a file, and cannot be fetched from the hub; check the name and the network "
            f"({last_line(error)})"
        ) from error
    except ValueError as error:  # an unknown split or configuration
        raise DataError(f"{path}: {last_line(error)}") from error


def _files(found: list[File]) -> Source:
    tables = {file.format in ("parquet", "arrow"): file.name for file in found}
    if len(tables) > 1:
        raise DataError(
            f"dataset.path: {tables[True]} has columns with types and {tables[False]} has not; name files of one kind "
            "by a pattern, such as rows/*.jsonl"
        )
    digests = {file.name: file_digest(file.path) for file in found}
    return Source(
        list(dict.fromkeys(name for file in found for name in readers.columns(file))),
        json_digest(list(digests.values())) if len(found) > 1 else digests[found[0].name],
        lambda wanted: _rows_of(found, wanted),
        files=found if all(file.format == "json" for file in found) else (),
        fills_with_null=True in tables,
    )


def _rows_of(found: list[File], wanted: Collection[str]) -> Iterator[Row]:
    for file in found:
        for place, row in readers.rows(file, wanted):
            yield f"{file.name}, {place}" if len(found) > 1 else place, row


def _beginning(source: Source, config: DatasetConfig) -> Source:
    """Return the first rows of a source as a source, as many as a run can need."""
    count = _needed(config)
    return replace(
        source, files=(), key=json_digest([source.key, count]), rows=lambda wanted: islice(source.rows(wanted), count)
    )


def _saved(path: str, split: str) -> Source:
    """Return the rows of a folder that `save_to_disk` of `datasets` wrote."""
    try:
        saved = load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"dataset.path: {path} cannot be read as a saved dataset: {last_line(error)}") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise DataError(f"dataset.split: {path} has no split '{split}'; it has {', '.join(map(str, saved))}")
        saved = saved[split]
    return replace(_dataset(saved), key=json_digest([data_files.folder_digest(Path(path)), split]))


def _listed(rows: list[dict[str, Any]]) -> Source:
    """Return rows that are in memory, as few as they are, as a source."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Source(columns, json_digest(rows), lambda _: _numbered(rows), fills_with_null=True)


def _dataset(rows: Dataset) -> Source:
    return Source(
        rows.column_names,
        content_key(rows),
        lambda wanted: _numbered(rows.select_columns([name for name in rows.column_names if name in wanted])),
        fills_with_null=True,
    )


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _first(rows: IterableDataset, config: DatasetConfig) -> list[dict[str, Any]]:
    count = _needed(config)
    return list(tqdm(rows.take(count), total=count, desc="fetching", unit="row", disable=None))


def _needed(config: DatasetConfig) -> int:
    """Return how many rows a run can need, and half as many again for those that will be left out."""
    return round(1.5 * ((config.max_train_rows or 0) + config.eval_size + (config.validation_size or 0)))


def _faq_file() -> File:
    spec = importlib.util.find_spec("zaragoza_construction_faq")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{FAQ} needs a package that is not installed: pip install 'qlora-exp[embedded]'")
    file = Path(spec.submodule_search_locations[0]) / "data" / "faq-en-alpaca.jsonl"
    return File(file, str(file))


def _python_docs() -> list[dict[str, Any]]:
    """Return passages of complete paragraphs, about 1000 characters each, of Python's own language reference."""
    from pydoc_data.topics import topics

    passages = []
    for topic in sorted(topics):
        passage = ""
        for paragraph in topics[topic].split("\n\n"):
            passage += f"{paragraph.strip()}\n\n"
            if len(passage) >= 1000:
                passages.append(passage.strip())
                passage = ""
    return [{"text": passage} for passage in passages]


def _gym(task: str) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f"{REASONING_GYM}{task} needs a package that is not installed: pip install 'qlora-exp[tasks]'"
        ) from error
    if task not in DATASETS:
        raise DataError(f"dataset.path: reasoning-gym has no task '{task}'{did_you_mean(task, DATASETS)}")
    return reasoning_gym


def _generate(task: str, config: DatasetConfig) -> list[dict[str, Any]]:
    try:
        entries = _gym(task).create_dataset(
            task, size=config.reasoning_gym_size, seed=config.split_seed, **config.reasoning_gym_config
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise DataError(f"dataset.reasoning_gym_config: {error}") from error
    return [
        {
            "question": entry["question"],
            "answer": None if entry["answer"] is None else str(entry["answer"]),
            "entry": json.dumps(entry, default=str),
        }
        for entry in entries
    ]


def scorer(config: DatasetConfig) -> Scorer | None:
    """Return the dataset's own exact scorer, `(answer, row) -> 0..1`; None if it has none, or cannot run it safely."""
    generated = [part for part in config.parts.values() if part.path.startswith(REASONING_GYM)]
    if len(config.parts) > 1 and generated:
        log.warning("%s: answers get no task_score, as there are rows of other sources", generated[0].name)
    if len(config.parts) > 1 or not generated:
        return None
    (config,) = generated
    if not is_possible():
        log.warning("%s: answers get no task_score; scoring them safely needs Linux on x86_64 or aarch64", config.path)
        return None
    task = config.path.removeprefix(REASONING_GYM)
    _gym(task)
    return Scorer(task, config.reasoning_gym_config)
