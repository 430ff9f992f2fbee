"""What a past run recorded: its config, metrics and evaluation files, from whichever source they are read."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NotRequired

from pydantic import BaseModel, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from qlora_exp.config.untrusted import plain_yaml
from qlora_exp.config.values import APART
from qlora_exp.tracking.journal import CONFIG_FILE
from qlora_exp.tracking.limits import lost_its_end
from qlora_exp.utils.errors import ConfigError


class _Answers(BaseModel):
    """Content of `answers.json`."""

    after: list[dict[str, Any]] = []


class _Losses(TypedDict):
    """A line of `after_losses.jsonl`."""

    nll: float
    tokens: float
    source: NotRequired[str]


_LOSSES = TypeAdapter(list[_Losses])
_ANSWERS = TypeAdapter(_Answers)
_OBJECT = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Record(ABC):
    """A past run, from whichever source it was read."""

    run_id: str
    """Id of the MLflow run."""
    name: str
    """Name that people read."""
    params: dict[str, str]
    """The config with dotted keys, without keys that are not set; also the values that `auto` resolved to."""
    tags: dict[str, str]
    """All MLflow tags."""
    metrics: dict[str, float]
    """Last value of each metric."""

    @abstractmethod
    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Return every value of a metric with its step, in order."""

    @abstractmethod
    def text(self, path: str) -> str:
        """Return the text of an artifact; empty if there is none."""

    @abstractmethod
    def seed_losses(self) -> list[float]:
        """Return the held-out losses of all runs (this one included) that differ from it in the seed only."""

    @property
    def lost(self) -> str | None:
        """Why no artifact can be read; None if they can."""
        return None

    def yaml(self) -> dict[str, Any]:
        """Return the complete config that the run was started with.

        Raises:
            ConfigError: the run has no config, or the config is not plain YAML.
        """
        if not (text := self.text(CONFIG_FILE)):
            why = self.lost or "it was not made by qlora-exp, or failed before it started"
            raise ConfigError(f"run {self.run_id} has no {CONFIG_FILE}: {why}")
        config = plain_yaml(text, f"{CONFIG_FILE} of run {self.run_id}")
        if not isinstance(config, dict):
            raise ConfigError(f"{CONFIG_FILE} of run {self.run_id} is not a mapping of keys to values")
        return config

    @property
    def outcome(self) -> str:
        """`ok`, or how the run failed."""
        return self.tags.get("outcome", "unknown")

    @cached_property
    def config(self) -> dict[str, str]:
        """The params that identify a configuration: runs that are equal in them differ in the seed only."""
        ignored = (*APART, "resolved", "data", "seed", "device")
        set_params = {key: value for key, value in self.params.items() if value != "None"}
        config = {key: value for key, value in set_params.items() if key.split(".")[0] not in ignored}
        if any(lost_its_end(value) for value in config.values()):
            # What was cut may differ. The digest also covers the seed, so such runs do not form one row.
            config["identity.config"] = self.tags.get("identity.config", self.run_id)
        return config

    @property
    def losses(self) -> list[dict[str, Any]]:
        """For each held-out row after training: `nll` (sum, nats), `tokens`, and `source` where there are several.

        Empty if they were not saved.
        """
        return self._rows("evaluation/after_losses.jsonl")

    @property
    def losses_before(self) -> list[dict[str, Any]]:
        """Like `losses`, before training."""
        return self._rows("evaluation/before_losses.jsonl")

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Each answer generated after training, with its scores; empty if none was generated."""
        return self._parsed("evaluation/answers.json", _ANSWERS).after

    @property
    def unrelated_losses(self) -> list[dict[str, Any]]:
        """Like `losses`, for each row of the unrelated text that measures forgetting."""
        return self._rows("evaluation/after_unrelated_losses.jsonl")

    @cached_property
    def lm_eval(self) -> dict[str, Any]:
        """Details of lm-eval scores after training, from `training.lm_eval.evaluate`; empty if there are none."""
        return self._parsed("evaluation/after_lm_eval.json", _OBJECT)

    def _rows(self, path: str) -> list[dict[str, Any]]:
        return loss_rows(self.text(path), f"{path} of run {self.run_id}")

    def _parsed(self, path: str, kind: TypeAdapter[Any]) -> Any:
        text = self.text(path) or "{}"
        with _damage_explained(f"{path} of run {self.run_id}"):
            return kind.validate_json(text)


def loss_rows(text: str, what: str) -> list[dict[str, Any]]:
    """Parse a file of losses, a row in each line; `what` names the file in messages.

    Raises:
        ConfigError: the file is damaged.
    """
    with _damage_explained(what):
        rows: list[dict[str, Any]] = _LOSSES.validate_json(f"[{','.join(text.splitlines())}]")  # type: ignore[assignment]
        return rows


@contextmanager
def _damage_explained(what: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(" ".join(filter(None, [f"{what} is damaged:", where, problem["msg"]]))) from error
