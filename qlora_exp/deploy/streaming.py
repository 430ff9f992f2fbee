"""Pass an answer on while it is generated, and end it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from qlora_exp.data.end_of_turn import before_end


class TextStream(BaseStreamer, StoppingCriteria):
    """Passes an answer on while it is generated, and ends it at a text, or when it is cancelled.

    All tokens are decoded again with each new one: some tokenizers decode a token differently without those before it.
    """

    def __init__(
        self,
        tokenizer: Any,
        on_text: Callable[[str], None],
        tokens: Sequence[int],
        texts: Sequence[str],
        raw: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._tokenizer, self._on_text, self._cancelled = tokenizer, on_text, cancelled
        self._ends, self._stops, self._raw = frozenset(tokens), texts, raw
        self._ids: list[int] | None = None  # the first call brings the prompt
        self._cut = False
        self.text = ""
        self.generated = 0
        """Number of tokens, with the one that ends the answer."""
        self.complete = False
        """Whether a token or a text ended the answer."""

    def put(self, value: torch.Tensor) -> None:
        """Read a token."""
        if self._ids is None:
            self._ids = []
            return
        (token,) = value.tolist()
        self.generated += 1
        if token in self._ends:
            self.complete = True
            return
        self._ids.append(token)
        self._read(last=False)

    def end(self) -> None:
        """Pass on what waits."""
        if self._ids and not self._cut:
            self._read(last=True)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return whether the answer ends here."""
        return torch.full((len(input_ids),), self.complete or self._cancelled(), device=input_ids.device)

    def _read(self, last: bool) -> None:
        # Without clean-up, which would change text that was passed on already.
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not last:
            text = text.rstrip("\ufffd")  # the first bytes of a character
        ready = before_end(text, self._stops)
        if ready != text:
            self.complete = self._cut = True
        elif not last:
            # What may be the beginning of a text that ends the answer waits for what follows it.
            begun = [size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
            ready = text[: len(text) - max(begun, default=0)]
        ready = ready if self._raw else ready.strip()
        if piece := ready[len(self.text) :]:
            self.text += piece
            self._on_text(piece)
