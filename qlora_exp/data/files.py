"""Read files of rows as they are written: JSON (a row in each line, or one list of rows), CSV and Parquet.

Nothing is guessed: a cell of a CSV file is text, a number of a JSON file keeps its digits. Rows are read one by one.
"""

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from qlora_exp.config.sections.dataset import FILE_FORMATS, file_format
from qlora_exp.data.values import DECODER
from qlora_exp.utils.errors import DataError, last_line

Row = tuple[str, dict[str, Any]]
"""Place of a row in its source, such as `line 3`, and its values by column."""

_PACKED = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".zip": "unzip", ".tar": "tar xf"}
_SPACE = re.compile(r"[ \t\r\n]*")
_PIECE = 1 << 20
_LONGEST_WORD = 16
"""Number of characters of JSON's longest word, -Infinity, and some more."""
_FIRST_ROWS = 1000


def looks_local(path: str) -> bool:
    """Return whether `path` names a file or a folder, and not a dataset on the hub."""
    suffix = Path(path).suffix.lower()
    return suffix in {*FILE_FORMATS, *_PACKED} or Path(path).exists() or any(sign in path for sign in "*?[,")


def check(path: str, key: str = "dataset.path") -> None:
    """Check that `path` is a file of rows.

    Raises:
        DataError: it is not; the message says what to do.
    """
    file = Path(path)
    if file.is_dir():
        raise DataError(f"{key}: {path} is a folder; name one file, or join its files: cat {path}/*.jsonl > rows.jsonl")
    if (suffix := file.suffix.lower()) in _PACKED:
        raise DataError(f"{key}: {path} is packed; unpack it first: {_PACKED[suffix]} {path}")
    if not file.is_file() and any(sign in path for sign in "*?[,"):
        raise DataError(f"{key}: {path} is no file; several files must be joined first: cat FILES > rows.jsonl")
    if not file.is_file():
        raise DataError(f"{key}: no file {path} (working directory: {Path.cwd()})")
    if file_format(file) is None:
        raise DataError(f"{path}: unknown file format; use one of {', '.join(FILE_FORMATS)}")
    try:
        with file.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if empty:
        raise DataError(f"{path}: the file is empty")


def columns(file: Path) -> list[str]:
    """Return the names of a file's columns; of a JSON file, those of its first rows.

    Raises:
        DataError: the file is damaged.
    """
    if file_format(file) == "parquet":
        return list(_parquet_file(file).schema_arrow.names)
    return list(dict.fromkeys(name for _, row in islice(rows(file), _FIRST_ROWS) for name in row))


def rows(file: Path, wanted: Collection[str] | None = None) -> Iterator[Row]:
    """Yield each row with its place in the file.

    Args:
        file: a file that `check` accepts.
        wanted: columns to read, where this saves time.

    Raises:
        DataError: the file is damaged, or is not encoded in UTF-8.
    """
    if file_format(file) == "parquet":
        yield from _parquet_rows(file, wanted)
        return
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            yield from (_json_rows if file_format(file) == "json" else _csv_rows)(stream, file)
    except UnicodeDecodeError as error:
        raise _not_utf8(file) from error


def _not_utf8(file: Path) -> DataError:
    with file.open("rb") as stream:
        begin = stream.read(4)
        encoding = "UTF-16" if begin[:2] in (b"\xff\xfe", b"\xfe\xff") or 0 in begin else "WINDOWS-1252"
        stream.seek(0)
        number = next(number for number, line in enumerate(stream, 1) if not _is_utf8(line))
    return DataError(
        f"{file}, line {number}: the text is not UTF-8; convert the file, for example: "
        f"iconv -f {encoding} -t UTF-8 {file} > utf8{file.suffix}"
    )


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


# JSON


class _JsonReader:
    """Values of a JSON text, which is read in pieces: values one after another, or the elements of one list."""

    def __init__(self, stream: TextIO, file: Path) -> None:
        self._stream, self._file = stream, file
        self._text, self._at, self._line = "", 0, 1

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Yield each value with the line that it begins in."""
        listed = self._next() == "["
        self._at += listed
        while (character := self._next()) and not (listed and character == "]"):
            line = self._line
            yield line, self._value()
            if listed and self._next() == ",":
                self._at += 1
            elif listed and self._next() != "]":
                raise self._damaged("a comma or the end of the list is missing")
        if listed:
            self._at += 1
            if not character or self._next():
                raise self._damaged("the list of rows is cut off" if not character else "text behind the list of rows")

    def _next(self) -> str:
        """Skip blanks and return the next character; nothing at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._line += self._text.count("\n", self._at, space.end())
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        piece = self._stream.read(max(_PIECE, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def _value(self) -> Any:
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LONGEST_WORD
                if cut_off and self._more():
                    continue
                self._line += self._text.count("\n", self._at, error.pos)
                raise self._damaged(error.msg) from error
            except (ValueError, RecursionError) as error:  # a repeated key, too long a number, too deep a nesting
                raise self._damaged(str(error)) from error
            self._line += self._text.count("\n", self._at, end)
            self._at = end
            return value

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self._file}, line {self._line}: cannot be read as json: {why}")


def _json_rows(stream: TextIO, file: Path) -> Iterator[Row]:
    for line, value in _JsonReader(stream, file):
        row = {"text": value} if isinstance(value, str) else value
        if not isinstance(row, dict):
            raise DataError(f'{file}, line {line}: a row must be an object such as {{"prompt": "...", ...}}')
        yield f"line {line}", row


# CSV


def _csv_rows(stream: TextIO, file: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(stream, strict=True)
    try:
        header = next((cells for cells in reader if cells), [])
        _check_names(header, file)
        if len(header) == 1 and (separators := [sign for sign in ";\t|" if sign in header[0]]):
            raise DataError(f"{file}: its cells are separated by {separators[0]!r}; separate them by commas")
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{file}, line {line}: {len(cells)} cells where the header has {len(header)}; a cell with a comma "
                    "or a line break needs double quotes"
                )
            if cells:
                yield f"line {line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: cannot be read as csv: {error}") from error


def _check_names(names: list[str], file: Path) -> None:
    (name, count), *_ = Counter(filter(None, names)).most_common(1) or [("", 0)]
    if count > 1:
        raise DataError(f"{file}: {count} columns have the name {name!r}; rename or remove all but one")


# Parquet


def _parquet_file(file: Path) -> Any:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as parquet: {last_line(error)}") from error
    _check_names(table.schema_arrow.names, file)
    return table


def _parquet_rows(file: Path, wanted: Collection[str] | None) -> Iterator[Row]:
    import pyarrow as pa

    table = _parquet_file(file)
    names = [name for name in table.schema_arrow.names if wanted is None or name in wanted]
    short = [name for name in names if table.schema_arrow.field(name).type in (pa.float32(), pa.float16())]
    number = 0
    try:
        for batch in table.iter_batches(batch_size=1000, columns=names):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                for name in short:  # 0.1 in 32 bits is 0.10000000149 in Python's 64
                    row[name] = None if row[name] is None else _shortest(row[name], table.schema_arrow.field(name).type)
                yield f"row {number}", row
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file}, after row {number}: cannot be read as parquet: {last_line(error)}") from error


def _shortest(value: float, kind: Any) -> float:
    return float(str(kind.to_pandas_dtype()(value)))
