"""Write an Ollama Modelfile for a GGUF file: the prompt format of a dialogue, and where an answer ends.

Ollama uses Go templates (https://docs.ollama.com/modelfile); this one is derived from what the tokenizer's chat
template renders. Does not read weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_exp.data.dialogues import Message
from qlora_exp.data.end_of_turn import end_of_turn
from qlora_exp.data.prompts import adds_bos, render_chat
from qlora_exp.utils.errors import DataError

_CONTINUES = "{{ .System }}{{ .Prompt }}{{ .Response }}"
_SYSTEM, _ASKED, _ANSWER = "\x01system\x01", "\x01asked\x01", "\x01answer\x01"


def modelfile(tokenizer: Any, file: str) -> str:
    """Return the text of a Modelfile for the GGUF file `file` in the same folder.

    Args:
        tokenizer: has the chat template of the format that the model was trained with. If it has none, the Modelfile
            lets the model continue the prompt as plain text.
        file: name of the GGUF file.

    Returns:
        The text. A template that a Modelfile cannot contain is left out; Ollama then uses the GGUF file's own.
    """
    try:
        template, system = _template(tokenizer) if tokenizer.chat_template else (_CONTINUES, None)
    except DataError:  # it refuses a dialogue without a system message, which no Modelfile can
        template, system = None, None
    end = end_of_turn(tokenizer, tokenizer.get_chat_template() if tokenizer.chat_template else None)
    stops = [tokenizer.eos_token]
    stops += [] if end.token is None else [tokenizer.convert_ids_to_tokens(end.token)]
    stops += [] if end.stop is None else [end.stop]
    directives = [("TEMPLATE", template or ""), ("SYSTEM", system or "")]
    directives += [("PARAMETER stop", stop) for stop in dict.fromkeys(stops)]
    # Three quotes in a text would end its directive there, and the rest could be read as further directives.
    written = [f'{name} """{text}"""' for name, text in directives if text and '"""' not in text and text[-1] != '"']
    return "\n".join([f"FROM ./{file}", *written]) + "\n"


def _template(tokenizer: Any) -> tuple[str | None, str | None]:
    """Return the Go template of one turn, and the default system message (None if the chat template inserts none).

    The template is None if Ollama would not make of it what the chat template renders. Ollama then renders that.
    """
    turn = _turn(tokenizer)
    if "{{" in f"{turn.first}{turn.alone}{turn.after}" or not all(
        turn.dialogue(dialogue) == _prompt(tokenizer, dialogue) for dialogue in _dialogues(turn)
    ):
        return None, None
    go = _go(turn.alone)
    if turn.first is not None:
        go = f"{{{{ if .System }}}}{_go(turn.first)}{{{{ else }}}}{go}{{{{ end }}}}"
    return go + "{{ .Response }}" + turn.after, turn.system


@dataclass(frozen=True)
class _Turn:
    """Parts of a Go template, with marks for what is asked and said."""

    first: str | None
    """A turn up to the answer, if there is a system message; None if the format has none."""
    alone: str
    """A turn up to the answer, without a system message."""
    after: str
    """What follows an answer."""
    system: str | None
    """Default system message."""

    def dialogue(self, dialogue: list[Message]) -> str:
        """Render a dialogue as Ollama 0.33 does: turn by turn, each with a system message if one precedes it."""
        if self.system is not None and dialogue[0]["role"] != "system":
            dialogue = [{"role": "system", "content": self.system}, *dialogue]
        text, system = "", ""
        for message in dialogue:
            content = message["content"]
            if message["role"] == "system":
                system = content
            elif message["role"] == "assistant":
                text += content + self.after
            else:
                turn = self.first if system and self.first is not None else self.alone
                text += turn.replace(_SYSTEM, system).replace(_ASKED, content)
                system = ""
        return text


def _turn(tokenizer: Any) -> _Turn:
    """Return the parts that a Go template would have, read off renderings of the chat template."""
    asked, answer, told = (
        {"role": role, "content": mark}
        for role, mark in (("user", _ASKED), ("assistant", _ANSWER), ("system", _SYSTEM))
    )
    first = _prompt(tokenizer, [asked])
    after, later = _prompt(tokenizer, [asked, answer], ask=False), _prompt(tokenizer, [asked, answer, asked])
    after = after.partition(_ANSWER)[2]
    turn, system = later.partition(_ANSWER)[2].removeprefix(after), None
    try:
        with_system = _prompt(tokenizer, [told, asked])
    except DataError:  # a format without system messages
        with_system = ""
    if _SYSTEM not in with_system:
        return _Turn(None, first, after, None)
    before, behind = with_system.split(_SYSTEM, 1)
    if first != turn and first.startswith(before) and first.endswith(behind):
        system = first[len(before) : len(first) - len(behind)] or None  # an empty one cannot be written
    return _Turn(with_system, first if system is None else turn, after, system)


def _dialogues(turn: _Turn) -> Iterator[list[Message]]:
    """Yield dialogues that formats render in different ways: blanks around texts, thoughts, several turns."""
    for text in ("Why?", " \n Why? \n\n", "<think>\nIt is.\n</think>\n\nWhy?"):
        asked, answer = {"role": "user", "content": text}, {"role": "assistant", "content": text}
        for system in [[], [{"role": "system", "content": text}]][: 1 if turn.first is None else 2]:
            for turns in range(3):
                yield [*system, *[asked, answer] * turns, asked]


def _prompt(tokenizer: Any, dialogue: list[Message], ask: bool = True) -> str:
    """Return what the chat template renders, without the BOS token that llama.cpp itself begins with."""
    text = render_chat(tokenizer, dialogue, add_generation_prompt=ask)
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def _go(text: str) -> str:
    return text.replace(_SYSTEM, "{{ .System }}").replace(_ASKED, "{{ .Prompt }}")
