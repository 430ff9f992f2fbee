"""Split files of JSON lines into pieces that several processes read.

A line break is never inside a JSON text, so a piece ends with one. Where a value has several lines, a piece may end
inside it; then that piece cannot be read, and the file must be read as a whole.
"""

import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qlora_exp.data.reading.readers import Row, json_rows, opened
from qlora_exp.environment.data_files import File
from qlora_exp.utils.errors import DataError

_PIECE = 1 << 20


class Piece(NamedTuple):
    """Complete lines of a file."""

    file: File
    line: int
    """Number of the first one."""
    text: bytes


def pieces(files: Sequence[File]) -> Iterator[Piece]:
    """Yield the pieces of files, one after another.

    Raises:
        OSError: a file cannot be read or decompressed.
    """
    for file in files:
        line = 1
        with opened(file) as content:
            while text := content.read(_PIECE):
                text += content.readline()
                yield Piece(file, line, text)
                line += text.count(b"\n")


def rows(piece: Piece) -> Iterator[Row]:
    """Yield the rows of a piece with their places in the file.

    Raises:
        DataError: it is damaged, or does not consist of complete values.
        UnicodeDecodeError: it is not encoded in UTF-8.
    """
    text = piece.text.decode("utf-8-sig" if piece.line == 1 else "utf-8")
    if text.lstrip(" \t\r\n").startswith("["):
        raise DataError(f"{piece.file.name}: a list of rows is read as a whole")
    yield from json_rows(io.StringIO(text, newline=""), piece.file, piece.line)
