"""Section `dataset`: rows of one source, or of several that are mixed."""

import math
import re
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from qlora_exp.config.sections.base import Share
from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.utils.errors import did_you_mean

REPLAY = "replay"
"""Name of the replayed rows where sources are named."""
OF_THE_WHOLE = ("name", "chat_template", "split_seed", "evaluate_on", "drop_leaks", "leak_threshold")
"""Keys of a dataset that all of its sources share."""
PLACE = ("subset", "revision", "split", "eval_path", "eval_split", "reasoning_gym_config")
"""Keys that belong to a path: a source with a path of its own does not take them from the section."""
_TURNS = ("messages_column", "history_column", "system_column")
_CHAT = (*_TURNS, "system_message", "chat_template")
_ROUNDING = 1e-6
_MOST_SOURCES = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}")


def source_keys() -> list[str]:
    """List the keys that a source can have."""
    return [*(key for key in DatasetConfig.model_fields if key not in OF_THE_WHOLE), "weight"]


def of_source(message: str, name: str) -> str:
    """Return a message about a dataset that names its keys as those of a source: `dataset.sources.NAME.path`.

    Args:
        message: a message with keys such as `dataset.path`.
        name: name of the source; `dataset` stands for the section itself, `REPLAY` for `unrelated`.
    """
    if name == "dataset":
        return message
    section, keys = f"dataset.sources.{name}", source_keys()
    if name == REPLAY:
        section, keys = "unrelated", [*DatasetConfig.model_fields]
    return re.sub(rf"\bdataset\.(?=(?:{'|'.join(keys)})\b)", f"{section}.", message)


def twice(dataset: "MixtureConfig") -> list[str]:
    """Return the names of two sources that are equal; empty if there are none."""
    parts = [(name, part.model_dump(exclude={"name"})) for name, part in dataset.parts.items()]
    equal = ([one, other] for place, (other, read) in enumerate(parts) for one, same in parts[:place] if same == read)
    return next(equal, [])


class MixtureConfig(DatasetConfig):
    """Training and held-out rows: where they come from, their prompt format, how they are split, and what is mixed."""

    sources: dict[str, dict[str, Any]] = {}
    """Several datasets to train on at once, each with a name of your choice: `dataset.sources.NAME.path=...`. A source
    has the keys of `dataset` (path, format, columns, eval_path, eval_size, max_train_rows, ...), and takes those that
    it does not set from `dataset`; with a path of its own, not what belongs to that path (subset, split, eval_path,
    ...). `weight` is its share of the training rows; the weights of all sources sum to 1. The saved model is prompted
    in `dataset.format`. Each source is split apart, and has a held-out loss of its own."""
    mixing_temperature: Annotated[float, Field(ge=1)] | None = None
    """Shares of sources without weights: proportional to rows ** (1 / mixing_temperature). 1: proportional to the
    rows; a large number: equal. null: every row once in an epoch."""
    stopping: Literal["first_exhausted", "all_exhausted"] | None = None
    """End of an epoch of sources with weights or a temperature. first_exhausted: when all rows of one source were seen,
    so that none is repeated. all_exhausted: when all rows of all sources were seen, so that some are repeated. null:
    first_exhausted."""
    replay: Share | None = None
    """Share of the training rows that are general text, against forgetting: rows of `unrelated` that are not held out.
    null: none."""

    @property
    def parts(self) -> dict[str, DatasetConfig]:
        """The sources by name, in the order of their names; without sources, the section itself."""
        return {name: self._part(name) for name in sorted(self.sources)} if self.sources else super().parts

    @property
    def paths(self) -> list[str]:
        """Sources of the rows: `path` and `eval_path` of each part where they are set."""
        if not self.sources:
            return super().paths
        return list(dict.fromkeys(path for part in self.parts.values() for path in part.paths))

    @property
    def weights(self) -> dict[str, float] | None:
        """Share of each source in the training rows; None if the sources have no weights."""
        weights = {name: source["weight"] for name, source in self.sources.items() if "weight" in source}
        return weights or None

    @property
    def not_taken(self) -> set[str]:
        """Keys of the section that no source takes from it, because each has its own, or another path or format."""
        taken = {key for name in self.sources for key in self._taken(name) if key not in self.sources[name]}
        return {*DatasetConfig.model_fields} - taken - {"format"} if self.sources else set()

    def _part(self, name: str) -> DatasetConfig:
        own = {key: value for key, value in self.sources[name].items() if key != "weight"}
        return DatasetConfig.model_validate({**self._taken(name), "name": name, **own})

    def _taken(self, name: str) -> dict[str, Any]:
        """Return the keys of the section that fit a source."""
        own = self.sources[name]
        left_out = {*PLACE} if "path" in own else set()
        kind = own.get("format", self.format)
        if kind in ("alpaca", "prompt_completion", "text"):
            left_out |= {*_CHAT}
        if kind in ("alpaca", "text") or any(own.get(key) for key in _TURNS):
            left_out.add("prompt_template")
        if own.get("prompt_template"):
            left_out |= {*_TURNS}
        if own.get("eval_path") or own.get("eval_split"):
            left_out |= {"eval_path", "eval_split"}
        return {key: getattr(self, key) for key in DatasetConfig.model_fields if key not in left_out}

    @model_validator(mode="before")
    @classmethod
    def _needs_no_path(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("sources", {}) is None:
            return {**values, "sources": {}}
        if isinstance(values, dict) and values.get("sources") and values.get("path") is None:
            return {**values, "path": "none"}
        return values

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if not self.sources and self.path == "none":
            raise ValueError("dataset.path: must name rows; name each of several: dataset.sources.NAME.path=PATH")
        if problems := [*self._of_names_and_keys()] or [*self._of_weights(), *self._of_parts()]:
            raise ValueError("\n".join(problems))
        return self

    def _of_names_and_keys(self) -> Iterator[str]:
        if len(self.sources) > _MOST_SOURCES:
            yield f"dataset.sources: {len(self.sources)} sources; at most {_MOST_SOURCES} are mixed"
            return
        for name, source in self.sources.items():
            if not _NAME.fullmatch(name) or name == REPLAY:
                yield (
                    f"dataset.sources: {name!r} cannot be a name; use letters, digits, _ and -, at most 50, and not "
                    f"{REPLAY}, which are the rows of dataset.replay"
                )
            for key in source:
                if key in OF_THE_WHOLE:
                    yield f"dataset.sources.{name}.{key}: all sources share it: set dataset.{key}"
                elif key not in source_keys():
                    yield f"dataset.sources.{name}.{key}: a source has no such key{did_you_mean(key, source_keys())}"

    def _of_weights(self) -> Iterator[str]:
        weights = self.weights
        if weights is None:
            return
        for name, weight in weights.items():
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not is_number or not 0 < weight < sys.float_info.max:
                yield f"dataset.sources.{name}.weight={weight}: must be a number above 0"
                return
        if missing := [name for name in sorted(self.sources) if name not in weights]:
            yield f"dataset.sources.{missing[0]}.weight: must be given, as other sources have weights"
        elif abs((total := math.fsum(weights.values())) - 1) > _ROUNDING:
            normal = " ".join(f"{name}={weight / total:.4g}" for name, weight in sorted(weights.items()))
            yield f"dataset.sources: the weights sum to {total:.6g}, and must sum to 1, as shares do: {normal}"
        if self.mixing_temperature is not None:
            yield "dataset.mixing_temperature and weights of sources both say how much of each is trained on: set one"

    def _of_parts(self) -> Iterator[str]:
        parts: dict[str, DatasetConfig] = {}
        for name in sorted(self.sources):
            try:
                parts[name] = self._part(name)
            except ValidationError as error:
                messages: dict[str, list[str]] = {}
                for problem in error.errors():  # several of a key are those of a union's types
                    key = "".join(f".{part}" for part in problem["loc"][:1])
                    messages.setdefault(key, []).append(problem["msg"].removeprefix("Value error, "))
                for key, told in messages.items():
                    yield f"dataset.sources.{name}{key}: {'; or '.join(dict.fromkeys(told))}"
                continue
            if parts[name].path == "none":
                yield f"dataset.sources.{name}.path: must be given; add dataset.sources.{name}.path=VALUE"
        formats = dict.fromkeys(part.format for part in parts.values())
        if parts and len(parts) == len(self.sources) and not {self.format, "auto"} & {*formats}:
            yield (
                f"dataset.format={self.format} is how the saved model will be prompted, but no source has this format: "
                f"set dataset.format={' or '.join(formats)}"
            )
