"""Read the bodies of OpenAI's chat completions and completions, and write its errors.

What a body asks for is done or refused by name; nothing is ignored that would change the answer.
"""

import json
from abc import abstractmethod
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from qlora_exp.data.values import DECODER
from qlora_exp.deploy.chat import Request, Sampling
from qlora_exp.utils.errors import ConfigError, did_you_mean

_MOST_CHOICES = 128
_MOST_STOPS, _LONGEST_STOP = 4, 1000
_UNUSED = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"}
)
"""Fields that say something about a request, and nothing about its answer."""
_ONLY: dict[str, list[Any]] = {
    "best_of": [1],
    "echo": [False],
    "frequency_penalty": [0],
    "function_call": ["auto", "none"],
    "functions": [[]],
    "logit_bias": [{}],
    "logprobs": [False],
    "modalities": [["text"]],
    "parallel_tool_calls": [False, True],
    "presence_penalty": [0],
    "response_format": [{"type": "text"}],
    "suffix": [""],
    "tool_choice": ["auto", "none"],
    "tools": [[]],
    "top_logprobs": [0],
}
"""Fields with which clients ask for what this server cannot do, and the values that ask for nothing."""


class ApiError(Exception):
    """An error as OpenAI's servers answer it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """Keep the HTTP status, the message, the field of the body that is wrong, and OpenAI's name of the error."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _joined(content: Any) -> Any:
    """Join the parts of a message's content, which must be text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('must be text, or a list of parts {"type": "text", "text": "..."}')
    return "".join(part["text"] for part in content)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, message: Any) -> Any:
        """Leave out empty fields: clients send an answer back with all that it had."""
        if not isinstance(message, dict):
            return message
        return {key: value for key, value in message.items() if key == "content" or value not in (None, [])}


def _asking(messages: list[_Message]) -> list[_Message]:
    if not messages:
        raise ValueError("there must be at least one message")
    if messages[-1].role == "assistant":
        raise ValueError("the last message must not be the assistant's: this server answers, and continues no answer")
    return messages


class _StreamOptions(_Fields):
    include_usage: bool = False
    include_obfuscation: bool = False


class Body(_Fields):
    """What both kinds of requests have in common. None: as the server's defaults say."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]],
        BeforeValidator(_listed),
        Field(max_length=_MOST_STOPS),
    ] = []
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] = 1
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()

    @property
    @abstractmethod
    def request(self) -> Request:
        """What is asked, of which adapter."""

    @property
    def limit(self) -> tuple[str, int | None]:
        """Name and value of the field with the most tokens of an answer."""
        return "max_tokens", self.max_tokens

    def sampling(self, defaults: Sampling) -> Sampling:
        """Return how tokens are chosen: as the request says, else as `defaults` do.

        Seeds of other sizes are mapped to those that torch takes.

        Raises:
            ApiError: a value is out of range.
        """
        limit, most = self.limit
        seed = None if self.seed is None else self.seed % 2**32
        fields = {limit: ("max_new_tokens", most), "seed": ("seed", seed)}
        fields |= {
            name: (name, getattr(self, name)) for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        }
        for param, (name, value) in fields.items():
            if value is not None:
                try:
                    defaults = replace(defaults, **{name: value})
                except ConfigError as error:
                    message = str(error).removeprefix("sampling: ").replace(name, param, 1)
                    raise ApiError(400, message, param, "invalid_value") from error
        return defaults


class ChatBody(Body):
    """A body of /v1/chat/completions."""

    messages: Annotated[list[_Message], AfterValidator(_asking)]
    max_completion_tokens: int | None = None

    @property
    def limit(self) -> tuple[str, int | None]:
        """Name and value of the field with the most tokens of an answer."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().limit

    @property
    def request(self) -> Request:
        """What is asked, of which adapter."""
        return Request([message.model_dump() for message in self.messages], adapter=self.model)


class TextBody(Body):
    """A body of /v1/completions, whose prompt is continued as it is."""

    prompt: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1, max_length=1)]

    @property
    def request(self) -> Request:
        """What is asked, of which adapter."""
        return Request([{"role": "user", "content": self.prompt[0]}], adapter=self.model, raw=True)


def read(kind: type[Body], content: bytes) -> Body:
    """Read the body of a request.

    Raises:
        ApiError: it is not JSON, a field is missing, wrong or unknown, or this server cannot do what it asks for.
    """
    try:
        fields = DECODER.decode(content.decode("utf-8"))
        json.dumps(fields, ensure_ascii=False).encode("utf-8")  # \ud800 alone is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error!s:.200}") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object")
    stated = {name: value for name, value in fields.items() if value is not None and name not in _UNUSED}
    for name, values in _ONLY.items():
        if name in stated and not any(_same(stated[name], value) for value in values):
            allowed = " or ".join(json.dumps(value) for value in values)
            raise ApiError(
                400, f"This server does not support '{name}' other than {allowed}", name, "unsupported_value"
            )
        stated.pop(name, None)
    try:
        body = kind.model_validate(stated)
    except ValidationError as error:
        raise _invalid(kind, error) from error
    if "stream_options" in stated and not body.stream:
        raise ApiError(400, "stream_options needs stream=true", "stream_options", "invalid_value")
    if {"max_tokens", "max_completion_tokens"} <= stated.keys():
        raise ApiError(400, "Set max_tokens or max_completion_tokens, not both", "max_tokens", "invalid_value")
    return body


def _same(value: Any, other: Any) -> bool:
    """Return whether two JSON values are the same; for Python, False is 0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _invalid(kind: type[Body], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")[:200]
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(param, kind.model_fields) if len(first["loc"]) == 1 else "."
        return ApiError(400, f"Unknown parameter: '{param}'{hint}", param, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'", param, "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"Invalid '{param}': {message}", param, "invalid_value")
