import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.errors import DataError
from qlora_exp.prompts import render
from qlora_exp.schema import DatasetConfig

ROW = {"prompt": "Add 2 and 3.", "input": "", "completion": "5"}
TEXT = st.text(max_size=40)


def test_alpaca_has_two_prompts():
    without = render(ROW, DatasetConfig(), None)
    assert without.prompt.endswith("### Instruction:\nAdd 2 and 3.\n\n### Response:\n")
    assert "### Input" not in without.prompt
    assert "### Input:\nin base 10\n" in render(ROW | {"input": "in base 10"}, DatasetConfig(), None).prompt
    assert without.completion == "5"


@given(TEXT, TEXT, TEXT)
def test_braces_in_rows_are_only_text(prompt: str, context: str, completion: str):
    rendered = render({"prompt": prompt, "input": context, "completion": completion}, DatasetConfig(), None)
    assert prompt in rendered.prompt
    assert rendered.completion == completion


def test_prompt_completion_is_verbatim():
    assert render(ROW, DatasetConfig(format="prompt_completion"), None)[:2] == ("Add 2 and 3.", "5")


def test_text_has_no_prompt():
    assert render(ROW, DatasetConfig(format="text"), None)[:2] == ("", "5")


def test_chat_uses_the_models_template(tokenizer):
    rendered = render(ROW, DatasetConfig(format="chat", system_message="Be brief."), tokenizer)
    assert rendered.prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd 2 and 3.")
    assert rendered.prompt.endswith("<|im_start|>assistant\n")
    assert rendered.completion == "5<|im_end|>\n"


def test_chat_keeps_earlier_turns_in_the_prompt(tokenizer):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "2+3?"), ("assistant", "5")]
    row = ROW | {"messages": [{"role": role, "content": content} for role, content in turns]}
    rendered = render(row, DatasetConfig(format="chat", messages_column="messages"), tokenizer)
    assert "hello" in rendered.prompt
    assert rendered.completion.startswith("5")


class Template:
    """A tokenizer with a template of our choice."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def apply_chat_template(self, messages: list, tokenize: bool, add_generation_prompt: bool = False) -> str:
        return f"{len(messages)} turns"


@pytest.mark.parametrize(
    ("template", "message"), [(None, "no chat template"), ("counts", "renders a dialogue differently")]
)
def test_templates_that_cannot_be_trained_on_are_refused(template: str | None, message: str):
    with pytest.raises(DataError, match=message):
        render(ROW, DatasetConfig(format="chat"), Template(template))
