"""Write an Ollama Modelfile for a GGUF file: the prompt format of a dialogue, and where an answer ends.

Ollama uses Go templates (https://docs.ollama.com/modelfile); this one is derived from what the tokenizer's chat
template renders. Does not read weights.
"""

from typing import Any

from qlora_exp.data.end_of_turn import end_of_turn
from qlora_exp.data.prompts import adds_bos, render_chat
from qlora_exp.utils.errors import DataError

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
        template, system = _template(tokenizer) if tokenizer.chat_template else ("{{ .Prompt }}{{ .Response }}", None)
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

    The template is None if no such template renders what the chat template does: Ollama renders a dialogue turn by
    turn, with the system message in the first.
    """

    def render(*messages: tuple[str, str], ask: bool = True) -> str:
        dialogue = [{"role": role, "content": text} for role, text in messages]
        text = render_chat(tokenizer, dialogue, add_generation_prompt=ask)
        return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text  # llama.cpp adds it itself

    asked, answer, told = ("user", _ASKED), ("assistant", _ANSWER), ("system", _SYSTEM)
    after = render(asked, answer, ask=False).split(_ANSWER, 1)[1]

    def later(*begin: tuple[str, str]) -> str:
        """Return the second turn of a dialogue."""
        return render(*begin, asked, answer, asked).split(_ANSWER, 1)[1].removeprefix(after)

    turn, first, system = later(), render(asked), None
    try:
        with_system = render(told, asked)
    except DataError:  # a format without system messages
        with_system = ""
    if _SYSTEM not in with_system:
        go, alone, turns = _go(first), first, {turn}
    else:
        before, behind = with_system.split(_SYSTEM, 1)
        if first != turn and first.startswith(before) and first.endswith(behind):
            system = first[len(before) : len(first) - len(behind)] or None  # an empty one cannot be written
        alone = first if system is None else turn
        turns = {turn, later(told)}
        go = f"{{{{ if .System }}}}{_go(with_system)}{{{{ else }}}}{_go(alone)}{{{{ end }}}}"
    return (go + "{{ .Response }}" + after, system) if turns == {alone} else (None, None)


def _go(text: str) -> str:
    return text.replace(_SYSTEM, "{{ .System }}").replace(_ASKED, "{{ .Prompt }}")
