"""Read past runs back, so that they can be compared or repeated: a run from any source, and runs in an MLflow store.

This module only reads: it changes nothing in the store, and imports no training code.
"""

import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from qlora_exp.config.untrusted import plain_yaml
from qlora_exp.config.values import APART
from qlora_exp.tracking import mlflow_views
from qlora_exp.tracking.journal import CONFIG_FILE
from qlora_exp.tracking.mlflow_store import client, store_uri
from qlora_exp.utils.errors import ConfigError, TrackingError, first_line

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

_PAGE = 200
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_RUN_KEY = re.compile(r"[0-9a-f]{16}")


class _Answers(BaseModel):
    """Content of `answers.json`."""

    after: list[dict[str, Any]] = []


class _Losses(TypedDict):
    """A line of `after_losses.jsonl`."""

    nll: float
    tokens: float


_LOSSES = TypeAdapter(_Losses)
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

    def yaml(self) -> dict[str, Any]:
        """Return the complete config that the run was started with.

        Raises:
            ConfigError: the run has no config, or the config is not plain YAML.
        """
        if not (text := self.text(CONFIG_FILE)):
            raise ConfigError(
                f"run {self.run_id} has no {CONFIG_FILE}: it was not made by qlora-exp, or failed before it started"
            )
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
        return {key: value for key, value in set_params.items() if key.split(".")[0] not in ignored}

    @cached_property
    def losses(self) -> list[dict[str, float]]:
        """For each held-out row after training: `nll` (sum, nats) and `tokens`; empty if they were not saved."""
        return self._rows("evaluation/after_losses.jsonl")

    @cached_property
    def losses_before(self) -> list[dict[str, float]]:
        """Like `losses`, before training."""
        return self._rows("evaluation/before_losses.jsonl")

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """Each answer generated after training, with its scores; empty if none was generated."""
        return self._parsed("evaluation/answers.json", _ANSWERS).after

    @cached_property
    def unrelated_losses(self) -> list[dict[str, float]]:
        """Like `losses`, for each row of the unrelated text that measures forgetting."""
        return self._rows("evaluation/after_unrelated_losses.jsonl")

    @cached_property
    def lm_eval(self) -> dict[str, Any]:
        """Details of lm-eval scores after training, from `training.lm_eval.evaluate`; empty if there are none."""
        return self._parsed("evaluation/after_lm_eval.json", _OBJECT)

    def _rows(self, path: str) -> list[dict[str, float]]:
        return loss_rows(self.text(path), f"{path} of run {self.run_id}")

    def _parsed(self, path: str, kind: TypeAdapter[Any]) -> Any:
        text = self.text(path) or "{}"
        with _damage_explained(f"{path} of run {self.run_id}"):
            return kind.validate_json(text)


def loss_rows(text: str, what: str) -> list[dict[str, float]]:
    """Parse a file of losses, a row in each line; `what` names the file in messages.

    Raises:
        ConfigError: the file is damaged.
    """
    with _damage_explained(what):
        return [dict(_LOSSES.validate_json(line)) for line in text.splitlines()]  # type: ignore[arg-type]


@contextmanager
def _damage_explained(what: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(" ".join(filter(None, [f"{what} is damaged:", where, problem["msg"]]))) from error


@dataclass(frozen=True)
class MlflowRecord(Record):
    """A run in an MLflow store."""

    experiment_id: str
    artifact_uri: str
    mlflow: MlflowClient

    @classmethod
    def of(cls, run: Run, mlflow: MlflowClient) -> Self:
        """Make a record from an MLflow run."""
        info, data = run.info, run.data
        tags = {"outcome": info.status.lower()} | data.tags
        return cls(
            info.run_id,
            str(info.run_name),
            data.params,
            tags,
            data.metrics,
            info.experiment_id,
            info.artifact_uri,
            mlflow,
        )

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Return every value of a metric with its step, in order."""
        with mlflow_errors_explained():
            points = self.mlflow.get_metric_history(self.run_id, metric)
        return sorted({point.step: float(point.value) for point in points}.items())

    def text(self, path: str) -> str:
        """Return the text of an artifact; empty if there is none."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                where = {"artifact_uri": f"{self.artifact_uri}/{path}", "tracking_uri": self.mlflow.tracking_uri}
                return Path(download_artifacts(**where, dst_path=folder)).read_text("utf-8")
            except (MlflowException, OSError) as error:
                with mlflow_errors_explained():
                    files = self.mlflow.list_artifacts(self.run_id, path.rpartition("/")[0] or None)
                if path in [file.path for file in files]:
                    raise TrackingError(
                        f"MLflow lists {path} but does not return it, for run {self.run_id}: {first_line(error)}"
                    ) from error
                return ""  # older runs and failed runs do not have every file

    def seed_losses(self) -> list[float]:
        """Return the held-out losses of all runs (this one included) that differ from it in the seed only."""
        known_params = ((key, self.params.get(key, "")) for key in ("model.model_name_or_path", "method.name"))
        where = " and ".join(f"params.`{key}` = '{value}'" for key, value in known_params if "'" not in value)
        with mlflow_errors_explained():
            runs = list(_search(self.mlflow, [self.experiment_id], where, None))
        records = [MlflowRecord.of(run, self.mlflow) for run in runs]
        same_config = [record for record in records if record.config == self.config and record.outcome == "ok"]
        by_seed = {
            record.params.get("seed"): record.metrics["after/loss"]
            for record in same_config
            if "after/loss" in record.metrics
        }
        return list(by_seed.values())


def find(
    uri: str | None, chosen: Sequence[str] = (), experiment: str | None = None, where: str | None = None
) -> list[MlflowRecord]:
    """Find runs in the store: in the order of `chosen`, then oldest first.

    Each run key appears once. If it ran several times, the newest run with outcome `ok` is returned; if none succeeded,
    the newest run.

    Repetitions made by `reproduce` are left out, unless `chosen` has their id or name, or `where` mentions
    their tag `reproduces`.

    Args:
        uri: MLflow tracking URI. Default: SQLite in ./mlruns.
        chosen: names of sweeps or runs, run ids (the id of a sweep stands for its jobs) or run keys. Default: the
            newest sweep, or all runs if `experiment` or `where` is given.
        experiment: name of the only MLflow experiment to search.
        where: filter in MLflow's syntax, such as `params.method.name = 'lora'`; applied in addition to `chosen`.

    Raises:
        TrackingError: the store cannot be reached, or has no such runs.
    """
    mlflow = _reader(uri)
    with mlflow_errors_explained():
        return [MlflowRecord.of(run, mlflow) for run in _find(mlflow, chosen, experiment, where)]


def by_ids(uri: str | None, run_ids: Sequence[str]) -> list[MlflowRecord]:
    """Return the runs with these ids, in this order.

    Raises:
        TrackingError: the store cannot be reached, or lacks one of the runs.
    """
    mlflow = _reader(uri)
    with mlflow_errors_explained():
        return [MlflowRecord.of(mlflow.get_run(run_id), mlflow) for run_id in run_ids]


@contextmanager
def mlflow_errors_explained() -> Iterator[None]:
    """Raise errors of MLflow as `TrackingError`."""
    try:
        yield
    except MlflowException as error:
        raise TrackingError(f"MLflow: {first_line(error)}") from error


def _find(mlflow: MlflowClient, chosen: Sequence[str], experiment: str | None, where: str | None) -> list[Run]:
    # A sweep's folder has the sweep's name.
    chosen = [Path(word).name if Path(word).is_dir() else word for word in chosen]
    experiments = [mlflow.get_experiment_by_name(experiment)] if experiment else mlflow.search_experiments()
    if experiments == [None]:
        names = ", ".join(existing.name for existing in mlflow.search_experiments())
        raise TrackingError(f"MLflow has no experiment '{experiment}'; existing experiments: {names}")
    ids = [entry.experiment_id for entry in experiments if entry is not None]
    filters = [_filter(mlflow, ids, word) for word in chosen]
    if not filters:
        filters = [""] if experiment or where else [_newest_sweep(mlflow, ids)]
    results = [_search(mlflow, ids, selection, where) for selection in filters]
    # Only `reproduce` judges repetitions: in a table, a repetition would replace the run that it repeats.
    runs = [
        run
        for selection, group in zip(filters, results, strict=True)
        for run in sorted(group, key=lambda run: run.info.start_time)
        if "reproduces" not in run.data.tags or selection.startswith("attributes.") or "reproduces" in (where or "")
    ]
    newest = {
        run.data.tags["run_key"]: run for run in sorted(runs, key=lambda run: run.data.tags.get("outcome") == "ok")
    }
    if not newest and chosen and where:
        raise TrackingError(f"--filter {where}: no run of {', '.join(chosen)} matches this filter")
    if not newest and chosen:
        sweeps = mlflow.search_runs(ids, "tags.`sweep.keys` LIKE '%'", max_results=_PAGE)
        names = ", ".join(dict.fromkeys(run.data.tags["sweep"] for run in sweeps))
        raise TrackingError(f"MLflow has no runs of {', '.join(chosen)}; sweeps in the store: {names or 'none'}")
    if not newest:
        raise TrackingError(f"MLflow has no runs of {', '.join([*chosen, where or '']).strip(', ') or 'this tool'} yet")
    return [run for run in runs if newest[run.data.tags["run_key"]] is run]


def page(uri: str | None, server: str) -> str:
    """Return the address at which the MLflow server at `server` shows the newest runs; `server` if there are no runs.

    Raises:
        TrackingError: the store does not exist or cannot be reached.
    """
    mlflow = _reader(uri)
    with mlflow_errors_explained():
        experiments = {experiment.experiment_id: experiment for experiment in mlflow.search_experiments()}
        newest = mlflow.search_runs(list(experiments), max_results=1)
    if not newest:
        return server
    tags = experiments[newest[0].info.experiment_id].tags
    return mlflow_views.address(server, newest[0].info.experiment_id, list(tags), "sweep" in newest[0].data.tags)


def _reader(uri: str | None) -> MlflowClient:
    """Return a client of an existing store. MLflow would create a missing SQLite file; this raises instead."""
    file = Path(store_uri(uri).removeprefix("sqlite:///"))
    if store_uri(uri).startswith("sqlite:///") and not file.is_file():
        raise TrackingError(
            f"no runs yet: {file} does not exist; start this in the folder where you train, or give --uri"
        )
    return client(uri)


def _search(mlflow: MlflowClient, ids: list[str], selection: str, where: str | None) -> Iterator[Run]:
    """Iterate over the runs made by qlora-exp that match, page by page."""
    token = None
    filter_string = " and ".join(part for part in (selection, where, "tags.run_key LIKE '%'") if part)
    while True:
        runs = mlflow.search_runs(ids, filter_string, max_results=_PAGE, page_token=token)
        yield from runs
        if not (token := runs.token):
            return


def _filter(mlflow: MlflowClient, ids: list[str], word: str) -> str:
    """Return the MLflow filter for one word of `chosen`."""
    if _RUN_ID.fullmatch(word):
        is_sweep = "sweep.keys" in mlflow.get_run(word).data.tags
        return f"tags.`mlflow.parentRunId` = '{word}'" if is_sweep else f"attributes.run_id = '{word}'"
    if _RUN_KEY.fullmatch(word):
        return f"tags.run_key = '{word}'"
    if "'" in word:
        raise TrackingError(f"{word}: MLflow cannot search for a name that contains a quote; give the run id")
    of_sweep = f"tags.sweep = '{word}'"
    return of_sweep if mlflow.search_runs(ids, of_sweep, max_results=1) else f"attributes.run_name = '{word}'"


def _newest_sweep(mlflow: MlflowClient, ids: list[str]) -> str:
    newest = mlflow.search_runs(ids, "tags.`sweep.keys` LIKE '%'", max_results=1)
    return f"tags.`mlflow.parentRunId` = '{newest[0].info.run_id}'" if newest else ""
