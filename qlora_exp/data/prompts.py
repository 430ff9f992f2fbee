"""Turn a row into text: the prompt that the model gets, and the answer that it learns.

Chat templates are programs that come with a model. They are rendered in a process with limits of time and memory.
The two Alpaca prompts are copied from tatsu-lab/stanford_alpaca. Does not depend on files or tokens.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data.dialogues import (
    SYSTEM_ROLES,
    Message,
    answer_after,
    answer_within,
    arguments_of,
    calls_of,
    learned,
    learns,
    with_arguments,
)
from qlora_exp.utils import prompt_templates
from qlora_exp.utils.errors import DataError, ModelError
from qlora_exp.utils.processes.limits import FailedError, LimitedProcess, LimitError
from qlora_exp.utils.units import MIB

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
_LONGEST_TEXT = 16 * MIB
_QUESTION = "\0question\0"
_renderer = LimitedProcess()

log = logging.getLogger(__name__)


class Rendered(NamedTuple):
    """One row as text."""

    pieces: list[tuple[str, bool]]
    """Text pieces in order, each with True if it is an answer to learn. The last piece answers all those before it."""
    has_special_tokens: bool
    """Whether the text already contains the chat template's special tokens, so that the tokenizer must add none."""


class _Request(NamedTuple):
    """Beginnings of a dialogue to be rendered."""

    dialogue: list[Message]
    tools: Any
    parts: list[tuple[int, bool]]
    """So many messages, and whether the mark of an answer follows."""


def render(row: dict[str, Any], config: DatasetConfig, tokenizer: Any, every_answer: bool = False) -> Rendered:
    """Render `row` as text in the configured format.

    Args:
        row: a row of `rows.load_rows`, with `prompt`, `input`, `completion`, and `messages` (and `tools`) if it is a
            complete dialogue.
        config: the dataset's config; `format`, `system_message` and `chat_template` are used.
        tokenizer: used for its chat template only, which needs no `{% generation %}` marks.
        every_answer: learn all assistant turns of a dialogue, instead of the last one, or those of a completion of
            several messages; in both cases without those that the row excludes.

    Raises:
        DataError: format `chat`, and the tokenizer has no chat template, or one that refuses the dialogue or rewrites
            earlier turns.
    """
    return render_all([row], config, tokenizer, every_answer)[0]


def render_all(
    rows: Sequence[dict[str, Any]], config: DatasetConfig, tokenizer: Any, every_answer: bool = False
) -> list[Rendered]:
    """Render several rows as `render` does; their templates in one call, as this takes longer than most templates do.

    Raises:
        DataError: one of the rows cannot be rendered. The error may name another one; render them one by one to know.
        ModelError: the template needs too much time or memory for one of the rows, or for all together.
    """
    if config.format != "chat":
        return [_plain(row, config) for row in rows]
    dialogues, places, requests = [], [], []
    for row in rows:
        marked = turns(row, config)
        answers = [place for place, message in enumerate(marked) if learns(message)]
        places.append(answers if every_answer else learned(marked))
        dialogues.append(messages(row, config))
        asked, answered = [(place, True) for place in places[-1]], [(place + 1, False) for place in places[-1]]
        requests.append(_Request(dialogues[-1], row.get("tools"), [*asked, *answered]))
    rendered = _applied(tokenizer, config, requests)
    return [Rendered(_pieces(*parts, every_answer), True) for parts in zip(dialogues, places, rendered, strict=True)]


def _plain(row: Mapping[str, Any], config: DatasetConfig) -> Rendered:
    if config.format == "text":
        return Rendered([("", False), (row["completion"], True)], False)
    if config.format == "alpaca":
        template = ALPACA_WITH_INPUT if row["input"] else ALPACA_WITHOUT_INPUT
        alpaca_prompt = template.format(prompt=row["prompt"], input=row["input"])
        return Rendered([(alpaca_prompt, False), (row["completion"], True)], False)
    return Rendered([(_asked(row), False), (row["completion"], True)], False)


def _pieces(dialogue: list[Message], places: list[int], texts: list[str], every_answer: bool) -> list[tuple[str, bool]]:
    """Return the pieces of a dialogue by its beginnings: those before the answers, then those with each answer."""
    pieces, rendered = [], ""
    for place, before, through_answer in zip(places, texts[: len(places)], texts[len(places) :], strict=True):
        answer = through_answer[len(before) :] if through_answer.startswith(before) else None
        if len(places) == 1 and answer is None:
            answer = answer_after(before, through_answer, dialogue[place - 1], dialogue[place])
        elif answer is not None:
            answer = answer_within(texts[-1], before, answer, dialogue[place])
        if not before.startswith(rendered) or answer is None:
            raise DataError(
                "dataset.format=chat: this model's chat template renders a dialogue differently once it has an answer, "
                "so that training prompts would differ from those of generation; use another template "
                "(dataset.chat_template=FILE.jinja), a format without one"
                + (", or training.assistant_only_loss=false" if every_answer else "")
                + (", or completions of one message" if len(places) > 1 and not every_answer else "")
                + ", or leave out what it changes, such as the reasoning of earlier answers"
            )
        pieces += [(before[len(rendered) :], False), (answer, True)]
        rendered = before + answer
    return pieces


def messages(row: Mapping[str, Any], config: DatasetConfig) -> list[Message]:
    """Return a row's dialogue as the template gets it, with the config's system message unless it has its own."""
    dialogue = turns(row, config)
    return [{key: value for key, value in message.items() if key != "train"} for message in dialogue]


def turns(row: Mapping[str, Any], config: DatasetConfig) -> list[Message]:
    """Return a row's dialogue as `messages` does, but with what says that an answer is not to be learned."""
    dialogue: list[Message] = row.get("messages") or [
        {"role": "user", "content": _asked(row)},
        {"role": "assistant", "content": row["completion"]},
    ]
    if config.system_message and dialogue[0]["role"] not in SYSTEM_ROLES:
        return [{"role": "system", "content": config.system_message}, *dialogue]
    return dialogue


def apply_template(tokenizer: Any, config: DatasetConfig, dialogue: list[Message], tools: Any) -> str:
    """Render a dialogue of a dataset with its chat template, or the tokenizer's.

    Raises:
        DataError: there is no template, or it refuses the dialogue.
        ModelError: it needs too much time or memory.
    """
    return _applied(tokenizer, config, [_Request(dialogue, tools, [(len(dialogue), False)])])[0][0]


def render_chat(
    tokenizer: Any, dialogue: list[Message], template: str | None = None, add_generation_prompt: bool = False
) -> str:
    """Render a dialogue with a chat template (None: the tokenizer's own), as its `apply_chat_template` does.

    Raises:
        DataError: the template refuses the dialogue.
        ModelError: it needs too much time or memory.
    """
    return _parts(tokenizer, template, [_Request(dialogue, None, [(len(dialogue), add_generation_prompt)])])[0][0]


def _applied(tokenizer: Any, config: DatasetConfig, requests: list[_Request]) -> list[list[str]]:
    if not (config.chat_template or tokenizer.chat_template):
        raise DataError(
            "dataset.format=chat: this model's tokenizer has no chat template; use dataset.chat_template=FILE.jinja or "
            "an instruction-tuned model; rows with a prompt and an answer of text can also be read by "
            "dataset.format=prompt_completion or alpaca"
        )
    try:
        return _parts(tokenizer, config.chat_template, requests)
    except DataError as error:
        raise DataError(
            f"dataset.format=chat: {error}. Change the dialogue (or dataset.system_message), or use another model or "
            "format"
        ) from error


def _parts(tokenizer: Any, template: str | None, requests: list[_Request]) -> list[list[str]]:
    """Render the beginnings of dialogues, all in one call of the other process."""
    try:
        calls = []
        for dialogue, tools, parts in requests:
            values = {**tokenizer.special_tokens_map, "tools": tools or None}
            calls.append((tokenizer.get_chat_template(template, tools or None), dialogue, values, parts))
        texts: list[list[str]] = _renderer.call(_all_rendered, calls)
    except LimitError as error:
        raise ModelError(f"this model's chat template needs {error} for one dialogue; use another model") from error
    except (FailedError, ValueError) as error:  # ValueError: of several templates none is the default
        roles = ", ".join(message["role"] for message in requests[0].dialogue)
        raise DataError(f"this model's chat template refuses a dialogue with the roles {roles}: {error}") from error
    return texts


def end_renderer() -> None:
    """End the process that renders templates; the next rendering starts another one."""
    _renderer.close()


def _all_rendered(calls: list[tuple[str, list[Message], dict[str, Any], list[tuple[int, bool]]]]) -> list[list[str]]:
    return [_rendered(*call) for call in calls]


def _rendered(
    template: str, dialogue: list[Message], values: dict[str, Any], parts: list[tuple[int, bool]]
) -> list[str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    if not all(length for length, _ in parts):
        raise ValueError("it begins with an answer")

    def render(messages: list[Message]) -> list[str]:
        texts: list[str] = []
        for length, prompt in parts:
            options = {**values, "add_generation_prompt": prompt}
            rendered: Any = render_jinja_template(conversations=[messages[:length]], chat_template=template, **options)
            texts += rendered[0]  # with it come the places of answers
        return texts

    stated = [{key: value for key, value in message.items() if value is not None} for message in dialogue]
    called, written = with_arguments(stated, as_objects=True), with_arguments(stated, as_objects=False)
    written = [{"content": None, **message} if calls_of(message) else message for message in written]
    try:
        texts = render(called)
    except Exception:  # of any kind: a template is a program, and may take arguments as text only
        if called == written:
            raise
        texts = []
    # DeepSeek's templates take arguments as text only, and a content, and others write objects as Python does; but
    # most would quote a text once more.
    if not texts or any(repr(arguments) in texts[-1] for arguments in arguments_of(called) if arguments):
        texts = render(written)
    if sum(map(len, texts)) > _LONGEST_TEXT * len(texts):
        raise MemoryError
    return texts


def _asked(row: Mapping[str, Any]) -> str:
    return "\n\n".join(filter(None, [row["prompt"], row["input"]]))


def chat_template(config: DatasetConfig, tokenizer: Any) -> str | None:
    """Return a Jinja chat template that renders a dialogue as `render` renders rows.

    Programs that take a template need it: servers, GGUF files.

    Args:
        config: the dataset's config of the run; its format, templates and system message are used.
        tokenizer: the model's tokenizer. With format `chat`, the config's template or else its own is returned, with
            the run's system message added.

    Returns:
        The template; None if the run was trained on plain text, since there is no dialogue to render.
    """
    if config.format == "text":
        return None
    if config.format == "chat":
        if not (config.chat_template or tokenizer.chat_template):
            return None
        own: str = config.chat_template or tokenizer.get_chat_template()
        if config.system_message is None:
            return own
        message = json.dumps(config.system_message, ensure_ascii=False)  # llama.cpp does not support \u escapes
        begin = (
            "{% if messages[0]['role'] != 'system' and messages[0]['role'] != 'developer' %}"
            f"{{% set messages = [{{'role': 'system', 'content': {message}}}] + messages %}}{{% endif %}}"
        )
        return own if own.startswith(begin) else begin + own
    before, after = (json.dumps(part, ensure_ascii=False) for part in _around_question(config))
    begin = _beginning(tokenizer, unless_blank=before == '""')
    message = json.dumps(
        f"this model was trained on prompts of format {config.format}, which has only user and assistant turns"
    )
    return (
        f"{begin}{{% for message in messages %}}"
        f"{{% if message['role'] == 'user' %}}{{{{ {before} + message['content'] + {after} }}}}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        f"{{% else %}}{{{{ raise_exception({message}) }}}}{{% endif %}}{{% endfor %}}"
    )


def served_template(config: DatasetConfig, tokenizer: Any) -> str | None:
    """Return `chat_template` for a model that others will ask, with a warning if questions must be written otherwise.

    That is so where `prompt_template` wrote the prompts of the rows, and the template cannot: in format `chat`, and
    where it names several columns.
    """
    if (template := config.prompt_template) and _around_question(config) == ["", ""]:
        columns = prompt_templates.columns(template)
        if prompt_templates.filled(template, dict.fromkeys(columns, _QUESTION)) != _QUESTION:
            log.warning(
                "the prompts of the rows were written by dataset.prompt_template=%r, and a question is sent as it is: "
                "write it in that form",
                template,
            )
    return chat_template(config, tokenizer)


def _around_question(config: DatasetConfig) -> list[str]:
    """Return the texts before and after a question; none if it is the whole prompt, as for several columns."""
    if config.format == "alpaca":
        return ALPACA_WITHOUT_INPUT.split("{prompt}")
    if config.format == "chat" or config.prompt_template is None:
        return ["", ""]
    if len(columns := prompt_templates.columns(config.prompt_template)) > 1:
        return ["", ""]
    parts = prompt_templates.filled(config.prompt_template, {columns[0]: _QUESTION}).split(_QUESTION)
    return parts if len(parts) == 2 else ["", ""]


def _beginning(tokenizer: Any, unless_blank: bool) -> str:
    """Return the beginning of a template whose prompts have the tokens that the tokenizer puts before every text.

    Args:
        tokenizer: the model's tokenizer. Some mark the beginning of a text with a blank, but not after such tokens.
        unless_blank: whether a prompt may begin with a blank, to which these tokenizers add none.
    """
    ids, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    count = next((place for place in range(len(ids)) if ids[place : place + len(plain)] == plain), 0)
    begin = "".join(tokenizer.convert_ids_to_tokens(ids[:count]))
    after_blank = tokenizer(f"{begin} a", add_special_tokens=False)["input_ids"]
    marked = bool(begin) and after_blank == ids[: len(after_blank)]
    text = f"{begin} " if marked and not unless_blank else begin
    written = f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
    if not marked or not unless_blank:
        return written
    content = "messages[0]['content']"
    # llama.cpp's `[0]` is a byte, which other characters have too.
    marked_already = " or ".join(f"{content}.startswith('{mark}')" for mark in " ▁")
    return f"{written}{{% if {content} and not ({marked_already}) %}}{{{{ ' ' }}}}{{% endif %}}"


def begins_with_bos(tokenizer: Any) -> bool:
    """Return whether prompts begin with BOS: by the chat template if there is one, else by the tokenizer."""
    if not adds_bos(tokenizer) or (prompt := short_prompt(tokenizer)) is None:
        return adds_bos(tokenizer)
    return prompt.startswith(tokenizer.bos_token)


def short_prompt(tokenizer: Any) -> str | None:
    """Return a prompt of the tokenizer's chat template; None if it has none, or refuses short dialogues."""
    if not tokenizer.chat_template:
        return None
    question = {"role": "user", "content": "a"}
    for dialogue in ([question], [{"role": "system", "content": "a"}, question]):
        with suppress(DataError):  # some templates need a system message
            return render_chat(tokenizer, dialogue)
    return None


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer begins every text with its BOS token."""
    first = tokenizer("a")["input_ids"][:1]
    return bool(first and first[0] == tokenizer.bos_token_id)
