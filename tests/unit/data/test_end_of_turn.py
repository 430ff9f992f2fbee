import pytest
from helpers.tiny_models import CHATML, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import compose
from qlora_exp.data.end_of_turn import before_end, end_of_turn
from qlora_exp.data.prompts import chat_template

ENDS = CHATML.replace("<|im_end|>\n", "{}")
NEEDS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "token", "stop"),
    [
        (CHATML, "<|im_end|>", None),
        (ENDS.replace("{}", " <|endoftext|>"), "<|endoftext|>", None),
        (ENDS.replace("{}", "</answer>\n<|im_end|>\n<|endoftext|>"), "<|im_end|>", None),
        (ENDS.replace("{}", "  <|im_end|>"), "<|im_end|>", None),
        (NEEDS_SYSTEM + CHATML, "<|im_end|>", None),
        (ENDS.replace("{}", ""), None, None),
        (ENDS.replace("{}", "\n"), None, None),
        (ENDS.replace("{}", "  "), None, None),
        (ENDS.replace("{}", "</turn>\n"), None, "</turn>"),
        (ENDS.replace("{}", " </s>"), None, " </s>"),
        (ENDS.replace("{}", "\n### End\n\n"), None, "\n### End"),
        (ENDS.replace("{}", "\n\nUser:"), None, "\n\nUser:"),
    ],
)
def test_the_token_or_text_after_an_answer_ends_it(template: str, token: str | None, stop: str | None):
    made = tokenizer(
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), template=template, eos_token="<|im_start|>"
    )
    made.add_tokens(["  "])  # GPT-NeoX has tokens of several spaces
    found = end_of_turn(made, template)
    assert found.token == (None if token is None else made.convert_tokens_to_ids(token))
    assert found.stop == stop


@pytest.mark.parametrize("style", ["text", "alpaca", "prompt_completion"])
def test_formats_without_turns_end_with_eos(style: str):
    made = tokenizer(eos_token="<|endoftext|>")
    template = chat_template(compose([f"dataset.format={style}"]).dataset, made)
    found = end_of_turn(made, template)
    assert (found.token, found.stop) == (made.eos_token_id, None)


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_a_generated_answer_is_cut_at_the_first_end(text: str, stops: list[str]):
    kept = before_end(text, stops)
    assert text.startswith(kept)
    assert not any(stop in kept for stop in stops)
    assert kept == text or any(text[len(kept) :].startswith(stop) for stop in stops)
