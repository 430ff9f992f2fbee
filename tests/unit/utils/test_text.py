from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.utils.text import cut_to_bytes, shortened


@given(st.text(), st.text(), st.integers(16, 90))
def test_shortened_texts_are_one_line_and_stay_different(first: str, second: str, most: int):
    lines = [shortened(text, most) for text in (first, second)]
    assert all(len(line) <= most and "\n" not in line for line in lines)
    assert (lines[0] == lines[1]) == (first == second)
    long = [shortened("x" * 9600 + text, most) for text in (first, second)]
    assert (long[0] == long[1]) == (first == second)


def test_short_text_is_kept():
    assert shortened("a  b") == "a  b"
    assert shortened("x" * 80) == "x" * 80


@given(st.text(), st.integers(0, 40))
def test_cut_text_is_a_beginning_that_fits(text: str, most: int):
    cut = cut_to_bytes(text, most)
    assert text.startswith(cut)
    assert len(cut.encode()) <= most
    assert cut == text or len(text[: len(cut) + 1].encode()) > most
