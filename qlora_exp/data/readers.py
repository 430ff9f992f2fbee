"""Read a file of rows as it is written: JSON (a row in each line, or one list of rows), CSV, Parquet and Arrow.

No value is guessed: a cell of a CSV file is text, a number of a JSON file keeps its digits. Rows are read one by one.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TextIO, cast

from qlora_exp.data.values import DECODER
from qlora_exp.environment.data_files import File
from qlora_exp.utils.errors import DataError, last_line

Row = tuple[str, dict[str, Any]]
"""Place of a row in its source, such as `line 3`, and its values by column."""

_SPACE = re.compile(r"[ \t\r\n]*")
_PIECE = 1 << 20
_LONGEST_WORD = 16
"""Number of characters of JSON's longest word, -Infinity, and some more."""
_FIRST_ROWS = 1000
_BATCH = 1000


def columns(file: File) -> list[str]:
    """Return the names of a file's columns; of a JSON file, those of its first rows.

    Raises:
        DataError: the file is damaged.
    """
    if file.format in ("parquet", "arrow"):
        with _table(file) as (schema, _):
            return list(schema.names)
    return list(dict.fromkeys(name for _, row in islice(rows(file), _FIRST_ROWS) for name in row))


def rows(file: File, wanted: Collection[str] | None = None) -> Iterator[Row]:
    """Yield each row with its place in the file.

    Args:
        file: the file.
        wanted: columns to read, where this saves time.

    Raises:
        DataError: the file is damaged, or is not encoded in UTF-8.
    """
    if file.format in ("parquet", "arrow"):
        yield from _table_rows(file, wanted)
        return
    read = _json_rows if file.format == "json" else _csv_rows
    try:
        with opened(file) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as stream:
            yield from read(stream, file)
    except UnicodeDecodeError as error:
        raise _not_utf8(file) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{file.name}: cannot be read: {last_line(error)}") from error


def opened(file: File) -> BinaryIO:
    """Open a file for reading, and decompress what is read.

    Raises:
        OSError: it cannot be opened.
    """
    suffix = Path(file.name).suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(cast("io.RawIOBase", pa.CompressedInputStream(pa.OSFile(str(file.path)), "zstd")))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast("BinaryIO", openers.get(suffix, open)(file.path, "rb"))


def _not_utf8(file: File) -> DataError:
    with opened(file) as stream:
        begin = stream.read(4)
    encoding = "UTF-16" if begin[:2] in (b"\xff\xfe", b"\xfe\xff") or 0 in begin else "WINDOWS-1252"
    with opened(file) as stream:
        number = next(number for number, line in enumerate(stream, 1) if not _is_utf8(line))
    return DataError(
        f"{file.name}, line {number}: the text is not UTF-8; convert the file, for example: "
        f"iconv -f {encoding} -t UTF-8 {file.name} > utf8{Path(file.name).suffix}"
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

    def __init__(self, stream: TextIO, file: File) -> None:
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
        return DataError(f"{self._file.name}, line {self._line}: cannot be read as json: {why}")


def _json_rows(stream: TextIO, file: File) -> Iterator[Row]:
    for line, value in _JsonReader(stream, file):
        row = {"text": value} if isinstance(value, str) else value
        if not isinstance(row, dict):
            raise DataError(f'{file.name}, line {line}: a row must be an object such as {{"prompt": "...", ...}}')
        yield f"line {line}", row


# CSV

_SEPARATORS = ",;\t|"


def _csv_rows(stream: TextIO, file: File) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    begin = [*_until_text(stream)]
    header_line = begin[-1] if begin else ""
    if stated := _STATED_SEPARATOR.fullmatch(header_line.strip("\r\n ")):  # written by Excel, for Excel
        begin[-1] = "\n"
    separator = stated[1] if stated else _separator(header_line, file)
    reader = csv.reader(chain(begin, stream), strict=True, delimiter=separator)
    try:
        header = next((cells for cells in reader if cells), [])
        _check_names(header, file)
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{file.name}, line {line}: {len(cells)} cells where the header has {len(header)}; a cell with "
                    f"{_SPOKEN.get(separator, repr(separator))} or a line break needs double quotes"
                )
            if separator == "\t" and any("\t" in cell for cell in cells):
                raise DataError(
                    f"{file.name}, line {line}: a cell in double quotes contains a tab, so its quotes may be text; "
                    "write a quote that is text twice, and its cell in quotes"
                )
            if cells:
                yield f"line {line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file.name}, line {reader.line_num}: cannot be read as csv: {error}") from error


def _until_text(stream: TextIO) -> Iterator[str]:
    """Yield the lines up to the first that is not blank."""
    for line in stream:
        yield line
        if line.strip():
            return


_STATED_SEPARATOR = re.compile(r"sep=(.)")
_SPOKEN = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}


def _separator(header: str, file: File) -> str:
    """Return what separates the cells of a file: the sign that is most often in its header, outside of quotes."""
    if ".tsv" in PurePath(file.name.lower()).suffixes[-2:]:
        return "\t"
    outside = re.sub(r'"[^"]*"', "", header)
    return max(_SEPARATORS, key=outside.count)  # the first of several, so a comma if there is none


def _check_names(names: list[str], file: File) -> None:
    (name, count), *_ = Counter(filter(None, names)).most_common(1) or [("", 0)]
    if count > 1:
        raise DataError(f"{file.name}: {count} columns have the name {name!r}; rename or remove all but one")


# Parquet and Arrow


@contextmanager
def _table(file: File) -> Iterator[tuple[Any, Callable[[list[str]], Iterator[Any]]]]:
    """Open a Parquet or Arrow file; yield its schema, and what reads batches of the named columns."""
    import pyarrow as pa

    number = 0

    def counted(batches: Iterator[Any]) -> Iterator[Any]:
        nonlocal number
        for batch in batches:
            yield batch
            number += batch.num_rows

    try:
        with pa.memory_map(str(file.path)) as content:
            if file.format == "parquet":
                from pyarrow.parquet import ParquetFile

                table = ParquetFile(content)
                _check_names(table.schema_arrow.names, file)
                yield table.schema_arrow, lambda names: counted(table.iter_batches(batch_size=_BATCH, columns=names))
            else:
                opened = _arrow_file(content)
                _check_names(opened.schema.names, file)
                yield opened.schema, lambda names: counted(_arrow_batches(opened, names))
    except (pa.ArrowException, OSError, ValueError) as error:
        after = f", after row {number}" if number else ""
        raise DataError(f"{file.name}{after}: cannot be read as {file.format}: {last_line(error)}") from error


def _arrow_file(content: Any) -> Any:
    """Open Arrow's format for files, or its format for streams, which `datasets` writes."""
    import pyarrow as pa

    if content.read(6) == b"ARROW1":
        return pa.ipc.open_file(content)
    content.seek(0)
    return pa.ipc.open_stream(content)


def _arrow_batches(table: Any, names: list[str]) -> Iterator[Any]:
    batches = (
        (table.get_batch(index) for index in range(table.num_record_batches))
        if hasattr(table, "num_record_batches")
        else table
    )
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            yield batch.select(names).slice(start, _BATCH)


def _table_rows(file: File, wanted: Collection[str] | None) -> Iterator[Row]:
    import pyarrow as pa

    with _table(file) as (schema, batches):
        names = [name for name in schema.names if wanted is None or name in wanted]
        short = [name for name in names if schema.field(name).type in (pa.float32(), pa.float16())]
        number = 0
        for batch in batches(names):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                for name in short:  # 0.1 in 32 bits is 0.10000000149 in Python's 64
                    row[name] = None if row[name] is None else _shortest(row[name], schema.field(name).type)
                yield f"row {number}", row


def _shortest(value: float, kind: Any) -> float:
    return float(str(kind.to_pandas_dtype()(value)))
