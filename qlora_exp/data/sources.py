"""Read rows from their source: the built-in FAQ, Python's documentation, reasoning-gym tasks, files, the hub.

Rows keep the columns of their source; `data.rows` makes the columns uniform.
"""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from tqdm import tqdm

from qlora_exp.config.sections.dataset import FILE_FORMATS, REASONING_GYM, DatasetConfig
from qlora_exp.data.scoring import Scorer, is_possible
from qlora_exp.utils.errors import DataError, did_you_mean, last_line

log = logging.getLogger(__name__)

FAQ = "embedded:construction_faq"
PYTHON_DOCS = "embedded:python_docs"


def read(config: DatasetConfig, path: str, split: str) -> Dataset:
    """Return the rows of `path`, with the columns of their source.

    Raises:
        DataError: the rows cannot be found, fetched or read.
    """
    if path == FAQ:
        return _read_file(_faq_file())
    if path.startswith(REASONING_GYM):
        return _generate(path.removeprefix(REASONING_GYM), config)
    if path == PYTHON_DOCS:
        return _python_docs()
    if path.startswith("embedded:"):
        raise DataError(f"dataset.path: there is no '{path}'{did_you_mean(path, [FAQ, PYTHON_DOCS])}")
    if Path(path).suffix in FILE_FORMATS or Path(path).exists():
        return _read_file(Path(path))
    try:
        rows = load_dataset(path, config.subset, split=split, revision=config.revision, streaming=config.streaming)
        return _fetch_first(rows, config) if isinstance(rows, IterableDataset) else rows
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"dataset.path: '{path}' is not a file, and cannot be fetched from the hub; check the name and the network "
            f"({last_line(error)})"
        ) from error
    except ValueError as error:  # an unknown split or configuration
        raise DataError(f"{path}: {last_line(error)}") from error


def _fetch_first(rows: IterableDataset, config: DatasetConfig) -> Dataset:
    """Fetch the first rows: as many as a run can need, and half as many again for those that will be left out."""
    count = round(1.5 * ((config.max_train_rows or 0) + config.eval_size))
    return Dataset.from_list(list(tqdm(rows.take(count), total=count, desc="fetching", unit="row", disable=None)))


def _read_file(file: Path) -> Dataset:
    if not file.is_file():
        raise DataError(f"dataset.path: there is no file {file}")
    if file.suffix not in FILE_FORMATS:
        raise DataError(f"{file}: unknown file format; use one of {', '.join(FILE_FORMATS)}")
    if not file.stat().st_size:
        raise DataError(f"{file}: the file is empty")
    try:
        return load_dataset(FILE_FORMATS[file.suffix], data_files=str(file), split="train")
    except Exception as error:  # readers of different formats raise different errors for a damaged file
        raise DataError(
            f"{file}: cannot be read as {FILE_FORMATS[file.suffix]}: {last_line(error.__cause__ or error)}"
        ) from error


def _faq_file() -> Path:
    spec = importlib.util.find_spec("zaragoza_construction_faq")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{FAQ} needs a package that is not installed: pip install 'qlora-exp[embedded]'")
    return Path(spec.submodule_search_locations[0]) / "data" / "faq-en-alpaca.jsonl"


def _python_docs() -> Dataset:
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
    return Dataset.from_dict({"text": passages})


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


def _generate(task: str, config: DatasetConfig) -> Dataset:
    try:
        entries = _gym(task).create_dataset(
            task, size=config.reasoning_gym_size, seed=config.split_seed, **config.reasoning_gym_config
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise DataError(f"dataset.reasoning_gym_config: {error}") from error
    rows = [
        {
            "question": entry["question"],
            "answer": str(entry["answer"]),
            "entry": json.dumps(entry, default=str),
        }
        for entry in entries
        if entry["answer"] is not None
    ]
    return Dataset.from_list(rows)


def scorer(config: DatasetConfig) -> Scorer | None:
    """Return the dataset's own exact scorer, `(answer, row) -> 0..1`; None if it has none, or cannot run it safely."""
    if not config.path.startswith(REASONING_GYM):
        return None
    if not is_possible():
        log.warning("%s: answers get no task_score; scoring them safely needs Linux on x86_64 or aarch64", config.path)
        return None
    task = config.path.removeprefix(REASONING_GYM)
    _gym(task)
    return Scorer(task, config.reasoning_gym_config)
