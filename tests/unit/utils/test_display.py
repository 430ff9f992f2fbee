import csv
import io
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.utils.display import (
    NEWLINES,
    RedactingFormatter,
    csv_cell,
    markdown,
    markdown_code,
    pasteable,
    say,
    shown,
    visible,
    visible_json,
)

HOSTILE = "ok\x1b]0;OWNED\x07\x1b[2J\x9b31m\r\u202eabc\u2066\x00\u2028"


def test_control_characters_are_visible():
    assert visible(HOSTILE) == r"ok\x1b]0;OWNED\x07\x1b[2J\x9b31m\r\u202eabc\u2066\x00\u2028"
    assert visible("a\n\tb", keep=NEWLINES) == "a\n\tb"
    assert visible("a\n\tb\r", keep=NEWLINES) == "a\n\tb\\r"
    assert visible("Grüße 你好 😀 ±") == "Grüße 你好 😀 ±"


@given(st.text(alphabet=st.characters()))
def test_visible_text_can_be_printed(text: str):
    one_line = visible(text)
    one_line.encode()
    assert len(one_line.splitlines()) <= 1
    assert "\x1b" not in one_line


@given(st.text())
def test_json_means_the_same(text: str):
    assert json.loads(visible_json(json.dumps(text, ensure_ascii=False))) == text


def test_lines_are_shown_without_secrets(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "verysecretvalue")
    say("run a\nb", "got verysecretvalue", 3)
    assert capsys.readouterr().out == "run a\\nb\ngot ***\n3\n"
    assert shown("verysecretvalue\x1b\n", keep=NEWLINES) == "***\\x1b\n"
    record = logging.LogRecord("a", logging.INFO, "f", 1, "got %s\x1b\n", ("verysecretvalue",), None)
    assert RedactingFormatter("%(message)s").format(record) == "got ***\\x1b\n"


def test_markdown_is_escaped():
    assert markdown("<b>&lt; [a](b) ![i](j) `c` *d* _e_ f_g a|b\n# h") == (
        r"\<b\>\&lt; \[a\](b) !\[i\](j) \`c\` \*d\* \_e\_ f_g a\|b # h"
    )
    assert markdown("# title") == r"\# title"
    assert markdown_code("a\nb") == "`a b`"
    assert markdown_code("a`b``c") == "``` a`b``c ```"


@pytest.mark.parametrize("text", ["=1+1", "+cmd|x", "-2+3", "@SUM(A1)", "\uff1d1", '=HYPERLINK("x")'])
def test_formula_is_no_formula_in_a_csv_file(text: str):
    assert csv_cell(text) == f"'{text}"


def test_other_cells_of_a_csv_file_stay():
    values = ["-1.5", "+0.1", "1e-4", "nan", "tie -0.1", "", "a=b", -1.5, None]
    assert [csv_cell(value) for value in values] == values
    assert csv_cell("\t=1") == r"\t=1"
    assert csv_cell("\r=1") == r"\r=1"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_cell_of_a_csv_file_stays_one_cell(text: str):
    file = io.StringIO()
    csv.writer(file).writerow([csv_cell(text), "end"])
    assert len(file.getvalue().splitlines()) == 1
    (row,) = csv.reader(io.StringIO(file.getvalue()))
    assert len(row) == 2


def test_command_can_be_pasted():
    assert pasteable("compare", "a b", uri="sqlite:///x y") == "qlora-exp compare 'a b' --uri 'sqlite:///x y'"
    assert pasteable("ui") == "qlora-exp ui"
