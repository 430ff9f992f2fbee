"""How a row becomes text: what the model is given, and what it must answer.

Alpaca's two prompts are those of tatsu-lab/stanford_alpaca. Knows nothing of files or tokens.
"""

import json
from typing import Any, NamedTuple

from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.utils.errors import DataError

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)


class Rendered(NamedTuple):
    """One row as text."""

    pieces: list[tuple[str, bool]]
    """In order, each with whether it is an answer to learn; the last one is the answer to the whole of the others."""
    has_special_tokens: bool
    """The chat template wrote the special tokens, so that the tokenizer must add none."""


def render(row: dict[str, Any], config: DatasetConfig, tokenizer: Any, every_answer: bool = False) -> Rendered:
    """What `row` gives and what it asks for.

    Args:
        row: as `data.load_rows` gives it: `prompt`, `input`, `completion`, and `messages` for whole dialogues.
        config: names the format.
        tokenizer: used for its chat template only; that needs no marks of what the assistant says.
        every_answer: of a dialogue each of the assistant's turns is to be learned, not the last alone.

    Raises:
        DataError: format `chat` with a tokenizer that has no chat template, or one that rewrites earlier turns.
    """
    if config.format == "text":
        return Rendered([("", False), (row["completion"], True)], False)
    if config.format == "alpaca":
        template = ALPACA_WITH_INPUT if row["input"] else ALPACA_WITHOUT_INPUT
        asked = template.format(prompt=row["prompt"], input=row["input"])
        return Rendered([(asked, False), (row["completion"], True)], False)
    prompt = f"{row['prompt']}\n\n{row['input']}" if row["input"] else row["prompt"]
    if config.format == "prompt_completion":
        return Rendered([(prompt, False), (row["completion"], True)], False)

    messages = row.get("messages") or [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": row["completion"]},
    ]
    if config.system_message:
        messages = [{"role": "system", "content": config.system_message}, *messages]
    if not tokenizer.chat_template:
        raise DataError(
            "dataset.format=chat: this model's tokenizer has no chat template; use dataset.format=alpaca, "
            "or an instruction-tuned model"
        )
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    pieces, told = [], ""
    for place in answers if every_answer else answers[-1:]:
        before = tokenizer.apply_chat_template(messages[:place], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: place + 1], tokenize=False)
        if not (before.startswith(told) and whole.startswith(before)):
            raise DataError(
                "dataset.format=chat: this model's chat template renders a dialogue differently once it is answered, "
                "so that training would not match what the model sees later; use dataset.format=alpaca"
                + (", or training.assistant_only_loss=false" if every_answer else "")
            )
        pieces += [(before[len(told) :], False), (whole[len(before) :], True)]
        told = whole
    return Rendered(pieces, True)


def chat_template(config: DatasetConfig, tokenizer: Any) -> str | None:
    """The Jinja template that renders a dialogue as `render` renders rows, for whatever takes one: servers, GGUF files.

    Args:
        config: names the format that the run was trained with.
        tokenizer: of the model; with format `chat` its own template is the answer, a system message of the run added.

    Returns:
        None if the run was trained on plain text: there is no dialogue to render.
    """
    if config.format == "text" or (config.format == "chat" and not tokenizer.chat_template):
        return None
    if config.format == "chat":
        own: str = tokenizer.get_chat_template()
        if config.system_message is None:
            return own
        told = json.dumps(config.system_message, ensure_ascii=False)  # llama.cpp knows no \u
        begin = (
            "{% if messages[0]['role'] != 'system' %}"
            f"{{% set messages = [{{'role': 'system', 'content': {told}}}] + messages %}}{{% endif %}}"
        )
        return own if own.startswith(begin) else begin + own
    asked = ALPACA_WITHOUT_INPUT if config.format == "alpaca" else "{prompt}"
    before, after = (json.dumps(part) for part in asked.split("{prompt}"))
    begin = "{{ bos_token }}" if adds_bos(tokenizer) else ""
    refused = json.dumps(f"this model was trained on prompts of format {config.format}, which know user and assistant")
    return (
        f"{begin}{{% for message in messages %}}"
        f"{{% if message['role'] == 'user' %}}{{{{ {before} + message['content'] + {after} }}}}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        f"{{% else %}}{{{{ raise_exception({refused}) }}}}{{% endif %}}{{% endfor %}}"
    )


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every text with its BOS token."""
    first = tokenizer("a")["input_ids"][:1]
    return bool(first and first[0] == tokenizer.bos_token_id)
