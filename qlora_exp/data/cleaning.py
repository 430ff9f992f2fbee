"""Give rows of any source the same columns, and leave out empty, unwanted and repeated ones; each is counted."""

import json
import re
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from lzma import LZMAError
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from qlora_exp.config.sections.dataset import REASONING_GYM, DatasetConfig
from qlora_exp.data import dialogues
from qlora_exp.data.reading import pieces
from qlora_exp.data.reading.readers import Row
from qlora_exp.data.reading.sources import Source
from qlora_exp.data.report import Report, visible
from qlora_exp.data.values import as_text
from qlora_exp.environment.ranks import ranks
from qlora_exp.utils import prompt_templates
from qlora_exp.utils.cache import built
from qlora_exp.utils.digests import json_digest, text_digest
from qlora_exp.utils.errors import DataError, did_you_mean
from qlora_exp.utils.processes.workers import forks, in_order
from qlora_exp.utils.units import MIB

CACHE_LAYOUT = 9  # increase it when cached rows, leaks and tokens of older code must not be used any more
_ROWS, _REPORT = "rows.arrow", "report.json"
_BATCH = 1000
_WORTH_A_PROCESS = 8 * MIB
"""Bytes of files: with fewer, starting a process takes longer than it saves."""
_PAIRS = (("prompt", "completion"), ("question", "answer"), ("prompt", "response"), ("instruction", "response"))
_OPTIONAL = ("input", "system", "history")
"""Roles of columns that a row may lack."""


def clean(source: Source, config: DatasetConfig, path: str) -> tuple[Dataset, Report]:
    """Give rows the columns `prompt`, `input` and `completion`, for dialogues also `messages` and `tools`.

    The result is a file in the cache, so that the rows are never all in memory. `place` says where a row is in its
    source.

    Returns:
        The rows, and what was left out and changed.

    Raises:
        DataError: a column is missing, or a value cannot be learned as it is.
    """
    assert config.format != "auto", "data.reading.recognize settles it before rows are read"
    columns = _columns(config)
    if not source.columns:
        raise DataError(f"{path}: it has no rows")
    if missing := {role: column for role, column in columns.items() if column not in source.columns}:
        if [*missing] == ["input"]:
            raise DataError(
                f"{path}: no column {missing['input']!r} (dataset.input_column), which is added to the prompt; set "
                f"dataset.input_column=null if there is none. It has {', '.join(map(visible, source.columns))}"
            )
        raise DataError(_no_column(path, next(iter(missing.values())), source))
    settings = [columns, config.format, config.drop_matching, config.drop_duplicates, bool(config.system_message)]
    settings += [config.prompt_template] if config.prompt_template else []
    name = f"rows-{json_digest([CACHE_LAYOUT, source.key, *settings])}"
    folder = built(name, lambda part: _Cleaner(source, config, columns, path).write(part))
    report = Report(**json.loads((folder / _REPORT).read_text("utf-8")))
    return decoded(Dataset.from_file(str(folder / _ROWS))), report


def decoded(rows: Dataset) -> Dataset:
    """Return rows whose messages and tools are read from their JSON."""
    return rows.with_transform(_decoded) if "messages" in rows.column_names else rows


def _columns(config: DatasetConfig) -> dict[str, str]:
    """Return the column of the source that each of the uniform columns comes from."""
    if config.format == "text":
        return {"completion": config.text_column}
    more = {"system": config.system_column, "history": config.history_column}
    named_more = {role: column for role, column in more.items() if column}
    if config.messages_column:
        return {"messages": config.messages_column} | named_more
    if config.prompt_template:
        named = prompt_templates.columns(config.prompt_template)
        return {"completion": config.completion_column} | {f"{{{name}}}": name for name in named}
    columns = {"prompt": config.prompt_column, "completion": config.completion_column}
    return columns | ({"input": config.input_column} if config.input_column else {}) | named_more


def _no_column(path: str, missing: str, source: Source) -> str:
    _, first = next(iter(source.rows(source.columns)), ("", {}))
    lists = {name: value for name, value in first.items() if dialogues.is_rows(value)}
    hint = did_you_mean(missing, source.columns)
    if dialogue := next((name for name, value in lists.items() if {"role", "from"} & value[0].keys()), None):
        hint = f"; a dialogue is read with dataset.format=chat dataset.messages_column={dialogue}."
    elif {"instruction", "output"} <= first.keys():
        hint = "; rows of Alpaca's form are read with dataset.format=alpaca and the columns instruction, input, output."
    elif pair := next((pair for pair in _PAIRS if {*pair} <= first.keys()), None):
        hint = f"; are these dataset.prompt_column={pair[0]} dataset.completion_column={pair[1]}?"
    elif set(first) == {"text"}:
        hint = "; plain text is read with dataset.format=text."
    elif lists:
        hint = f". If {next(iter(lists))!r} is the list of rows, write that list alone into the file."
    return (
        f"{path}: no column {missing!r}; it has {', '.join(map(visible, source.columns))}{hint} "
        "Set dataset.prompt_column, dataset.completion_column, ... to yours, or dataset.format=auto"
    )


def _decoded(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Read the JSON of messages and tools; as JSON they keep exactly the keys that each message has."""
    for name in {"messages", "tools"} & batch.keys():
        batch[name] = [None if text is None else json.loads(text) for text in batch[name]]
    return batch


class _Batch(NamedTuple):
    """Consecutive rows with uniform columns."""

    rows: pa.Table
    """Rows that are not left out, unless they are repeated."""
    digests: list[bytes]
    """A digest of what makes each of them a repeated row."""
    report: Report
    """What was left out and changed."""


class _Cleaner:
    """Writes the rows of a source with uniform columns."""

    def __init__(self, source: Source, config: DatasetConfig, columns: dict[str, str], path: str) -> None:
        self._source, self._config, self._columns, self._path = source, config, columns, path
        self._extra = ["entry"] if path.startswith(REASONING_GYM) else []
        if config.format == "chat" and not config.prompt_template:
            self._extra = ["tools"]
        self._unwanted = re.compile(config.drop_matching) if config.drop_matching else None
        self._wanted = [*columns.values(), *self._extra]
        names = ["prompt", "input", "completion", "place"]
        names += ["messages", "tools"] if config.format == "chat" else self._extra
        self._schema = pa.schema({name: pa.string() for name in names})
        self._report = Report()  # of a batch

    def write(self, folder: Path) -> None:
        """Write the rows and the report; long files are shared among processes."""
        files = self._source.files
        processes = forks(sum(file.path.stat().st_size for file in files) // _WORTH_A_PROCESS, ranks().local_size)
        if processes > 1:
            # What one process cannot read or use is read again by this one, which says what it is.
            with suppress(DataError, UnicodeDecodeError, OSError, EOFError, LZMAError, zlib.error, BrokenProcessPool):
                self._write(in_order(self._of_piece, pieces.pieces(files), processes), folder)
                return
        self._write(self._batches(), folder)

    def _of_piece(self, piece: pieces.Piece) -> _Batch:
        several = len(self._source.files) > 1
        rows = pieces.rows(piece)
        return (
            self._cleaned((f"{piece.file.name}, {place}", values) for place, values in rows)
            if several
            else self._cleaned(rows)
        )

    def _batches(self) -> Iterator[_Batch]:
        rows = iter(self._source.rows(self._wanted))
        while (batch := self._cleaned(islice(rows, _BATCH))).report.read:
            yield batch

    def _write(self, batches: Iterable[_Batch], folder: Path) -> None:
        unused = [column for column in self._source.columns if column not in self._wanted]
        report = Report(dropped={"empty": 0, "matching drop_matching": 0, "duplicates": 0}, unused=unused)
        seen: set[bytes] = set()
        features = Features.from_arrow_schema(self._schema)
        with (
            ArrowWriter(path=str(folder / _ROWS), features=features) as writer,
            tqdm(desc="reading", unit="row", leave=False, disable=None) as bar,
        ):
            for rows, digests, found in batches:
                report.add(found)
                bar.update(found.read)
                if self._config.drop_duplicates:
                    keep = []
                    for row, digest in enumerate(digests):
                        keep.append(digest not in seen)
                        seen.add(digest)
                        if not keep[-1]:
                            report.drop("duplicates", rows["place"][row].as_py())
                    rows = rows if all(keep) else rows.filter(pa.array(keep))
                writer.write_table(rows)
            writer.finalize()
        (folder / _REPORT).write_text(json.dumps(asdict(report)), "utf-8")

    def _cleaned(self, rows: Iterable[Row]) -> _Batch:
        """Give rows uniform columns, and leave out those that are not wanted, but not those that are repeated."""
        self._report = report = Report()
        columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        digests = []
        for place, values in rows:
            report.read += 1
            if absent := [
                column for role, column in self._columns.items() if role not in _OPTIONAL and column not in values
            ]:
                has = f"{place}, which has {', '.join(map(visible, values))} and no {absent[0]}"
                report.drop("without the columns", has)
                continue
            row = self._uniform(values, f"{self._path}, {place}") | {"place": place}
            if reason := self._reason(row):
                report.drop(reason, place)
                continue
            digests.append(self._digest(row, f"{self._path}, {place}"))
            for name, column in columns.items():
                column.append(row.get(name))
        return _Batch(pa.table(columns, self._schema), digests, report)

    def _reason(self, row: dict[str, Any]) -> str | None:
        """Return why a row is left out, if not as a repeated one; None if it is not."""
        asked = row["prompt"].strip() or row["input"] or self._config.format == "text"
        if not row["completion"].strip() or not asked:
            return "empty"
        if self._unwanted and self._unwanted.search(row.get("answers", row["completion"])):
            return "matching drop_matching"
        return None

    def _digest(self, row: dict[str, Any], where: str) -> bytes:
        """Return a digest of what makes a row a repeated one."""
        parts = [row["prompt"], row["input"], row.get("messages"), row.get("tools")]
        if self._config.drop_duplicates == "exact" or self._config.format == "text":
            parts.append(row["completion"])
        try:
            row["completion"].encode()
            lengths = [None if part is None else len(part) for part in parts]  # so that no text goes over into the next
            return text_digest("".join([str(lengths), *filter(None, parts)]))
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: half of a surrogate pair cannot be encoded; correct the text") from error

    def _uniform(self, values: dict[str, Any], where: str) -> dict[str, Any]:
        """Return a row as text; messages and tools as JSON."""
        dialogue = self._dialogue(values, where)
        if dialogue is not None:
            return dialogue
        columns = {role: column for role, column in self._columns.items() if role not in ("system", "history")}
        row = {role: self._text(values.get(column), column, where) for role, column in columns.items()}
        if template := self._config.prompt_template:
            texts = {column: row[role] for role, column in self._columns.items() if role != "completion"}
            asks = any(text.strip() for text in texts.values())
            row = {"prompt": prompt_templates.filled(template, texts) if asks else "", "completion": row["completion"]}
        row = {"prompt": "", "input": ""} | row
        if not row["input"].strip():
            row["input"] = ""
        return row | {name: values.get(name) for name in self._extra if name == "entry"}

    def _text(self, value: Any, column: str, where: str) -> str:
        if isinstance(value, str):
            return value
        if dialogues.is_dialogue(value):
            raise DataError(f"{where}: column {column!r} is a list of messages, which needs dataset.format=chat")
        try:
            text = as_text(value)
        except ValueError as error:
            raise DataError(f"{where}: column {column!r}: {error}; write it as text in the file") from error
        if value is not None:
            self._note(f"{column} is not text and is learned as JSON")
        return text

    def _dialogue(self, values: dict[str, Any], where: str) -> dict[str, Any] | None:
        """Return a row with messages; None if it is a prompt and an answer of text."""
        if self._config.format != "chat" or self._config.prompt_template:
            return None
        filled = self._source.fills_with_null
        tools = dialogues.tools(values.get("tools"), where, filled)
        earlier = self._earlier(values, where)
        asked = len(earlier)  # what may be learned stands behind
        if "messages" in self._columns:
            turns = dialogues.messages(values[self._columns["messages"]], self._columns["messages"], where, filled)
        elif (
            tools or earlier or any(dialogues.parsed(values[self._columns[role]]) for role in ("prompt", "completion"))
        ):
            turns, asked = self._joined(values, where)
            asked += len(earlier)
        else:
            return None
        if earlier and turns and turns[0]["role"] in dialogues.SYSTEM_ROLES:
            raise DataError(f"{where}: the messages have a system message, which must be the first of all")
        turns = earlier + turns
        if any(turn.get("train") is False for turn in turns):
            self._note("answers with weight 0 or train false are not learned")
        answers = [index for index, turn in enumerate(turns) if dialogues.learns(turn) and index >= asked]
        last = answers[-1] if answers else -1
        if turns[last + 1 :] and answers:
            self._note("the turns after the last answer are not learned")
        turns = turns[: last + 1]
        if self._config.system_message and turns and turns[0]["role"] in dialogues.SYSTEM_ROLES:
            self._note("dataset.system_message is replaced by the row's own")
        whole = all(turn.get("content") is not None or turn.keys() - {"role", "content", "train"} for turn in turns)
        row = {
            "prompt": dialogues.said(turns[-2]) if whole and len(turns) > 1 else "",
            "input": "",
            "completion": dialogues.said(turns[-1]) if whole and turns else "",
            "answers": "\n".join(dialogues.said(turns[place]) for place in dialogues.learned(turns)),
        }
        try:
            parts = {
                name: json.dumps(part, ensure_ascii=False, allow_nan=False)
                for name, part in (("messages", turns), ("tools", tools))
                if part
            }
        except ValueError as error:
            raise DataError(f"{where}: a number is not finite, which has no form in JSON; correct the file") from error
        return row | parts

    def _earlier(self, values: dict[str, Any], where: str) -> list[dialogues.Message]:
        """Return the messages of the columns of system messages and of earlier turns."""
        turns: list[dialogues.Message] = []
        if (column := self._columns.get("system")) and (text := self._text(values.get(column), column, where)).strip():
            turns.append({"role": "system", "content": text})
        if column := self._columns.get("history"):
            told = dialogues.history(values.get(column), column, where, self._source.fills_with_null)
            if turns and told and told[0]["role"] in dialogues.SYSTEM_ROLES:
                raise DataError(f"{where}: {column!r} begins with a system message, and there is another one")
            turns += told
        return turns

    def _joined(self, values: dict[str, Any], where: str) -> tuple[list[dialogues.Message], int]:
        """Return the messages of a prompt and its answer, each a list of messages, its JSON text, or another text.

        The answer may have several messages, such as calls of tools, what these returned, and a last answer.

        Returns:
            All messages, and how many of them are the prompt.
        """
        turns: list[list[dialogues.Message]] = []
        filled = self._source.fills_with_null
        column = self._columns.get("input")
        context = self._text(values.get(column), column, where) if column else ""
        for column, role in ((self._columns["prompt"], "user"), (self._columns["completion"], "assistant")):
            if dialogues.parsed(values[column]):
                turns.append(dialogues.messages(values[column], column, where, filled))
                if role == "user" and context.strip():
                    raise DataError(f"{where}: an input beside messages has no place; set dataset.input_column=null")
            elif role == "assistant" and values.get("tools") and (calls := dialogues.calls(values[column])):
                self._note("lists of calls are learned as the tool calls of an answer")
                turns.append(dialogues.messages([{"role": role, "tool_calls": calls}], column, where, filled))
            else:
                text = self._text(values[column], column, where)
                if role == "user" and context.strip():
                    text = "\n\n".join(filter(None, [text, context]))
                turns.append([{"role": role, "content": text}])
        asked, answered = turns
        roles = [turn["role"] for turn in answered]
        if roles[0] != "assistant" or {*roles} & {*dialogues.SYSTEM_ROLES}:
            raise DataError(
                f"{where}: column {self._columns['completion']!r} must begin with a message of the assistant, and have "
                "none of the system; write the whole dialogue into one column and name it by dataset.messages_column"
            )
        if len(answered) > 1:
            self._note("all answers of a completion of several messages are learned")
            answered = [turn | {"train": True} if dialogues.learns(turn) else turn for turn in answered]
        return asked + answered, len(asked)

    def _note(self, what: str) -> None:
        self._report.notes[what] = self._report.notes.get(what, 0) + 1
