import re

from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.utils.tables import latex_table, markdown_table, print_table


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4))
def test_cell_text_cannot_break_a_markdown_table(rows: list[tuple[str, str]]):
    lines = markdown_table(["one", "two"], rows).split("\n")
    assert len(lines) == 2 + len(rows)
    for line in lines:
        bare = line.replace("\\\\", "")  # a backslash that stands for itself
        assert bare.count("|") - bare.count("\\|") == 3


_LATEX = re.compile(r"\\(?:[&%$#_{}]|text(?:backslash|asciitilde|asciicircum)(?: |\\space |(?![a-zA-Z])))")
"""Escaped characters."""


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4), st.text(min_size=1))
def test_text_cannot_be_a_command_of_latex(rows: list[tuple[str, str]], note: str):
    made = latex_table(["one", "two"], rows, [note])
    comment, table = made.split("\\begin{tabular}{ll}\n\\toprule\n")
    assert comment.startswith("%")
    assert comment.count("\n") == 1
    head, body, end = re.split(r"\\midrule\n|\\bottomrule\n", table)
    assert (head, end) == ("one & two \\\\\n", "\\end{tabular}\n")
    lines = body.split(" \\\\\n")[:-1]
    assert len(lines) == len(rows)
    for line in lines:
        bare = _LATEX.sub("", line)
        assert not {*bare} & {*"\\%$#_{}"}
        assert bare.count("&") == 1


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
