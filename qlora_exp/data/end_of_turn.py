"""Find what ends an answer: the token or the text that the chat template puts after it, else EOS."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from qlora_exp.data.dialogues import Message
from qlora_exp.data.prompts import render_chat
from qlora_exp.utils.errors import DataError

_QUESTION, _ANSWER = "What is 6 times 7?", "SampleAnswer42"


class EndOfTurn(NamedTuple):
    """What a prompt format puts after an answer."""

    token: int | None
    """Id of the token that ends an answer; None if the format has none."""
    text: str
    """The text after an answer."""

    @property
    def stop(self) -> str | None:
        """Text that ends an answer where no token does; None if a token does, or if nothing follows an answer."""
        return self.text.rstrip() or None if self.token is None else None


def end_of_turn(tokenizer: Any, template: str | None) -> EndOfTurn:
    """Return what ends an answer in a prompt format.

    Args:
        tokenizer: the model's tokenizer.
        template: the format as a Jinja chat template (`prompts.chat_template`); None: plain text, which ends with EOS.

    Raises:
        DataError: the template refuses a question with its answer.
        ModelError: the template needs too much time or memory.
    """
    if template is None:
        return EndOfTurn(tokenizer.eos_token_id, tokenizer.eos_token)
    text = _rendered(tokenizer, template).rpartition(_ANSWER)[2]
    added = tokenizer.added_tokens_decoder  # its tokens are never a part of other text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    marks = [token for token in ids if token in added and added[token].content.strip()]
    special = [token for token in marks if added[token].special]
    return EndOfTurn(next(iter([*special, *marks]), None), text)


def closed_once(messages: list[Message], tokenizer: Any, end: EndOfTurn) -> list[Message]:
    """Return messages whose answers do not end with the EOS that the prompt format adds; exported ones often do.

    Args:
        messages: a dialogue.
        tokenizer: the model's tokenizer.
        end: what the prompt format puts after an answer.
    """
    if not end.text.lstrip().startswith(tokenizer.eos_token):
        return messages
    ends = re.compile(rf"(?:{re.escape(tokenizer.eos_token)}\s*)+$")
    return [
        {**message, "content": ends.sub("", message["content"])}
        if message["role"] == "assistant" and message.get("content")
        else message
        for message in messages
    ]


def before_end(text: str, stops: Iterable[str]) -> str:
    """Return a generated answer up to the first text that ends it."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)]


def _rendered(tokenizer: Any, template: str) -> str:
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    for messages in (turns, [{"role": "system", "content": "Be brief."}, *turns]):
        try:
            return render_chat(tokenizer, messages, template)
        except DataError as error:  # some templates need a system message
            refused = error
    raise DataError(f"this model's chat template refuses a question with its answer: {refused.__cause__}") from refused
