"""Let MLflow load, score and serve the models of this package as Python functions.

A logged model's MLmodel file names this module as its loader (`tracking.stores.pyfunc_files`).
"""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from pydantic import TypeAdapter, ValidationError

from qlora_exp.data import dialogues
from qlora_exp.data.values import as_text
from qlora_exp.deploy.chat import ChatModel, Request, Sampling, load_chat_model
from qlora_exp.utils.errors import ConfigError, DataError, UserError

_SAMPLING = {name: name for name in Sampling.__dataclass_fields__} | {"max_tokens": "max_new_tokens"}
"""Fields of a request that are those of `Sampling`; `max_tokens` is OpenAI's name."""
_ASKED = ("messages", "prompt", "input")


def _load_pyfunc(path: str) -> "Predictor":
    """Load a model for MLflow, with the checks of `qlora_exp.load`."""
    return Predictor(load_chat_model({"default": path}, mlflow.get_tracking_uri()))


class Predictor:
    """A model as MLflow calls it."""

    def __init__(self, model: ChatModel) -> None:
        self._model = model
        self._one_at_a_time = threading.Lock()  # MLflow's server calls it from several threads

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Return the answer to each request.

        Args:
            data: a prompt, or a dictionary with `prompt` (and optionally `input`) or `messages`, and optionally fields
                of `params` for this request; a list of such prompts or dictionaries, or of messages; or a table with
                these columns.
            params: how the next token is chosen: fields of `Sampling`.

        Raises:
            MlflowException: a request or a parameter cannot be used. Nothing is generated then.
        """
        requests = []
        with self._one_at_a_time:
            for number, fields in enumerate(_each(data), 1):
                try:
                    requests.append((_request(fields), _sampling((params or {}) | fields)))
                    self._model.encoded(*requests[-1])
                except UserError as error:
                    raise MlflowException(f"request {number}: {error}", INVALID_PARAMETER_VALUE) from error
            return [self._model.answer(request, sampling) for request, sampling in requests]


def _each(data: Any) -> Iterator[dict[str, Any]]:
    """Yield the fields of each request, without empty ones."""
    if isinstance(data, pd.DataFrame):
        unnamed = len(data.columns) == 1 and data.columns[0] not in _ASKED
        data = data.iloc[:, 0] if unnamed else data.to_dict("records")
    data = _plain(data)
    if isinstance(data, Mapping):
        data = _rows(data)
    elif dialogues.is_dialogue(data):
        data = [{"messages": data}]
    for item in data if isinstance(data, list | tuple) else [data]:
        fields = item if isinstance(item, Mapping) else {"messages" if dialogues.is_dialogue(item) else "prompt": item}
        plain = {str(key): _plain(value) for key, value in fields.items()}
        yield {key: value for key, value in plain.items() if value is not None and value == value}  # NaN: an empty cell


def _rows(columns: Mapping[str, Any]) -> list[Any]:
    """Return the requests of a dictionary: one, or those of its columns if these are lists of prompts or dialogues."""
    plain = {key: _plain(value) for key, value in columns.items()}
    messages, prompts = plain.get("messages"), plain.get("prompt")
    several = isinstance(messages, list) and bool(messages) and not isinstance(messages[0], dict)
    return pd.DataFrame(plain).to_dict("records") if several or isinstance(prompts, list) else [plain]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value  # NumPy's and pandas' values


def _request(fields: Mapping[str, Any]) -> Request:
    known = (*_ASKED, *_SAMPLING)
    if unknown := sorted(fields.keys() - {*known}):
        raise DataError(f"{', '.join(unknown)}: no field of a request here; those are {', '.join(known)}")
    if ("messages" in fields) == ("prompt" in fields) or fields.get("messages") == []:
        raise DataError("give either `messages`, at least one, or `prompt`")
    try:
        prompt, given = as_text(fields.get("prompt")), as_text(fields.get("input"))
    except ValueError as error:
        raise DataError(str(error)) from error
    asked = fields.get("messages", [{"role": "user", "content": prompt}])
    return Request(dialogues.messages(asked, "messages", "the dialogue", fills_with_null=True), given)


def _sampling(fields: Mapping[str, Any]) -> Sampling:
    given = {_SAMPLING[name]: fields[name] for name in _SAMPLING if fields.get(name) is not None}
    try:
        return TypeAdapter(Sampling).validate_python(given)
    except ValidationError as error:
        (first, *_) = error.errors()
        raise ConfigError(f"{first['loc'][0]}: {first['msg']}, got {first['input']!r:.80}") from error
