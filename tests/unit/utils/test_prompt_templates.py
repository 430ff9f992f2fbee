from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.utils import prompt_templates

TEXT = st.text(max_size=20)
NAME = st.text("abcé _-.0", min_size=1, max_size=8)


@given(parts=st.lists(st.tuples(TEXT, NAME), min_size=1, max_size=4), end=TEXT, values=st.data())
def test_values_stand_in_the_place_of_their_columns(parts: list[tuple[str, str]], end: str, values):
    """Texts and values may contain anything, braces and backslashes too."""
    drawn = {name: values.draw(TEXT) for _, name in parts}

    def escaped(text: str) -> str:
        return text.replace("{", "{{").replace("}", "}}")

    template = "".join(f"{escaped(text)}{{{name}}}" for text, name in parts) + escaped(end)
    assert prompt_templates.columns(template) == list(dict.fromkeys(name for _, name in parts))
    assert prompt_templates.filled(template, drawn) == "".join(text + drawn[name] for text, name in parts) + end


@given(TEXT)
def test_escaped_text_is_read_back(text: str):
    written = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    assert prompt_templates.unescaped(written) == text
