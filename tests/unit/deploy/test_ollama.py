"""The Modelfile's template says what the chat template says."""

import re

import pytest
from helpers.tiny_models import CHATML, tokenizer
from tokenizers import processors

from qlora_exp.config.hydra_compose import compose
from qlora_exp.data.prompts import chat_template
from qlora_exp.deploy.ollama import modelfile

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {% if loop.first %}{{ system }}{% endif %}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)


def rendered(template: str, system: str, prompt: str) -> str:
    """What Go makes of the few forms that are written, without the response."""
    if match := re.fullmatch(r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}(.*)", template, re.DOTALL):
        template = match[1 if system else 2] + match[3]
    assert "{{ if" not in template
    text = template.split("{{ .Response }}")[0]
    return text.replace("{{ .System }}", system).replace("{{ .Prompt }}", prompt)


@pytest.mark.parametrize("template", [LLAMA3, WITH_DEFAULT], ids=["llama3", "default"])
def test_modelfile_renders_a_turn_like_the_chat_template(template, own_tokenizer):
    own_tokenizer.chat_template = template
    if template == LLAMA3:  # whose tokenizer begins every text with BOS, as llama.cpp then does
        first = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
        own_tokenizer.backend_tokenizer.post_processor = first
    text = modelfile(own_tokenizer, "model.gguf")
    assert text.startswith("FROM ./model.gguf\n")
    go = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    default = re.search(r'SYSTEM """(.*?)"""', text, re.DOTALL)
    assert (default[1] if default else None) == ("You are helpful." if template == WITH_DEFAULT else None)
    for told in ("Be brief.", None):
        messages = [{"role": "system", "content": told}] if told else []
        asked = own_tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
        )
        system = told or (default[1] if default else "")
        assert rendered(go, system, "Why?") == asked.removeprefix("<|im_start|>" if template == LLAMA3 else "")
    assert 'PARAMETER stop """<|im_end|>"""' in text


@pytest.fixture
def own_tokenizer():
    """Load a tokenizer that the test may change."""
    from qlora_exp.models.base import load_tokenizer

    return load_tokenizer(compose(["model=tiny_llama"]).model)


@pytest.mark.parametrize("format_", ["alpaca", "prompt_completion", "chat"])
def test_modelfile_renders_prompts_like_the_training_format(format_, own_tokenizer):
    config = compose(["model=tiny_llama", f"dataset.format={format_}"]).dataset
    own_tokenizer.chat_template = chat_template(config, own_tokenizer)
    go = re.search(r'TEMPLATE """(.*?)"""', modelfile(own_tokenizer, "x.gguf"), re.DOTALL)[1]
    asked = [{"role": "user", "content": "Why?"}]
    assert rendered(go, "", "Why?") == own_tokenizer.apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    assert ("{{ .System }}" in go) == (format_ == "chat")


def test_template_cannot_inject_modelfile_directives(own_tokenizer):
    for evil in ('"""\nADAPTER /etc/passwd\nSYSTEM """', 'ends with "'):
        own_tokenizer.chat_template = WITH_DEFAULT.replace("You are helpful.", evil)
        text = modelfile(own_tokenizer, "x.gguf")
        assert "ADAPTER" not in text
        assert "SYSTEM" not in text
        assert text.count('"""') % 2 == 0


def test_modelfile_without_chat_template_continues_text(own_tokenizer):
    own_tokenizer.chat_template = None
    assert 'TEMPLATE """{{ .System }}{{ .Prompt }}{{ .Response }}"""' in modelfile(own_tokenizer, "x.gguf")


def test_ollama_stops_at_text_that_ends_the_chat_templates_turns():
    for end in ("### End\n", "\n\nUser:"):
        text = modelfile(tokenizer(eos_token="<|endoftext|>", template=WITH_DEFAULT.replace("<|im_end|>\n", end)), "x")
        assert f'PARAMETER stop """{end.rstrip()}"""\n' in text


def test_ollama_stops_at_the_end_of_the_chat_templates_turns():
    text = modelfile(tokenizer(eos_token="<|endoftext|>"), "model.gguf")
    assert 'PARAMETER stop """<|endoftext|>"""' in text
    assert 'PARAMETER stop """<|im_end|>"""' in text


HEADER = (
    "<|im_start|>system\nToday: 26 Jul 2024\n{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% set messages = messages[1:] %}{% endif %}<|im_end|>"
)
LAST = (
    "{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] + ' ' %}"
    "{% set messages = messages[1:] %}{% else %}{% set told = '' %}{% endif %}{% for m in messages %}"
    "[{{ told if loop.last and m['role'] == 'user' else '' }}{{ m['content'] }}]{% endfor %}"
)
TRIMS = CHATML.replace("m['content']", "m['content'] | trim")
THINKS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
BRACES = CHATML.replace("<|im_start|>", "{{ '{{ .Prompt }}' }}<|im_start|>")
DEMANDS = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message must come first') }}{% endif %}"


@pytest.mark.parametrize(
    "template",
    [HEADER + CHATML, "<|endoftext|>" + CHATML, LAST, LLAMA2, DEMANDS + CHATML, TRIMS, THINKS, BRACES],
)
def test_format_that_no_template_of_a_turn_renders_is_left_to_the_gguf_file(template):
    text = modelfile(tokenizer(template=template), "model.gguf")
    assert "TEMPLATE" not in text
    assert "SYSTEM" not in text
    assert "PARAMETER stop" in text
