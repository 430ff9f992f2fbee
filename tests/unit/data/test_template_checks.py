import copy
from typing import Any

import pytest

from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data import template_checks
from qlora_exp.data.prompts import render
from qlora_exp.utils.errors import DataError

CHAT = DatasetConfig(format="chat", messages_column="messages")
BEGIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CONTENT = "{{ m.content or '' }}"
CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
THINK = "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "8"}
REASONED = {**ANSWER, "reasoning_content": "add"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"n": 1, "town": "T"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c", "name": "f", "content": "6"}
SCHEMA = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def with_template(tiny_tokenizer) -> Any:
    def make(template: str) -> Any:
        tokenizer = copy.copy(tiny_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return make


def check(tokenizer: Any, dialogue: list[dict], tools: Any = None, config: DatasetConfig = CHAT) -> None:
    template_checks.TemplateCheck(config, tokenizer).check({"messages": dialogue, "tools": tools})


@pytest.mark.parametrize(
    ("template", "dialogue", "tools"),
    [
        (BEGIN + CONTENT + END, [USER, ANSWER], None),
        (TOOLS + BEGIN + CONTENT + CALLS + END, [USER, CALLED, RESULT, ANSWER], SCHEMA),
        (TOOLS + BEGIN + CONTENT + CALLS + END, [USER, CALLED], None),
        (BEGIN + THINK + CONTENT + END, [USER, REASONED], None),
        (
            BEGIN + THINK + CONTENT + END,
            [USER, REASONED, USER, ANSWER],
            None,
        ),  # it strips the reasoning of earlier turns
        (BEGIN + CONTENT + "{% if m.bold %}!{% endif %}" + END, [{**USER, "bold": True}, ANSWER], None),
    ],
)
def test_rendered_row_is_accepted(template: str, dialogue: list, tools: Any, with_template):
    tokenizer = with_template(template)
    check(tokenizer, dialogue, tools)
    pieces = render({"messages": dialogue, "tools": tools}, CHAT, tokenizer).pieces
    options = {"tools": tools} if tools else {}
    assert "".join(text for text, _ in pieces) == tokenizer.apply_chat_template(dialogue, tokenize=False, **options)


@pytest.mark.parametrize(
    ("template", "dialogue", "tools", "what"),
    [
        (BEGIN + CONTENT + END, [USER, ANSWER], SCHEMA, "the column tools"),
        (BEGIN + CONTENT + END, [USER, CALLED], None, "the key 'tool_calls' of a message with the role 'assistant'"),
        (BEGIN + CONTENT + CALLS.replace("c.function", "c.function.name") + END, [USER, CALLED], None, "'tool_calls'"),
        (
            BEGIN + "{% if m.tool_calls %}" + CALLS + "{% else %}" + CONTENT + "{% endif %}" + END,
            [USER, {**CALLED, "content": "Well."}],
            None,
            "'content'",
        ),
        (BEGIN + CONTENT + END, [USER, REASONED], None, "'reasoning_content'"),
        (BEGIN + CONTENT + END, [{**USER, "name": "Bo"}, ANSWER], None, "'name'"),
        (
            BEGIN + "{% if m.role != 'developer' %}" + CONTENT + "{% endif %}" + END,
            [{"role": "developer", "content": "d"}, USER, ANSWER],
            None,
            "'developer'",
        ),
    ],
)
def test_part_that_the_template_ignores_is_rejected(
    template: str, dialogue: list, tools: Any, what: str, with_template
):
    with pytest.raises(DataError, match=f"does not render .*{what}"):
        check(with_template(template), dialogue, tools)


def test_each_kind_of_message_is_tried_once(with_template, monkeypatch):
    checked = template_checks.TemplateCheck(CHAT, with_template(BEGIN + CONTENT + END))
    checked.check({"messages": [USER, ANSWER]})
    monkeypatch.setattr(template_checks, "apply_template", lambda *_: pytest.fail("tried again"))
    checked.check({"messages": [USER, ANSWER, USER, ANSWER]})
