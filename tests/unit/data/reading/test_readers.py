"""Files are read as they are written: no value is guessed, no row is lost, and what is damaged is named."""

import bz2
import csv
import gzip
import json
import logging
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_exp.data.reading import readers
from qlora_exp.data.values import as_text
from qlora_exp.environment.data_files import File, find
from qlora_exp.utils.errors import DataError


def read(file: Path, content: bytes | str) -> list[dict]:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row for _, row in readers.rows(*find(str(file)))]


def named(file: Path) -> File:
    return File(file, str(file))


@pytest.mark.parametrize("number", ["1.10", "1e5", "-0", "0.1234567890123456789", "123456789012345678901234567890"])
def test_number_of_a_json_file_keeps_its_digits(number: str, tmp_path):
    (row,) = read(tmp_path / "rows.jsonl", f'{{"a": {number}, "b": [{number}]}}')
    assert (as_text(row["a"]), as_text(row["b"])) == (number, f"[{number}]")


def test_messages_of_a_json_file_keep_their_own_keys(tmp_path):
    rows = [{"m": [{"role": "user"}, {"role": "tool", "n": None, "at": "2024-01-08"}]}, {"m": 3, "k": {"a": {}}}]
    assert read(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))) == rows


@pytest.mark.parametrize("indent", [None, 1])
def test_list_of_rows_is_read_piece_by_piece(indent: int | None, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_PIECE", 7)
    rows = [{"text": f"é {'x' * number}", "n": -number, "more": [True, {}]} for number in range(30)]
    assert read(tmp_path / "rows.json", json.dumps(rows, indent=indent)) == rows
    assert read(tmp_path / "rows.jsonl", "\n\r\n".join(map(json.dumps, rows))) == rows
    assert [place for place, _ in readers.rows(named(tmp_path / "rows.jsonl"))][-1] == "line 59"


CELLS = st.lists(st.text(st.characters(blacklist_categories=("Cs",))), min_size=2, max_size=2)


@given(cells=st.lists(CELLS, min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_cells_are_the_text_that_was_written(cells: list[list[str]], tmp_path_factory):
    file = tmp_path_factory.mktemp("csv") / "rows.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([["prompt", "completion"], *cells])
    assert [list(row.values()) for _, row in readers.rows(named(file))] == cells


def test_csv_words_and_zeros_stay_text(tmp_path):
    words = ["01006", "11", "", "true", "NA", "None", "null", "N/A", "nan", "1.10", "2024-07-16", "x" * 200_000]
    rows = read(tmp_path / "rows.csv", b"\xef\xbb\xbfa,b\r\n" + "".join(f"x,{word}\r\n" for word in words).encode())
    assert [row["b"] for row in rows] == words


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_file_is_read_like_the_file_in_it(suffix: str, tmp_path):
    rows = [{"a": f"é {number}"} for number in range(1000)]
    content = "\n".join(map(json.dumps, rows)).encode()
    assert read(tmp_path / f"rows.jsonl{suffix}", PACKERS[suffix](content)) == rows
    with pytest.raises(DataError, match="cut.jsonl.*cannot be read"):
        read(tmp_path / f"cut.jsonl{suffix}", PACKERS[suffix](content)[:-20])
    with pytest.raises(DataError, match="line 2: .*not UTF-8"):
        read(tmp_path / f"latin.csv{suffix}", PACKERS[suffix]("a\né".encode("latin-1")))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "a,b\n1,2;3"),
        ("a.csv", "a;b\n1;2;3".replace("2;3", '"2;3"')),
        ("a.csv", "\r\n\na\tb\r\n1\t2;3\r\n"),
        ("a.csv", "a|b\n1|2;3"),
        ("a.csv", '"a";"b"\n1;"2;3"'),
        ("a.csv", 'sep=;\na;b\n1;"2;3"'),
        ("a.csv", "sep=\t\na\tb\n1\t2;3"),
        ("a.tsv", "a\tb\n1\t2;3"),
        ("a.TSV", "a\tb\n1\t2;3"),
    ],
)
def test_separator_of_cells_is_that_of_the_header(name: str, content: str, tmp_path):
    assert read(tmp_path / name, content) == [{"a": "1", "b": "2;3"}]


def test_separators_in_quotes_do_not_count(tmp_path):
    assert read(tmp_path / "a.csv", 'a,"b;c;d"\n1,2') == [{"a": "1", "b;c;d": "2"}]
    with pytest.raises(DataError, match="line 4: 3 cells where the header has 2; a cell with a semicolon"):
        read(tmp_path / "a.csv", "sep=;\na;b\n1;2\n1;2;3")


def test_quoted_tab_is_part_of_its_cell_and_said_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        rows = read(tmp_path / "a.tsv", 'a\tb\n1\t"one\ttwo"\n2\tfoo "bar"\n3\t"x""y"\n')
    assert [row["b"] for row in rows] == ["one\ttwo", 'foo "bar"', 'x"y']
    (message,) = caplog.messages
    assert message.endswith("a.tsv, line 2: a cell in double quotes contains a tab or a line break")


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_nothing_behind_compressed_text_is_left_out_in_silence(suffix: str, tmp_path):
    row = PACKERS[suffix](b'{"a": 1}\n')
    file = tmp_path / f"rows.jsonl{suffix}"
    for content, count in {row: 1, row + row: 2, row + b"\0" * 8 + row: 2, PACKERS[suffix](b"") + row: 1}.items():
        assert read(file, content) == [{"a": 1}] * count
    for more, message in {b"garbage": "behind", b"\n": "behind", row[:-3]: "cut off"}.items():
        with pytest.raises(DataError, match=f"rows.jsonl.{suffix[1:]}: cannot be read: .*{message}"):
            read(file, row + more)


@pytest.mark.parametrize("kind", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_file_is_read(kind, tmp_path):
    table = pa.table({"a": [str(number) for number in range(2500)], "b": pa.array([0.1] * 2500, pa.float32())})
    with kind(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    rows = list(readers.rows(named(tmp_path / "rows.arrow"), ["b"]))
    assert (len(rows), rows[-1]) == (2500, ("row 2500", {"b": 0.1}))
    assert readers.columns(named(tmp_path / "rows.arrow")) == ["a", "b"]


NESTED = {
    "list": (pa.array([[0.1, None]], pa.list_(pa.float32())), "[0.1, null]"),
    "half": (pa.array([[np.float16(0.1)]], pa.list_(pa.float16())), "[0.1]"),
    "struct": (pa.array([{"a": [0.1]}], pa.struct([("a", pa.list_(pa.float32(), 1))])), '{"a": [0.1]}'),
    "map": (pa.array([[("k", 0.1)]], pa.map_(pa.string(), pa.float32())), '{"k": 0.1}'),
    "dictionary": (pa.array([0.1], pa.float32()).dictionary_encode(), "0.1"),
    "null": (pa.array([None], pa.list_(pa.float32())), ""),
}


@pytest.mark.parametrize("name", NESTED)
def test_short_numbers_keep_how_they_are_written_at_any_depth(name: str, tmp_path):
    values, text = NESTED[name]
    with pa.ipc.new_file(tmp_path / "rows.arrow", pa.schema([("a", values.type)])) as writer:
        writer.write_table(pa.table({"a": values}))
    ((_, row),) = readers.rows(named(tmp_path / "rows.arrow"))
    assert as_text(row["a"]) == text


def test_value_that_python_cannot_hold_is_refused_only_if_it_is_used(tmp_path):
    columns = {
        "twice": pa.array([[("k", 1), ("k", 2)], [("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "late": pa.array([2**62, 0], pa.timestamp("s")),
        "text": ["a", "b"],
    }
    with pa.ipc.new_file(tmp_path / "rows.arrow", pa.table(columns).schema) as writer:
        writer.write_table(pa.table(columns))
    (_, first), (_, second) = readers.rows(named(tmp_path / "rows.arrow"))
    assert (first["text"], second["twice"]) == ("a", {"k": 1})
    for name, why in {"twice": "duplicate keys", "late": "too large"}.items():
        with pytest.raises(ValueError, match=f"a value cannot be read: .*{why}"):
            as_text(first[name])


def test_parquet_values_keep_their_type(tmp_path):
    columns = {
        "short": pa.array([0.1], pa.float32()),
        "list": [["red", "blue"]],
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "label": pa.array(["a"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    ((place, row),) = readers.rows(named(tmp_path / "rows.parquet"))
    assert (place, row) == ("row 1", {"short": 0.1, "list": ["red", "blue"], "map": {"k": 1}, "label": "a"})
    assert list(readers.rows(named(tmp_path / "rows.parquet"), ["label"])) == [("row 1", {"label": "a"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2\n{"a": 3}', "line 2: cannot be read as json: Expecting ','"),
        ("a.jsonl", '{"a": 1}\n{"a": 007}', "line 2: cannot be read as json: Expecting ','"),
        ("a.jsonl", '{"a": "b}\n{"a": "b"}', "line 1: cannot be read as json: Invalid control character"),
        ("a.jsonl", '{"a": "b"}\n{"a": "b', "line 2: cannot be read as json: Unterminated"),
        ("a.jsonl", '{"a": 1, "a": 2}', "line 1: .* the key 'a' occurs twice"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "line 1: .*digits"),
        ("a.jsonl", '{"a": ' + "[" * 200_000, "line 1: .*recursion"),
        ("a.jsonl", "3", 'line 1: a row must be an object such as {"prompt"'),
        ("a.json", '[{"a": 1}\n{"a": 1}]', "line 2: .* a comma or the end of the list is missing"),
        ("a.json", '[{"a": 1},\n', "line 2: .* the list of rows is cut off"),
        ("a.json", '[{"a": 1}]\nx', "line 2: .* text behind the list"),
        ("a.jsonl", '{"a": "ok"}\n{"a": "é"}'.encode("latin-1"), "line 2: .*not UTF-8.* iconv -f WINDOWS-1252"),
        ("a.csv", "a,b\nok,ok\né,é".encode("cp1252"), "line 3: .*not UTF-8.* iconv -f WINDOWS-1252"),
        ("a.jsonl", '{"a": "é"}'.encode("utf-16"), "line 1: .*iconv -f UTF-16"),
        ("a.csv", "a,b,a\n1,2,3", "2 columns have the name 'a'"),
        ("a.tsv", 'a\tb\n1\t"open\n2\tfoo', "cannot be read as csv: unexpected end"),
        ("a.arrow", "x", "cannot be read as arrow"),
        ("a.arrow", b"ARROW1" + b"x" * 99, "cannot be read as arrow"),
        ("a.csv", "a,b\n1,2\n\n3", "line 4: 1 cells where the header has 2"),
        ("a.csv", 'a,b\n1,"2\n3,4', "line 3: cannot be read as csv: unexpected end"),
        ("a.parquet", "PAR1", "cannot be read as parquet"),
        ("a.jsonl.gz", "x", "a.jsonl.gz: cannot be read: Not a gzipped file"),
    ],
)
def test_damaged_file_is_rejected_with_its_line(name: str, content: bytes | str, message: str, tmp_path):
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, content)
