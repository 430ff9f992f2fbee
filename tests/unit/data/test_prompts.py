import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data import prompts
from qlora_exp.data.prompts import render
from qlora_exp.data.template_checks import TemplateCheck
from qlora_exp.utils.errors import DataError, ModelError
from qlora_exp.utils.processes.limits import LimitedProcess
from qlora_exp.utils.prompt_templates import filled

ROW = {"prompt": "Add 2 and 3.", "input": "", "completion": "5"}
TEXT = st.text(max_size=40)
CHAT = DatasetConfig(format="chat", messages_column="messages")
TURNS = [("user", "hi"), ("assistant", "hello"), ("user", "2+3?"), ("assistant", "5")]
DIALOGUE = ROW | {"messages": [{"role": role, "content": content} for role, content in TURNS]}


def test_alpaca_format_has_two_prompts():
    (prompt, _), completion = render(ROW, DatasetConfig(), None).pieces
    assert prompt.endswith("### Instruction:\nAdd 2 and 3.\n\n### Response:\n")
    assert "### Input" not in prompt
    assert "### Input:\nin base 10\n" in render(ROW | {"input": "in base 10"}, DatasetConfig(), None).pieces[0][0]
    assert completion == ("5", True)


@given(TEXT, TEXT, TEXT)
def test_braces_in_rows_are_plain_text(prompt: str, context: str, completion: str):
    rendered = render({"prompt": prompt, "input": context, "completion": completion}, DatasetConfig(), None)
    assert prompt in rendered.pieces[0][0]
    assert rendered.pieces[1] == (completion, True)


def test_prompt_completion_is_verbatim():
    pieces = render(ROW, DatasetConfig(format="prompt_completion"), None).pieces
    assert pieces == [("Add 2 and 3.", False), ("5", True)]


def test_text_format_has_no_prompt():
    assert render(ROW, DatasetConfig(format="text"), None).pieces == [("", False), ("5", True)]


def test_chat_format_uses_the_models_template(tiny_tokenizer):
    rendered = render(ROW, DatasetConfig(format="chat", system_message="Be brief."), tiny_tokenizer)
    (prompt, _), completion = rendered.pieces
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd 2 and 3.")
    assert prompt.endswith("<|im_start|>assistant\n")
    assert completion == ("5<|im_end|>\n", True)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_rows_own_system_message_replaces_the_configs(role: str, tiny_tokenizer):
    config = CHAT.model_copy(update={"system_message": "Be kind."})
    turns = [{"role": role, "content": "Be terse."}, *DIALOGUE["messages"]]
    learned = "".join(text for text, _ in render(DIALOGUE | {"messages": turns}, config, tiny_tokenizer).pieces)
    served = prompts.chat_template(config, tiny_tokenizer)
    assert learned == tiny_tokenizer.apply_chat_template(turns, chat_template=served, tokenize=False)
    assert "Be kind." not in learned


@pytest.mark.parametrize(
    "messages", [DIALOGUE["messages"][1:], [{"role": "system", "content": "x"}, *DIALOGUE["messages"]]]
)
def test_dialogue_that_the_template_refuses_is_rejected(messages: list, tiny_tokenizer):
    strict = copy.copy(tiny_tokenizer)
    refuse = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    strict.chat_template = refuse + tiny_tokenizer.chat_template
    with pytest.raises(DataError, match="refuses a dialogue with the roles .*: Roles must alternate. Change"):
        render(DIALOGUE | {"messages": messages}, CHAT, strict)


def test_prompt_without_instruction_is_its_input():
    row = {"prompt": "", "input": " full\n", "completion": "c"}
    assert render(row, DatasetConfig(format="prompt_completion"), None).pieces[0] == (" full\n", False)


def test_chat_format_keeps_earlier_turns_in_the_prompt(tiny_tokenizer):
    (prompt, _), (completion, _) = render(DIALOGUE, CHAT, tiny_tokenizer).pieces
    assert "hello" in prompt
    assert completion.startswith("5")


def test_every_answer_is_supervised_without_generation_marks(tiny_tokenizer):
    assert "generation %}" not in tiny_tokenizer.chat_template
    rendered = render(DIALOGUE, CHAT, tiny_tokenizer, every_answer=True)
    assert [text for text, learned in rendered.pieces if learned] == ["hello<|im_end|>\n", "5<|im_end|>\n"]
    given = "".join(text for text, learned in rendered.pieces if not learned)
    assert "hello" not in given
    assert given.count("<|im_start|>assistant\n") == 2
    whole = tiny_tokenizer.apply_chat_template(DIALOGUE["messages"], tokenize=False)
    assert "".join(text for text, _ in rendered.pieces) == whole


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_pieces_of_a_dialogue_concatenate_to_the_rendered_template(tiny_tokenizer, turns: list[tuple[str, str]]):
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    pieces = render(ROW | {"messages": messages}, CHAT, tiny_tokenizer, every_answer=True).pieces
    assert "".join(text for text, _ in pieces) == tiny_tokenizer.apply_chat_template(messages, tokenize=False)
    assert [learned for _, learned in pieces] == [False, True] * len(turns)


FORGETFUL = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}{{ '?' if add_generation_prompt }}"


def test_template_that_rewrites_earlier_answers_is_rejected(tiny_tokenizer):
    tiny_tokenizer = copy.deepcopy(tiny_tokenizer)
    tiny_tokenizer.chat_template = FORGETFUL
    with pytest.raises(DataError, match="or training.assistant_only_loss=false"):
        render(DIALOGUE, CHAT, tiny_tokenizer, every_answer=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ messages | length }} turns", "renders a dialogue differently"),
        (
            "{{ raise_exception('no system message') }}",
            "the roles user, assistant: no system message. Change the dialogue",
        ),
        ("{% if %}", "refuses a dialogue with the roles user, assistant: Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ({"tool_use": "x"}, "no default"),
    ],
    ids=str,
)
def test_unusable_chat_template_is_rejected(template: Any, message: str, tiny_tokenizer):
    tiny_tokenizer = copy.deepcopy(tiny_tokenizer)
    tiny_tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        render(ROW, DatasetConfig(format="chat"), tiny_tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ ('x' * 3000000000) | length }}",
        "{% set all = namespace(x='x') %}{% for i in range(40) %}{% set all.x = all.x ~ all.x %}{% endfor %}",
        "{{ '%9999999999d' % 1 }}",
        "{{ 'x' * 20000000 }}",
    ],
)
def test_template_that_never_ends_or_fills_the_memory_is_stopped(template: str, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(prompts, "_renderer", LimitedProcess(seconds=1, mib=256))
    asked = [{"role": "user", "content": "hi"}]
    with pytest.raises(ModelError, match="chat template needs more than .* for one dialogue"):
        prompts.render_chat(tiny_tokenizer, asked, template)
    assert prompts.render_chat(tiny_tokenizer, asked, "{{ messages[0].content }}") == "hi"


@pytest.mark.parametrize(
    "words",
    [
        ["dataset.format=alpaca"],
        ["dataset.format=prompt_completion"],
        ["dataset.format=chat"],
        ["dataset.format=chat", "dataset.system_message='Be \"brief\".\n{{ x }}'"],
        ["dataset.format=chat", "dataset.system_message='Sei höflich 🙂'"],
        ["dataset.format=prompt_completion", r"dataset.prompt_template='Q: {{\"{a}\"}}\n\tA:'"],
        ["dataset.format=prompt_completion", "dataset.prompt_template='{a}: {b}'"],
        ["dataset.format=prompt_completion", "dataset.prompt_template='Übung: {a}'"],
        ["dataset.format=prompt_completion", "dataset.prompt_template='{a} {a}'"],
    ],
    ids=str,
)
def test_generated_chat_template_renders_what_was_trained(words, tiny_tokenizer):
    config = compose(["model=tiny_llama", *words]).dataset
    template = prompts.chat_template(config, tiny_tokenizer)
    question = "Why {{ not }}?"
    asks_column = config.prompt_template is not None and config.prompt_template.count("}") % 2
    prompt = filled(config.prompt_template, {"a": question}) if asks_column else question
    row = {"prompt": prompt, "input": "", "completion": "Because.\n"}
    asked = [{"role": "user", "content": question}]
    text = tiny_tokenizer.apply_chat_template(asked, chat_template=template, tokenize=False, add_generation_prompt=True)
    pieces = prompts.render(row, config, tiny_tokenizer).pieces
    assert text == "".join(piece for piece, _ in pieces[:-1])
    answered = [*asked, {"role": "assistant", "content": row["completion"]}]
    whole = tiny_tokenizer.apply_chat_template(answered, chat_template=template, tokenize=False)
    end = "" if config.format == "chat" else tiny_tokenizer.eos_token
    assert whole == "".join(piece for piece, _ in pieces) + end
    assert "\\u" not in template  # llama.cpp does not support such escapes
    again = copy.copy(tiny_tokenizer)
    again.chat_template = template
    assert prompts.chat_template(config, again) == template


@pytest.mark.parametrize(
    ("format", "template", "warns"),
    [
        ("chat", "Q: {a}", True),
        ("chat", "{a}", False),
        ("prompt_completion", "Q: {a}", False),
        ("prompt_completion", "{a} {b}", True),
        ("prompt_completion", "{a}", False),
        ("prompt_completion", None, False),
    ],
)
def test_a_prompt_template_that_questions_will_not_get_is_named(format, template, warns, tiny_tokenizer, caplog):
    config = compose(["model=tiny_llama", f"dataset.format={format}"]).dataset
    config = config.model_copy(update={"prompt_template": template})
    assert prompts.served_template(config, tiny_tokenizer) == prompts.chat_template(config, tiny_tokenizer)
    assert (f"prompt_template='{template}'" in caplog.text) == warns


OWN_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def test_own_chat_template_replaces_the_tokenizers(tiny_tokenizer):
    mute = copy.deepcopy(tiny_tokenizer)
    mute.chat_template = None
    config = CHAT.model_copy(
        update={"chat_template": OWN_TEMPLATE + "{% if add_generation_prompt %}[assistant] {% endif %}"}
    )
    for tokenizer in (tiny_tokenizer, mute):
        (prompt, _), (answer, _) = render(DIALOGUE, config, tokenizer).pieces
        assert (prompt, answer) == ("[user] hi\n[assistant] hello\n[user] 2+3?\n[assistant] ", "5\n")
        assert prompts.chat_template(config, tokenizer) == config.chat_template
    with_system = config.model_copy(update={"system_message": "Be brief."})
    assert render(DIALOGUE, with_system, mute).pieces[0][0].startswith("[system] Be brief.\n[user] hi")


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ raise_exception('no') }}"])
def test_own_chat_template_that_fails_is_refused_with_its_reason(template: str, tiny_tokenizer):
    with pytest.raises(DataError, match="chat template refuses a dialogue with the roles user.*: (Unexpected end|no)"):
        render(DIALOGUE, CHAT.model_copy(update={"chat_template": template}), tiny_tokenizer)


def test_template_of_a_tokenizer_with_bos_begins_with_bos(tiny_tokenizer):
    again = copy.deepcopy(tiny_tokenizer)
    first = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    again.backend_tokenizer.post_processor = first
    template = prompts.chat_template(compose(["model=tiny_llama"]).dataset, again)
    asked = [{"role": "user", "content": "Why?"}]
    text = again.apply_chat_template(asked, chat_template=template, tokenize=False)
    assert again(text, add_special_tokens=False)["input_ids"] == again(text.removeprefix("<|im_start|>"))["input_ids"]


def test_plain_text_and_non_chat_models_have_no_template(tiny_tokenizer):
    config = compose(["model=tiny_llama", "dataset.format=text"]).dataset
    assert prompts.chat_template(config, tiny_tokenizer) is None
    mute = copy.deepcopy(tiny_tokenizer)
    mute.chat_template = None
    assert prompts.chat_template(compose(["model=tiny_llama", "dataset.format=chat"]).dataset, mute) is None


CALLS = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.tool_calls or [] %}WRITTEN{% endfor %}{{ m.content }}\n"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    "written",
    [
        "{{ c.function.arguments | tojson }}",  # Llama's, Mistral's, gpt-oss'
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",  # Qwen's
        "{{ '' + c.function.arguments }}",  # DeepSeek's
        "{{ c.function.arguments }}",
    ],
)
@pytest.mark.parametrize("arguments", [{"town": "Malmö", "n": 1}, '{"town": "Malmö", "n": 1}'])
def test_arguments_of_calls_are_written_once_whatever_the_template_takes(
    written: str, arguments: object, tiny_tokenizer
):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    dialogue = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = prompts.render_chat(tiny_tokenizer, dialogue, CALLS.replace("WRITTEN", written))
    assert text == 'user: q\nassistant: {"town": "Malmö", "n": 1}\n'


LATE_SYSTEM = (  # as Mistral's
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ messages[0].content + ': ' if loop.last and "
    "messages[0].role == 'system' }}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
THOUGHTS = (  # as gpt-oss': thoughts before calls are left out once there is an answer
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content and (loop.last or messages[-1].role == 'tool') %}"
    "({{ m.reasoning_content }}){% endif %}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    "{{ m.content or '' }}.{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = DatasetConfig(format="chat", messages_column="messages")


def said(role: str, content: str | None, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def test_answer_follows_the_prompt_of_templates_that_render_earlier_turns_otherwise(tiny_tokenizer):
    dialogue = [said("system", "Be kind"), *[said("user", "hi?"), said("assistant", "ho")] * 2]
    row = {"messages": dialogue}
    config = CHAT.model_copy(update={"chat_template": LATE_SYSTEM})
    TemplateCheck(config, tiny_tokenizer).check(row)
    assert render(row, config, tiny_tokenizer).pieces == [
        ("[INST]hi?[/INST]ho</s>[INST]Be kind: hi?[/INST]", False),
        ("ho</s>", True),
    ]
    with pytest.raises(DataError, match="renders a dialogue differently .* training.assistant_only_loss=false"):
        render(row, config, tiny_tokenizer, every_answer=True)
    call = said("assistant", None, reasoning_content="look", tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    row = {"messages": [said("user", "q"), call, said("tool", "r"), said("assistant", "a", reasoning_content="so")]}
    config = CHAT.model_copy(update={"chat_template": THOUGHTS})
    assert render(row, config, tiny_tokenizer).pieces == [
        ("<user>q.<assistant>(look)f.<tool>r.<assistant>", False),
        ("(so)a.", True),
    ]


EMPTY_THOUGHT = (  # as Qwen3's: the last answer begins with a thought, if an empty one
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and (loop.last or m.reasoning_content) %}"
    "({{ m.reasoning_content or '' }}){% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{% endfor %}.{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGOTTEN_THOUGHT = EMPTY_THOUGHT.replace("(loop.last or m.reasoning_content)", "loop.last")


@pytest.mark.parametrize(
    ("template", "empty"), [(EMPTY_THOUGHT, "()"), (EMPTY_THOUGHT.replace("loop.last or ", ""), "")]
)
def test_all_answers_of_a_completion_are_learned_as_the_whole_dialogue_has_them(
    template: str, empty: str, tiny_tokenizer
):
    call = said("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    asked = [said("user", "q"), said("assistant", "a"), said("user", "r")]
    learned = [call | {"train": True}, said("tool", "1"), said("assistant", "no", train=False), said("tool", "2")]
    learned += [said("assistant", "b", reasoning_content="so", train=True), said("tool", "3")]
    row = {"messages": [*asked, *learned, said("assistant", "c", train=True)]}
    pieces = [
        ("<user>q.<assistant>a.<user>r.<assistant>", False),
        ("f.", True),
        ("<tool>1.<assistant>no.<tool>2.<assistant>", False),
        ("(so)b.", True),
        ("<tool>3.<assistant>", False),
        (f"{empty}c.", True),
    ]
    config = CHAT.model_copy(update={"chat_template": template})
    assert render(row, config, tiny_tokenizer).pieces == pieces
    every = render(row, config, tiny_tokenizer, every_answer=True).pieces
    assert "".join(text for text, _ in every) == "".join(text for text, _ in pieces)
    assert [text for text, learned in every if learned] == ["a.", "f.", "(so)b.", f"{empty}c."]


def test_thought_that_the_whole_dialogue_does_not_have_is_no_answer(tiny_tokenizer):
    thought = said("assistant", "b", reasoning_content="so", train=True)
    row = {"messages": [said("user", "q"), thought, said("tool", "1"), said("assistant", "c", train=True)]}
    config = CHAT.model_copy(update={"chat_template": FORGOTTEN_THOUGHT})
    with pytest.raises(DataError, match="or completions of one message, or leave out what it changes"):
        render(row, config, tiny_tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        LATE_SYSTEM.replace("{{ m.content }}[/INST]", "{{ m.content }}{{ loop.last }}[/INST]"),  # not the same question
        LATE_SYSTEM.replace("{{ m.content }}</s>", "</s>"),  # no answer
        LATE_SYSTEM + "{% if add_generation_prompt %}<think>{% endif %}",
    ],
)
def test_answer_that_cannot_be_told_from_the_prompt_is_refused(template: str, tiny_tokenizer):
    row = {"messages": [said("system", "s"), said("user", "hi?"), said("assistant", "ho")]}
    with pytest.raises(DataError, match="renders a dialogue differently once it has an answer"):
        render(row, CHAT.model_copy(update={"chat_template": template}), tiny_tokenizer)
    quoted = {"messages": [said("system", "s"), said("user", "hi?"), said("assistant", "ho hi?[/INST] ha")]}
    with pytest.raises(DataError, match="renders a dialogue differently"):
        render(quoted, CHAT.model_copy(update={"chat_template": LATE_SYSTEM}), tiny_tokenizer)


def test_dialogue_needs_a_template_and_the_refusal_says_where_from(tiny_tokenizer):
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = None
    row = {"messages": [said("user", "q"), said("assistant", "a")]}
    with pytest.raises(DataError, match="no chat template; use dataset.chat_template=FILE.jinja or an"):
        render(row, CHAT, tokenizer)
