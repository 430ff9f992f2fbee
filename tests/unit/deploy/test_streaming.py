"""What is passed on while an answer is generated is the answer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_exp.data.end_of_turn import before_end
from qlora_exp.deploy.streaming import TextStream

END = -1


def streamed(ids: list[int], decoder: Any, stops: list[str], raw: bool = True) -> tuple[list[str], TextStream]:
    """Read tokens until the answer ends, as transformers does."""
    pieces: list[str] = []
    stream = TextStream(decoder, pieces.append, [END], stops, raw)
    stream.put(torch.tensor([[1, 2]]))  # the prompt
    for token in ids:
        stream.put(torch.tensor([token]))
        if bool(stream(torch.tensor([[token]]), None)):
            break
    stream.end()
    return pieces, stream


@given(
    st.lists(st.text("ab# \n", max_size=4)),
    st.lists(st.text("ab#\n", min_size=1, max_size=4), max_size=2),
    st.booleans(),
)
def test_pieces_are_the_answer_without_the_text_that_ends_it(texts: list[str], stops: list[str], raw: bool):
    decoder = SimpleNamespace(decode=lambda ids, **_: "".join(texts[token] for token in ids))
    pieces, stream = streamed([*range(len(texts))], decoder, stops, raw)
    text = before_end("".join(texts), stops)
    assert "".join(pieces) == stream.text == (text if raw else text.strip())
    assert all(pieces)
    assert stream.complete == any(stop in "".join(texts) for stop in stops)


@given(st.text(max_size=12), st.integers(0, 30))
def test_no_piece_has_half_a_character(text: str, most: int):
    made = decoding()
    ids = made(text, add_special_tokens=False)["input_ids"][:most]
    pieces, stream = streamed(ids, made, [])
    assert "".join(pieces) == stream.text == made.decode(ids)
    assert stream.generated == len(ids)
    assert not any("\ufffd" in piece for piece in pieces[:-1]) or "\ufffd" in text


def decoding(made: list[Any] = []) -> Any:  # noqa: B006 - made once
    if not made:
        made.append(tokenizer())
    return made[0]


def test_space_after_a_line_is_kept_where_a_first_space_is_not_decoded():
    core = Tokenizer(models.BPE({"▁a": 0, "▁b": 1, "\n": 2, "c": 3}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pieces, _ = streamed([0, 2, 1, 3, 0], PreTrainedTokenizerFast(tokenizer_object=core), [])
    assert pieces == ["a", "\n", " b", "c", " a"]


@pytest.mark.parametrize(
    ("ids", "complete", "generated"), [([0, END, 1], True, 2), ([0, 1], False, 2), ([END], True, 1)]
)
def test_token_that_ends_an_answer_is_counted_and_not_shown(ids, complete, generated):
    decoder = SimpleNamespace(decode=lambda ids, **_: "".join(map(str, ids)))
    pieces, stream = streamed(ids, decoder, [])
    assert (stream.complete, stream.generated) == (complete, generated)
    assert str(END) not in "".join(pieces)


def test_cancelled_answer_ends_with_the_next_token():
    stream = TextStream(SimpleNamespace(decode=lambda ids, **_: "a" * len(ids)), print, [], [], cancelled=lambda: True)
    stream.put(torch.tensor([[1]]))
    stream.put(torch.tensor([1]))
    assert stream(torch.tensor([[1]]), None).tolist() == [True]
    assert not stream.complete
