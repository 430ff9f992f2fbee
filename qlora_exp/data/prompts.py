"""Turn a row into text: the prompt that the model gets, and the answer that it learns.

The two Alpaca prompts are copied from tatsu-lab/stanford_alpaca. Does not depend on files or tokens.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data.dialogues import SYSTEM_ROLES, Message
from qlora_exp.utils.errors import DataError, first_line

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
    """Text pieces in order, each with True if it is an answer to learn. The last piece answers all those before it."""
    has_special_tokens: bool
    """Whether the text already contains the chat template's special tokens, so that the tokenizer must add none."""


def render(row: dict[str, Any], config: DatasetConfig, tokenizer: Any, every_answer: bool = False) -> Rendered:
    """Render `row` as text in the configured format.

    Args:
        row: a row of `rows.load_rows`, with `prompt`, `input`, `completion`, and `messages` (and `tools`) if it is a
            complete dialogue.
        config: the dataset's config; `format` and `system_message` are used.
        tokenizer: used for its chat template only, which needs no `{% generation %}` marks.
        every_answer: learn all assistant turns of a dialogue, instead of the last one only.

    Raises:
        DataError: format `chat`, and the tokenizer has no chat template, or one that refuses the dialogue or rewrites
            earlier turns.
    """
    if config.format == "text":
        return Rendered([("", False), (row["completion"], True)], False)
    if config.format == "alpaca":
        template = ALPACA_WITH_INPUT if row["input"] else ALPACA_WITHOUT_INPUT
        alpaca_prompt = template.format(prompt=row["prompt"], input=row["input"])
        return Rendered([(alpaca_prompt, False), (row["completion"], True)], False)
    if config.format == "prompt_completion":
        return Rendered([(_asked(row), False), (row["completion"], True)], False)
    dialogue = messages(row, config)
    tools = row.get("tools")
    answers = [place for place, message in enumerate(dialogue) if message["role"] == "assistant"]
    pieces, rendered = [], ""
    for place in answers if every_answer else answers[-1:]:
        before = apply_template(tokenizer, dialogue[:place], tools, add_generation_prompt=True)
        through_answer = apply_template(tokenizer, dialogue[: place + 1], tools)
        if not (before.startswith(rendered) and through_answer.startswith(before)):
            raise DataError(
                "dataset.format=chat: this model's chat template renders a dialogue differently once it has an answer, "
                "so that training prompts would differ from those of generation; use dataset.format=alpaca"
                + (", or training.assistant_only_loss=false" if every_answer else "")
            )
        pieces += [(before[len(rendered) :], False), (through_answer[len(before) :], True)]
        rendered = through_answer
    return Rendered(pieces, True)


def messages(row: Mapping[str, Any], config: DatasetConfig) -> list[Message]:
    """Return a row's dialogue, with the config's system message unless it has its own."""
    dialogue: list[Message] = row.get("messages") or [
        {"role": "user", "content": _asked(row)},
        {"role": "assistant", "content": row["completion"]},
    ]
    if config.system_message and dialogue[0]["role"] not in SYSTEM_ROLES:
        return [{"role": "system", "content": config.system_message}, *dialogue]
    return dialogue


def apply_template(tokenizer: Any, dialogue: list[Message], tools: Any, **options: Any) -> str:
    """Render a dialogue with the tokenizer's chat template.

    Raises:
        DataError: there is no template, or it refuses the dialogue.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "dataset.format=chat: this model's tokenizer has no chat template; use dataset.format=alpaca, "
            "or an instruction-tuned model"
        )
    if tools:
        options["tools"] = tools
    try:
        return str(tokenizer.apply_chat_template(dialogue, tokenize=False, **options))
    except Exception as error:  # templates raise errors of any kind; each is about this dialogue
        roles = ", ".join(message["role"] for message in dialogue) or "none, since the dialogue begins with an answer"
        raise DataError(
            f"dataset.format=chat: this model's chat template refuses a dialogue with the roles {roles}: "
            f"{first_line(error)}. Change the dialogue (or dataset.system_message), or use another model or format"
        ) from error


def _asked(row: Mapping[str, Any]) -> str:
    return "\n\n".join(filter(None, [row["prompt"], row["input"]]))


def chat_template(config: DatasetConfig, tokenizer: Any) -> str | None:
    """Return a Jinja chat template that renders a dialogue as `render` renders rows.

    Programs that take a template need it: servers, GGUF files.

    Args:
        config: the dataset's config of the run; `format` and `system_message` are used.
        tokenizer: the model's tokenizer. With format `chat`, its own template is returned, with the run's system
            message added.

    Returns:
        The template; None if the run was trained on plain text, since there is no dialogue to render.
    """
    if config.format == "text" or (config.format == "chat" and not tokenizer.chat_template):
        return None
    if config.format == "chat":
        own: str = tokenizer.get_chat_template()
        if config.system_message is None:
            return own
        message = json.dumps(config.system_message, ensure_ascii=False)  # llama.cpp does not support \u escapes
        begin = (
            "{% if messages[0]['role'] != 'system' and messages[0]['role'] != 'developer' %}"
            f"{{% set messages = [{{'role': 'system', 'content': {message}}}] + messages %}}{{% endif %}}"
        )
        return own if own.startswith(begin) else begin + own
    template = ALPACA_WITHOUT_INPUT if config.format == "alpaca" else "{prompt}"
    before, after = (json.dumps(part) for part in template.split("{prompt}"))
    begin = "{{ bos_token }}" if adds_bos(tokenizer) else ""
    message = json.dumps(
        f"this model was trained on prompts of format {config.format}, which has only user and assistant turns"
    )
    return (
        f"{begin}{{% for message in messages %}}"
        f"{{% if message['role'] == 'user' %}}{{{{ {before} + message['content'] + {after} }}}}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        f"{{% else %}}{{{{ raise_exception({message}) }}}}{{% endif %}}{{% endfor %}}"
    )


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer begins every text with its BOS token."""
    first = tokenizer("a")["input_ids"][:1]
    return bool(first and first[0] == tokenizer.bos_token_id)
