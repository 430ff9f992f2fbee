import pytest
from helpers.tiny_models import CHATML, tokenizer

from qlora_exp.config.hydra_compose import compose
from qlora_exp.data.end_of_turn import end_of_turn
from qlora_exp.data.prompts import chat_template

ENDS = CHATML.replace("<|im_end|>\n", "{}")
NEEDS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (CHATML, "<|im_end|>"),
        (ENDS.replace("{}", " <|endoftext|>"), "<|endoftext|>"),
        (ENDS.replace("{}", "</answer>\n<|im_end|>\n<|endoftext|>"), "<|im_end|>"),
        (ENDS.replace("{}", "  <|im_end|>"), "<|im_end|>"),
        (NEEDS_SYSTEM + CHATML, "<|im_end|>"),
        (ENDS.replace("{}", ""), None),
        (ENDS.replace("{}", "</turn>\n"), None),
    ],
)
def test_the_token_after_an_answer_ends_it(template: str, token: str | None):
    made = tokenizer(
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), template=template, eos_token="<|im_start|>"
    )
    made.add_tokens(["  "])  # GPT-NeoX has tokens of several spaces
    found = end_of_turn(made, template).token
    assert found == (None if token is None else made.convert_tokens_to_ids(token))


@pytest.mark.parametrize("style", ["text", "alpaca", "prompt_completion"])
def test_formats_without_turns_end_with_eos(style: str):
    made = tokenizer(eos_token="<|endoftext|>")
    template = chat_template(compose([f"dataset.format={style}"]).dataset, made)
    assert end_of_turn(made, template).token == made.eos_token_id
