"""Prompt trained models, each in the format that it was trained with, and pass answers on while they are generated.

Several adapters share one base model in memory; each request names its adapter. Does not deal with terminals or
servers.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig

from qlora_exp.data import dialogues
from qlora_exp.data.dialogues import SYSTEM_ROLES, Message
from qlora_exp.data.end_of_turn import EndOfTurn, closed_once, end_of_turn
from qlora_exp.data.prompts import render, render_chat, served_template
from qlora_exp.data.tokenization import prompt_tokens
from qlora_exp.data.values import as_text
from qlora_exp.deploy import load
from qlora_exp.deploy.load import Saved
from qlora_exp.deploy.streaming import TextStream
from qlora_exp.models.base import own_settings_alone, stop_strings, stop_tokens
from qlora_exp.models.untrusted import explained
from qlora_exp.tracking import run_key
from qlora_exp.utils.errors import ConfigError, DataError, ModelError, did_you_mean

BASE = "base"
"""Name of the base model without an adapter, in place of an adapter's name."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Except for `seed`, the fields are those of transformers' GenerationConfig."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: choose from all tokens."""
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one is out of range.
        """
        scales = {"temperature": self.temperature or 1.0, "repetition_penalty": self.repetition_penalty}
        for name, value in scales.items():  # beyond these, probabilities are no numbers
            if not 1e-5 <= value <= 1e5:
                zero = "0, or " if name == "temperature" else ""
                raise ConfigError(f"sampling: {name}={getattr(self, name)} must be {zero}from 1e-5 to 1e5")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling: top_p={self.top_p} must be above 0 and at most 1")
        for name, least in (("max_new_tokens", 1), ("top_k", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"sampling: {name}={getattr(self, name)} must be at least {least}")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ConfigError(f"sampling: seed={self.seed} must be from 0 to {2**32 - 1}")

    def settings(self, stops: Sequence[int], pad: int) -> GenerationConfig:
        """Return the settings for transformers.

        Args:
            stops: ids of the tokens that end an answer.
            pad: id of the padding token.
        """
        # transformers refuses whole numbers for these.
        sampled = {"temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": self.top_k}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            repetition_penalty=float(self.repetition_penalty),
            num_beams=1,
            num_return_sequences=1,
            eos_token_id=[*stops],
            pad_token_id=pad,
            **(sampled if self.temperature > 0 else {}),
        )


@dataclass(frozen=True)
class Request:
    """A dialogue to answer, and the adapter that answers it."""

    messages: list[Message]
    """The dialogue. It begins with a message of the system or the user; the last message is the user's."""
    input: str = ""
    """The `input` column of Alpaca's format; only for a single question."""
    adapter: str | None = None
    """Name of the adapter; None: the first one."""
    raw: bool = False
    """Continue the text of the messages as it is, whatever the adapter's prompt format."""


@dataclass(frozen=True)
class Reply:
    """An answer, and what it took."""

    text: str
    tokens: int
    """Number of generated tokens, with the one that ends the answer."""
    complete: bool
    """Whether the model ended the answer, or a text did; otherwise it was cut."""


class ContextError(DataError):
    """A prompt that, with its answer, is longer than the model's context."""

    def __init__(self, message: str, prompt: int = 0, new: int = 0, most: int = 0) -> None:
        """Keep the numbers of tokens."""
        super().__init__(message)
        self.prompt, self.new, self.most = prompt, new, most


@dataclass(frozen=True)
class ChatModel:
    """A model with its adapters, ready to answer."""

    model: Any
    tokenizer: Any
    saved: dict[str, Saved]
    """What was loaded, by name; the first is the default."""
    templates: dict[str, str | None]
    """Prompt format that each was trained with, as a Jinja template; None if it was trained on plain text."""
    ends: dict[str, EndOfTurn]
    """What ends the answers of each."""

    def prompt(self, request: Request) -> tuple[str, bool]:
        """Return the prompt as text, and whether the text contains the special tokens.

        Raises:
            ConfigError: there is no such adapter.
            DataError: the adapter's prompt format cannot express the request.
        """
        name = self.named(request.adapter)
        config, messages = self.saved[name].config.dataset, request.messages
        if request.input and (config.format != "alpaca" or len(messages) > 1):
            raise DataError(
                "an `input` besides the prompt is possible only in Alpaca's format and for a single question"
            )
        if request.input:
            row = {"prompt": messages[-1]["content"], "input": request.input, "completion": ""}
            return "".join(piece for piece, _ in render(row, config, self.tokenizer).pieces[:-1]), False
        template = self.templates[name]
        if template is None or request.raw:  # trained on plain text, which it continues
            return "".join(message["content"] or "" for message in messages), False
        messages = closed_once(messages, self.tokenizer, self.ends[name])
        source = self.saved[name].source

        def rendered(dialogue: list[Message]) -> str:
            return render_chat(self.tokenizer, dialogue, template, add_generation_prompt=True)

        try:
            text = rendered(messages)
            places = range(len(messages))
            ignored = [messages[place]["role"] for place in places if _is_ignored(messages, place, text, rendered)]
        except DataError as error:
            raise DataError(f"the prompt format of {source} refuses this dialogue: {error.__cause__}") from error
        if ignored:
            raise DataError(f"the prompt format of {source} leaves out messages with the role {ignored[0]}")
        return text, True

    def answer(self, request: Request, sampling: Sampling, on_text: Callable[[str], None] = lambda _: None) -> str:
        """Return the answer; pass its pieces to `on_text` as soon as they are generated.

        Raises:
            ConfigError: there is no such adapter, or a value of `sampling` is out of range.
            DataError: the adapter's prompt format cannot express the request, or the dialogue exceeds the model's
                context.
        """
        return self.reply(request, self.encoded(request, sampling), sampling, on_text).text

    def reply(
        self,
        request: Request,
        ids: list[int],
        sampling: Sampling,
        on_text: Callable[[str], None] = lambda _: None,
        stops: Sequence[str] = (),
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Answer as `answer` does, and return also what the answer took.

        Args:
            request: the request.
            ids: its prompt, from `encoded`.
            sampling: how tokens are chosen.
            on_text: gets the pieces of the answer, which joined are the answer.
            stops: further texts that end the answer; what they are is not in it.
            cancelled: ends the answer after the next token if it returns true.
        """
        tokens, texts = self._stops(request.adapter)
        added = self.tokenizer.get_added_vocab()  # a special token is not in the text of an answer
        tokens += [added[stop] for stop in stops if stop in added]
        stream = TextStream(self.tokenizer, on_text, tokens, [*texts, *stops], request.raw, cancelled)
        prompt = torch.tensor([ids], device=self.model.device)
        cuda = [self.model.device] if self.model.device.type == "cuda" else []
        with (
            torch.no_grad(),
            self._active(request.adapter),
            own_settings_alone(self.model),
            torch.random.fork_rng(cuda, enabled=sampling.seed is not None),  # the next answer is as random as before
        ):
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=sampling.settings(tokens, self.tokenizer.pad_token_id),
                streamer=stream,
                stopping_criteria=[stream],
            )
        return Reply(stream.text, stream.generated, stream.complete)

    def _stops(self, adapter: str | None) -> tuple[list[int], list[str]]:
        """Return the tokens and the texts that end an adapter's answers."""
        end = self.ends[self.named(adapter)]
        tokens = {*stop_tokens(self.model, self.tokenizer), *([] if end.token is None else [end.token])}
        return sorted(tokens), [*stop_strings(self.model), *([] if end.stop is None else [end.stop])]

    def encoded(self, request: Request, sampling: Sampling) -> list[int]:
        """Return the token ids of the prompt, at least one.

        Raises:
            ConfigError: there is no such adapter.
            DataError: the adapter's prompt format cannot express the request, or the prompt is empty.
            ContextError: the prompt with its answer exceeds the model's context.
        """
        text, has_special_tokens = self.prompt(request)
        with explained("the tokenizer"):
            ids = prompt_tokens(self.tokenizer, text, special=not has_special_tokens)
        if not ids:
            raise DataError("an empty prompt: this model was trained on plain text and needs a text to continue")
        if max(ids) >= (rows := self.model.get_input_embeddings().weight.shape[0]):
            raise ModelError(f"the tokenizer has the token {max(ids)}, but the model only {rows} embeddings")
        most = self.room(request.adapter, 0)
        if most is not None and len(ids) + sampling.max_new_tokens > most:
            new = sampling.max_new_tokens
            message = (
                f"the dialogue has {len(ids)} tokens and with {new} new ones is longer than the {most} of the model's "
                "context: start a new dialogue, or lower max_new_tokens"
            )
            raise ContextError(message, len(ids), new, most)
        return ids

    def room(self, adapter: str | None, prompt: int) -> int | None:
        """Return how many tokens a prompt of `prompt` tokens leaves in the model's context; None if it has no end.

        Raises:
            ConfigError: there is no such adapter.
        """
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not most:
            return None
        settings = self.saved[self.named(adapter)].config.peft_settings
        trained = 0 if adapter == BASE else settings.get("num_virtual_tokens", 0)  # a trained prompt takes positions
        return int(most) - trained - prompt

    def named(self, adapter: str | None) -> str:
        """Return the adapter whose prompt format is used: the first one if none is named, and for the base model alone.

        Raises:
            ConfigError: there is no such adapter.
        """
        if adapter is None or adapter == BASE:
            return next(iter(self.saved))
        if adapter not in self.saved:
            names = [*self.saved, BASE] if isinstance(self.model, PeftModel) else [*self.saved]
            raise ConfigError(f"no adapter '{adapter}'{did_you_mean(adapter, names)} Adapters: {', '.join(names)}")
        return adapter

    def _active(self, adapter: str | None) -> AbstractContextManager[Any]:
        """Make the model answer with this adapter inside the `with` block."""
        name = self.named(adapter)
        if not isinstance(self.model, PeftModel):
            if adapter == BASE:
                raise ConfigError(f"no adapter '{BASE}': this is a complete model, without a base model")
            return nullcontext()
        if adapter == BASE:
            return self.model.disable_adapter()
        self.model.set_adapter(name)
        return nullcontext()


def _is_ignored(messages: list[Message], place: int, text: str, rendered: Callable[[list[Message]], str]) -> bool:
    """Return whether a prompt format leaves out a message: some have no system messages, and do not refuse them."""
    message = messages[place]
    said = message.get("content") or ""
    if message["role"] not in SYSTEM_ROLES or said.strip() in text:
        return False
    return rendered([*messages[:place], {**message, "content": f"{said} changed"}, *messages[place + 1 :]]) == text


def load_chat_model(
    sources: dict[str, str], tracking_uri: str | None = None, device: str = "auto", quantization: str | None = None
) -> ChatModel:
    """Load a model and, if it is an adapter, further adapters of the same base model.

    Args:
        sources: by name, an MLflow run id, a `models:/...` URI, or a folder; the first decides the base model.
        tracking_uri: the MLflow store; None: the one in `mlruns/`.
        device: auto, cpu, cuda.
        quantization: quantization of the base model: nf4_double, int8, none, ...; None: as in training.

    Raises:
        ModelError: a source does not exist, or the adapters do not share a base model.
        ConfigError: a name is not allowed, or there is no such quantization.
    """
    if wrong := [name for name in sources if not re.fullmatch(r"[\w-]+", name) or name == BASE]:
        raise ConfigError(
            f"an adapter cannot be called '{wrong[0]}': use letters, digits, _ and - ('{BASE}' is the base model alone)"
        )
    saved_by_name = {name: load.find(source, tracking_uri, device) for name, source in sources.items()}
    (first, saved), *others = saved_by_name.items()
    for name, other in others:
        if not (saved.adapter and other.adapter):
            complete = other if saved.adapter else saved
            raise ModelError(f"{complete.source} is a complete model: only adapters can share a base model")
        if _base(other) != _base(saved):
            raise ModelError(
                f"{name}: {other.source} was trained on {' at '.join(_base(other))}, not on {' at '.join(_base(saved))}"
            )
        if (kind := other.config.method.peft_type) != saved.config.method.peft_type:
            raise ModelError(
                f"{name}: {other.source} is an adapter of type {kind}, and {saved.source} one of type "
                f"{saved.config.method.peft_type}: adapters of one model must be of one type; load them one by one"
            )
    model = load.load_saved(saved, quantization, first)
    for name, other in others:
        model = load.with_adapter(model, other, name)
    tokenizers = {name: each.tokenizer() for name, each in saved_by_name.items()}
    templates = {name: served_template(each.config.dataset, tokenizers[name]) for name, each in saved_by_name.items()}
    ends = {name: end_of_turn(tokenizers[name], template) for name, template in templates.items()}
    # The text that ends the first adapter's answers does not end the others'.
    model.generation_config.stop_strings = [text for text in stop_strings(model) if text != ends[first].stop] or None
    return ChatModel(model.eval(), tokenizers[first], saved_by_name, templates, ends)


def _base(saved: Saved) -> tuple[str, str]:
    model = saved.config.model
    more = f" with {', '.join(model.new_tokens)}" if model.new_tokens else ""
    return model.model_name_or_path, run_key.model_version(model.model_name_or_path, model.revision) + more


def read_requests(file: Path) -> Iterator[Request]:
    """Yield one request for each line of a file.

    A line is a prompt as text, or in a `.jsonl` file an object with `prompt` (and optionally `input`) or `messages`,
    and optionally `adapter`.

    Raises:
        DataError: there is no such file, or a line is neither of these.
    """
    try:
        # `splitlines` would also split at other characters, which a text may contain.
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _request(line, f"{file}:{number}") if file.suffix.lower() == ".jsonl" else asked(line)


def asked(prompt: str, adapter: str | None = None) -> Request:
    """Return the request for a single question."""
    return Request([{"role": "user", "content": prompt}], adapter=adapter)


def _request(line: str, where: str) -> Request:
    try:
        fields = json.loads(line)
        column = "messages" if fields.get("messages") else "prompt"
        listed = fields[column] if column == "messages" else [{"role": "user", "content": fields["prompt"]}]
        contents = {f"{column}[{place}].content": message.get("content") for place, message in enumerate(listed)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: not an object with `prompt` or with `messages` of role and content: {error!r}"
        ) from error
    others = {name: fields.get(name) for name in ("input", "adapter")}
    for name, value in (others | contents).items():
        if isinstance(value, dict) or (isinstance(value, list) and name in others):
            raise DataError(f"{where}: {name} must be text, not {value!s:.60}")
    given, adapter = (None if value is None else as_text(value) for value in others.values())
    return Request(dialogues.messages(listed, column, where, fills_with_null=False), given or "", adapter)


def answers(talker: ChatModel, requests: Iterable[Request], sampling: Sampling) -> Iterator[dict[str, Any]]:
    """Yield each request with its answer, in order."""
    for request in requests:
        fields = {"messages": request.messages, "input": request.input, "adapter": request.adapter}
        yield {key: value for key, value in fields.items() if value} | {"answer": talker.answer(request, sampling)}
