"""Read a file of rows as it is written: JSON (a row in each line, or one list of rows), CSV, Parquet and Arrow.

No value is guessed: a cell of a CSV file is text, a number of a JSON file keeps its digits. Rows are read one by one.
"""

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TextIO, cast

from qlora_exp.data.values import DECODER, Unreadable
from qlora_exp.environment.data_files import File
from qlora_exp.utils.errors import DataError, last_line

log = logging.getLogger(__name__)

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
    read = json_rows if file.format == "json" else _csv_rows
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
    if suffix == ".gz":
        return cast("BinaryIO", gzip.open(file.path, "rb"))
    content = file.path.open("rb")
    decompressor: dict[str, Any] = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}
    if suffix not in decompressor:
        return content
    return io.BufferedReader(_Decompressed(content, decompressor[suffix]))


class _Decompressed(io.RawIOBase):
    """Text of compressed streams, one after another. Python's own readers stop in silence at what is no stream."""

    def __init__(self, content: BinaryIO, new: Callable[[], Any]) -> None:
        self._content, self._new, self._stream = content, new, new()
        self._is_first = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        text = b""
        while not text:
            if self._stream.eof:
                rest = self._stream.unused_data.lstrip(b"\0")  # which pad xz files
                while not rest and (piece := self._content.read(_PIECE)):
                    rest = piece.lstrip(b"\0")
                if not rest:
                    break
                self._stream, self._is_first = self._new(), False
            else:
                rest = self._content.read(_PIECE) if self._stream.needs_input else b""
                if self._stream.needs_input and not rest:
                    raise EOFError(
                        f"the compressed text is cut off{'' if self._is_first else ', or something is behind it'}"
                    )
            try:
                text = self._stream.decompress(rest, len(buffer))
            except (OSError, lzma.LZMAError) as error:
                where = "" if self._is_first else ", behind a complete text"
                raise OSError(f"{last_line(error)}{where}") from error
        buffer[: len(text)] = text
        return len(text)

    def close(self) -> None:
        self._content.close()
        super().close()


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

    def __init__(self, stream: TextIO, file: File, line: int) -> None:
        self._stream, self._file, self._text, self._at, self._line = stream, file, "", 0, line

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
                read = self._text[self._at : error.pos]
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LONGEST_WORD
                if cut_off and self._more():
                    continue
                self._line += (read.rstrip() if "delimiter" in error.msg else read).count("\n")  # where it is missing
                raise self._damaged(error.msg) from error
            except (ValueError, RecursionError) as error:  # a repeated key, too long a number, too deep a nesting
                raise self._damaged(str(error)) from error
            self._line += self._text.count("\n", self._at, end)
            self._at = end
            return value

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self._file.name}, line {self._line}: cannot be read as json: {why}")


def json_rows(stream: TextIO, file: File, first: int = 1) -> Iterator[Row]:
    """Yield the rows of a JSON text, whose first line has the number `first` in its file."""
    for line, value in _JsonReader(stream, file, first):
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
            if separator == "\t" and any("\t" in cell or "\n" in cell for cell in cells):
                _say_quoted(file.name, line)
            if cells:
                yield f"line {line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file.name}, line {reader.line_num}: cannot be read as csv: {error}") from error


@cache
def _say_quoted(name: str, line: int) -> None:
    """Say where a cell goes on behind a tab or a line break, as quotes that are text would make it do."""
    log.info("%s, line %d: a cell in double quotes contains a tab or a line break", name, line)


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
    with _table(file) as (schema, batches):
        names = [name for name in schema.names if wanted is None or name in wanted]
        number = 0
        for batch in batches(names):
            columns = [_values(column, column.type) for column in batch.columns]
            for values in zip(*columns, strict=True) if names else [()] * batch.num_rows:
                number += 1
                yield f"row {number}", dict(zip(batch.schema.names, values, strict=True))


_UNREADABLE = (KeyError, OverflowError, ValueError)


def _values(column: Any, kind: Any) -> list[Any]:
    """Return the values of a column; those that Python cannot hold are refused only if they are used."""
    try:
        values = column.to_pylist(maps_as_pydicts="strict")
    except _UNREADABLE:
        values = [_value(scalar) for scalar in column]
    return [_shortest(value, kind) for value in values] if _has_short(kind) else values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py(maps_as_pydicts="strict")
    except _UNREADABLE as error:
        return Unreadable(last_line(error).strip('"'))


def _inner(kind: Any) -> list[Any]:
    """Return the types of the parts of an Arrow type."""
    if hasattr(kind, "index_type"):  # of a dictionary
        return [kind.value_type]
    return [kind.field(number).type for number in range(kind.num_fields)]


def _has_short(kind: Any) -> bool:
    return kind in ("float", "halffloat") or any(map(_has_short, _inner(kind)))


def _shortest(value: Any, kind: Any) -> Any:
    """Return a value with the shortest numbers that are the same in its type: 0.1 in 32 bits is 0.10000000149 in 64."""
    if kind in ("float", "halffloat"):
        return float(str(kind.to_pandas_dtype()(value))) if isinstance(value, float) else value
    if not (inner := _inner(kind)) or not _has_short(kind):
        return value
    if isinstance(value, list):
        return [_shortest(item, inner[0]) for item in value]
    if not isinstance(value, dict):
        return _shortest(value, inner[0]) if hasattr(kind, "index_type") else value
    if hasattr(kind, "key_type"):  # of a map
        return {_shortest(key, kind.key_type): _shortest(item, kind.item_type) for key, item in value.items()}
    return {
        kind.field(number).name: _shortest(value[kind.field(number).name], part) for number, part in enumerate(inner)
    }
