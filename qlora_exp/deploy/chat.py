"""Talking to trained models: prompts in the format that each was trained with, answers as they come.

Several adapters share one base in memory, and each request names its own. Knows nothing of terminals or servers.
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
from transformers import GenerationConfig, TextStreamer, set_seed

from qlora_exp.data.prompts import chat_template, render
from qlora_exp.deploy import load
from qlora_exp.deploy.load import Saved
from qlora_exp.tracking import run_key
from qlora_exp.training.evaluation import stop_tokens
from qlora_exp.utils.errors import ConfigError, DataError, ModelError, did_you_mean, first_line

BASE = "base"
"""Names the base without an adapter."""
Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; fields are those of transformers' GenerationConfig."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: the likeliest token, always."""
    top_p: float = 1.0
    top_k: int = 0
    """0: of all tokens."""
    repetition_penalty: float = 1.0
    seed: int | None = None

    def settings(self, stops: Sequence[int], pad: int) -> GenerationConfig:
        """As transformers takes it.

        Raises:
            ConfigError: it does not take a value.
        """
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.repetition_penalty <= 0:
            raise ConfigError(
                "sampling: temperature and top_k are not negative, 0 < top_p <= 1, and repetition_penalty is above 0"
            )
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        try:
            return GenerationConfig(
                max_new_tokens=self.max_new_tokens,
                do_sample=self.temperature > 0,
                repetition_penalty=self.repetition_penalty,
                eos_token_id=[*stops],
                pad_token_id=pad,
                **(sampled if self.temperature > 0 else {}),
            )
        except ValueError as error:
            raise ConfigError(f"sampling: {first_line(error)}") from error


@dataclass(frozen=True)
class Request:
    """What is asked, of which adapter."""

    messages: list[Message]
    """From the system or the user; the last is the user's."""
    input: str = ""
    """Alpaca's second column, of a single question."""
    adapter: str | None = None
    """Its name; None is the first."""


@dataclass(frozen=True)
class Talker:
    """A model with its adapters, ready to answer."""

    model: Any
    tokenizer: Any
    saved: dict[str, Saved]
    """By the adapter's name, the first one is the default."""
    templates: dict[str, str | None]
    """Of each, the prompts that it was trained with, as Jinja; None of one that was trained on plain text."""

    def prompt(self, request: Request) -> tuple[str, bool]:
        """The text that the model is given, and whether special tokens are written in it.

        Raises:
            ConfigError: there is no such adapter.
            DataError: the format has no place for what is asked.
        """
        name = self.named(request.adapter)
        config, messages = self.saved[name].config.dataset, request.messages
        if request.input and (config.format != "alpaca" or len(messages) > 1):
            raise DataError("an input beside the prompt has a place in Alpaca's format only, in a single question")
        if request.input:
            row = {"prompt": messages[-1]["content"], "input": request.input, "completion": ""}
            return "".join(piece for piece, _ in render(row, config, self.tokenizer).pieces[:-1]), False
        template = self.templates[name]
        if template is None:  # trained on plain text, which it continues
            return "".join(message["content"] for message in messages), False
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever a template raises, it is about these messages
            raise DataError(f"the prompt format of {self.saved[name].source} refuses this dialogue: {error}") from error
        return text, True

    def answer(self, request: Request, sampling: Sampling, told: Callable[[str], None] = lambda _: None) -> str:
        """The answer; pieces are `told` as soon as they are there.

        Raises:
            ConfigError: there is no such adapter, or a value of `sampling` is wrong.
            DataError: the format has no place for what is asked, or the dialogue is longer than the model can see.
        """
        ids = self.encoded(request, sampling)
        settings = sampling.settings(stop_tokens(self.model, self.tokenizer), self.tokenizer.pad_token_id)
        if sampling.seed is not None:
            set_seed(sampling.seed)
        given = torch.tensor([ids], device=self.model.device)
        with torch.no_grad(), self._with(request.adapter):
            found = self.model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                generation_config=settings,
                streamer=_Teller(self.tokenizer, told),
            )
        return str(self.tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)).strip()

    def encoded(self, request: Request, sampling: Sampling) -> list[int]:
        """The tokens that the model is given, at least one.

        Raises:
            ConfigError: there is no such adapter.
            DataError: the format has no place for what is asked, or it is empty, or longer than the model can see.
        """
        text, has_special_tokens = self.prompt(request)
        ids: list[int] = self.tokenizer(text, add_special_tokens=not has_special_tokens)["input_ids"]
        if not ids:
            raise DataError("an empty prompt: a model that was trained on plain text continues what it is given")
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most and len(ids) + sampling.max_new_tokens > most:
            raise DataError(
                f"the dialogue has {len(ids)} tokens, and with {sampling.max_new_tokens} new ones is longer than the "
                f"{most} that the model can see: begin anew, or ask for a shorter answer"
            )
        return ids

    def named(self, adapter: str | None) -> str:
        """The adapter whose prompts count: the first one if none is named, and for the base alone.

        Raises:
            ConfigError: there is no such adapter.
        """
        if adapter is None or adapter == BASE:
            return next(iter(self.saved))
        if adapter not in self.saved:
            known = [*self.saved, BASE] if isinstance(self.model, PeftModel) else [*self.saved]
            raise ConfigError(f"no adapter '{adapter}'{did_you_mean(adapter, known)} Known: {', '.join(known)}")
        return adapter

    def _with(self, adapter: str | None) -> AbstractContextManager[Any]:
        """Inside, the model answers with this adapter."""
        name = self.named(adapter)
        if not isinstance(self.model, PeftModel):
            if adapter == BASE:
                raise ConfigError(f"no adapter '{BASE}': this is a whole model, without a base")
            return nullcontext()
        if adapter == BASE:
            return self.model.disable_adapter()
        self.model.set_adapter(name)
        return nullcontext()


class _Teller(TextStreamer):
    """Passes whole words on, where transformers' own prints them."""

    def __init__(self, tokenizer: Any, told: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._told = told

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._told(text)


def open_talker(
    sources: dict[str, str], tracking_uri: str | None = None, device: str = "auto", quantization: str | None = None
) -> Talker:
    """Load a model and, if it is an adapter, more adapters on the same base.

    Args:
        sources: by name: an MLflow run id, a `models:/...` URI, or a folder; the first decides the base.
        tracking_uri: the MLflow store; None is the one in `mlruns/`.
        device: auto, cpu, cuda.
        quantization: how to store the base instead of as it was trained: nf4_double, int8, none, ...

    Raises:
        ModelError: one of them is not there, or they do not share a base.
        ConfigError: a name that cannot be one, or no such quantization.
    """
    if wrong := [name for name in sources if not re.fullmatch(r"[\w-]+", name) or name == BASE]:
        raise ConfigError(
            f"an adapter cannot be called '{wrong[0]}': letters, digits, _ and - make a name, and '{BASE}' is the base"
        )
    found = {name: load.find(source, tracking_uri, device) for name, source in sources.items()}
    (first, saved), *others = found.items()
    for name, other in others:
        if not (saved.adapter and other.adapter):
            whole = other if saved.adapter else saved
            raise ModelError(f"{whole.source} is a whole model: only adapters share a base")
        if _base(other) != _base(saved):
            raise ModelError(
                f"{name}: {other.source} was trained on {' at '.join(_base(other))}, not on {' at '.join(_base(saved))}"
            )
    model = load.load_saved(saved, quantization, first)
    for name, other in others:
        model = load.with_adapter(model, other, name)
    templates = {name: chat_template(one.config.dataset, one.tokenizer()) for name, one in found.items()}
    return Talker(model.eval(), saved.tokenizer(), found, templates)


def _base(saved: Saved) -> tuple[str, str]:
    model = saved.config.model
    return model.model_name_or_path, run_key.model(model.model_name_or_path, model.revision)


def read_requests(file: Path) -> Iterator[Request]:
    """One request a line: text, or in a `.jsonl` file an object: `prompt` (and `input`) or `messages`, and `adapter`.

    Raises:
        DataError: there is no such file, or a line is none of this.
    """
    try:
        lines = file.read_text("utf-8").split("\n")  # other signs that end a line may be in a text
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _request(line, f"{file}:{number}") if file.suffix == ".jsonl" else asked(line)


def asked(prompt: str, adapter: str | None = None) -> Request:
    """A single question."""
    return Request([{"role": "user", "content": prompt}], adapter=adapter)


def _request(line: str, where: str) -> Request:
    try:
        given = json.loads(line)
        messages = given.get("messages") or [{"role": "user", "content": given["prompt"]}]
        clean = [{"role": str(one["role"]), "content": str(one["content"])} for one in messages]
        adapter = given.get("adapter")
        return Request(clean, str(given.get("input") or ""), None if adapter is None else str(adapter))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: no object with prompt or messages (role, content): {error!r}") from error


def answers(talker: Talker, requests: Iterable[Request], sampling: Sampling) -> Iterator[dict[str, Any]]:
    """Each request with its answer, in order."""
    for request in requests:
        asked_ = {"messages": request.messages, "input": request.input, "adapter": request.adapter}
        yield {key: value for key, value in asked_.items() if value} | {"answer": talker.answer(request, sampling)}
