"""Check that a chat template renders everything that the messages of a dataset say."""

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data.dialogues import Message
from qlora_exp.data.prompts import apply_template, messages
from qlora_exp.utils.errors import DataError

_MARK = "qzxmark"
_NAMES_OF_CALLS = ("id", "type", "index")


class UnrenderedError(DataError):
    """A row has something that the template does not render."""


class TemplateCheck:
    """Refuses rows with something that the template does not render; each kind of message is tried once."""

    def __init__(self, config: DatasetConfig, tokenizer: Any) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._seen: set[tuple[str, ...]] = set()

    @property
    def seen(self) -> set[tuple[str, ...]]:
        """Kinds of messages that were tried; may be set."""
        return {*self._seen}

    @seen.setter
    def seen(self, kinds: set[tuple[str, ...]]) -> None:
        self._seen = {*kinds}

    def check(self, row: Mapping[str, Any]) -> None:
        """Check a row.

        Raises:
            DataError: the template ignores a key, a role, or the tools.
        """
        dialogue, tools = messages(row, self._config), row.get("tools")
        if tools and self._is_new("tools"):
            marked = [_marked(tool) for tool in tools]
            if not self._shows(dialogue, marked):
                raise self._ignored("the column tools")
        for place, message in enumerate(dialogue):
            for key, value in message.items():
                if self._is_checked(message, key):
                    self._check_key(dialogue, tools, place, key, value)

    def _is_new(self, *kind: str) -> bool:
        new = kind not in self._seen
        self._seen.add(kind)
        return new

    def _is_checked(self, message: Message, key: str) -> bool:
        """Return whether a key of a message must be rendered, and was not yet checked in such a message."""
        identifies = key == "tool_call_id" or (key == "name" and message["role"] in ("tool", "function"))
        if key == "role" or identifies or message[key] in ("", None):
            return False
        return self._is_new(message["role"], key, *(["tool_calls"] if "tool_calls" in message else []))

    def _check_key(self, dialogue: list[Message], tools: Any, place: int, key: str, value: Any) -> None:
        message = dialogue[place]

        def having(changed: Message) -> list[Message]:
            return [*dialogue[:place], changed, *dialogue[place + 1 :]]

        changes = [*_marked_once(value)] if key == "tool_calls" else [_marked(value)]
        if not isinstance(value, str | list | dict):  # a flag may change what is rendered without being shown
            changes.append(None)
        shown = [self._is_shown(having({**message, key: changed}), dialogue, tools, place) for changed in changes]
        if not (any(shown) if None in changes else all(shown)):
            raise self._ignored(f"the key {key!r} of a message with the role {message['role']!r}")

    def _is_shown(self, changed: list[Message], dialogue: list[Message], tools: Any, place: int) -> bool:
        """Return whether a change of a message shows.

        A template may leave out the reasoning of earlier answers, so the message is also tried as the last one, and
        some render a system message only in a prompt (`prompts.render` takes the text before an answer from there).
        """
        for end in dict.fromkeys((len(dialogue), len(dialogue) - 1, place + 1)):
            try:
                before = apply_template(self._tokenizer, self._config, dialogue[:end], tools)
            except DataError:
                if end == len(dialogue):
                    raise
                continue
            after = self._rendered(changed[:end], tools)
            if _MARK in after or (_MARK not in str(changed[place]) and after != before):
                return True
        return False

    def _shows(self, dialogue: list[Message], tools: Any) -> bool:
        return _MARK in self._rendered(dialogue, tools)

    def _rendered(self, dialogue: list[Message], tools: Any) -> str:
        """Render a changed dialogue; if the template refuses the change, it looks at what was changed."""
        try:
            return apply_template(self._tokenizer, self._config, dialogue, tools)
        except DataError:
            return _MARK

    def _ignored(self, what: str) -> UnrenderedError:
        return UnrenderedError(
            f"dataset.format=chat: this model's chat template does not render {what}, so it would be lost; "
            "remove it from the file, or use a model whose template renders it"
        )


def _marked(value: Any) -> Any:
    """Return a value with a mark in each text and for each number in it."""
    if isinstance(value, dict):
        return {key: _marked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_marked(item) for item in value]
    return f"{value}{_MARK}" if isinstance(value, str) else _MARK


def _marked_once(value: Any) -> Iterator[Any]:
    """Yield a value once for each text and number in it, with a mark there."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in _NAMES_OF_CALLS:
                yield from ({**value, key: marked} for marked in _marked_once(item))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from ([*value[:place], marked, *value[place + 1 :]] for marked in _marked_once(item))
    else:
        yield _marked(value)
