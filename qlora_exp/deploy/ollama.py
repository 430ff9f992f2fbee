"""An Ollama Modelfile for a GGUF file: how a dialogue is written, and where an answer ends. Knows nothing of weights.

Ollama's templates are Go's (https://docs.ollama.com/modelfile); ours is read off what the chat template renders.
"""

from typing import Any

from jinja2.exceptions import TemplateError

from qlora_exp.data.prompts import adds_bos

_SYSTEM, _ASKED, _ANSWER = "\x01system\x01", "\x01asked\x01", "\x01answer\x01"


def modelfile(tokenizer: Any, file: str) -> str:
    """A Modelfile for the GGUF file `file` beside it.

    Args:
        tokenizer: with the chat template of the format that the model was trained with; one without a template gets
            a Modelfile that continues what it is given.
        file: the GGUF file's name.

    Returns:
        Its text; a template that a Modelfile cannot hold is left out, and Ollama reads the GGUF file's own.
    """
    template, system = _template(tokenizer) if tokenizer.chat_template else ("{{ .Prompt }}{{ .Response }}", None)
    told = [("TEMPLATE", template), ("SYSTEM", system or ""), ("PARAMETER stop", tokenizer.eos_token)]
    # What holds three quotes would end there and could go on with directives of its own.
    written = [f'{name} """{text}"""' for name, text in told if text and '"""' not in text and text[-1] != '"']
    return "\n".join([f"FROM ./{file}", *written]) + "\n"


def _template(tokenizer: Any) -> tuple[str, str | None]:
    """The Go template of one turn, and the system message that is told where a dialogue begins without one."""

    def render(*messages: tuple[str, str], ask: bool = True) -> str:
        told = [{"role": role, "content": text} for role, text in messages]
        text: str = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=ask)
        return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text  # llama.cpp puts it there itself

    asked, answer = ("user", _ASKED), ("assistant", _ANSWER)
    after = render(asked, answer, ask=False).split(_ANSWER, 1)[1]
    turn = render(asked, answer, asked).split(_ANSWER, 1)[1].removeprefix(after)  # a later one: nothing else is told
    first = render(asked)
    try:
        with_system = render(("system", _SYSTEM), asked)
    except TemplateError:  # a format that knows none
        with_system = ""
    if _SYSTEM not in with_system:
        return _go(first) + "{{ .Response }}" + after, None
    before, behind = with_system.split(_SYSTEM, 1)
    system = None
    if first != turn and first.startswith(before) and first.endswith(behind):
        system = first[len(before) : len(first) - len(behind)]
    alone = first if system is None else turn
    go = f"{{{{ if .System }}}}{_go(with_system)}{{{{ else }}}}{_go(alone)}{{{{ end }}}}"
    return go + "{{ .Response }}" + after, system


def _go(text: str) -> str:
    return text.replace(_SYSTEM, "{{ .System }}").replace(_ASKED, "{{ .Prompt }}")
