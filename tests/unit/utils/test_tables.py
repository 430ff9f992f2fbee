import re

from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.utils.tables import markdown_table, print_table


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4))
def test_cell_text_cannot_break_a_markdown_table(rows: list[tuple[str, str]]):
    lines = markdown_table(["one", "two"], rows).split("\n")
    assert len(lines) == 2 + len(rows)
    for line in lines:
        bare = line.replace("\\\\", "")  # a backslash that stands for itself
        assert bare.count("|") - bare.count("\\|") == 3


def test_html_in_a_cell_is_escaped():
    assert "\\<script\\>" in markdown_table(["a"], [["<script>"]])


def test_brackets_are_printed(capsys):
    print_table("of [x]", ["[key]"], [["[q_proj]"]])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("of [x]", "[key]", "[q_proj]"))


def test_long_words_are_continued_and_not_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    path = "/long/" + "x" * 60 + "/journal.jsonl"
    print_table("title", ["what", "where"], [["damaged", path]])
    assert path in re.sub(r"[│\s]", "", capsys.readouterr().out)
