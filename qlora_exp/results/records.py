"""Past runs, read back to be compared or repeated: what any record says, and those in an MLflow store.

Changes nothing there; imports nothing of training.
"""

import json
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


@dataclass(frozen=True)
class Record(ABC):
    """One run."""

    run_id: str
    """MLflow's."""
    name: str
    """What people call it."""
    params: dict[str, str]
    """The config, flat, without what is not set; and what became of `auto`."""
    tags: dict[str, str]
    """All of them."""
    metrics: dict[str, float]
    """The last value of each."""

    @abstractmethod
    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Every value of a metric with its step, in order."""

    @abstractmethod
    def text(self, path: str) -> str:
        """An artifact; empty if there is none."""

    @abstractmethod
    def seed_losses(self) -> list[float]:
        """Held-out losses of the runs, this one too, that differ from it by nothing but the seed."""

    def yaml(self) -> dict[str, Any]:
        """The whole config that it was started with.

        Raises:
            ConfigError: it has none, or one that is no plain YAML.
        """
        if not (text := self.text(CONFIG_FILE)):
            raise ConfigError(f"run {self.run_id} has no {CONFIG_FILE}: it was not made by qlora-exp, or did not begin")
        found = plain_yaml(text, f"{CONFIG_FILE} of run {self.run_id}")
        if not isinstance(found, dict):
            raise ConfigError(f"{CONFIG_FILE} of run {self.run_id} is no mapping")
        return found

    @property
    def outcome(self) -> str:
        """ok, or how it failed."""
        return self.tags.get("outcome", "unknown")

    @cached_property
    def config(self) -> dict[str, str]:
        """Of the params, what makes two runs the same but for the seed."""
        apart = (*APART, "resolved", "data", "seed", "device")
        given = {key: value for key, value in self.params.items() if value != "None"}
        return {key: value for key, value in given.items() if key.split(".")[0] not in apart}

    @cached_property
    def losses(self) -> list[dict[str, float]]:
        """After training, of each held-out row: `nll` (sum, nats) and `tokens`; empty if they were not kept."""
        text = self.text("evaluation/after_losses.jsonl")
        return [json.loads(line) for line in text.splitlines()]

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """After training, each generated answer with its scores; empty if none were generated."""
        text = self.text("evaluation/answers.json")
        return json.loads(text)["after"] if text else []

    @cached_property
    def unrelated_losses(self) -> list[dict[str, float]]:
        """As `losses`, of each row of unrelated text."""
        text = self.text("evaluation/after_unrelated_losses.jsonl")
        return [json.loads(line) for line in text.splitlines()]

    @cached_property
    def lm_eval(self) -> dict[str, Any]:
        """What lm-eval's scores after training came from, as `harness.evaluate` gives it; empty without any."""
        text = self.text("evaluation/after_lm_eval.json")
        return json.loads(text) if text else {}


@dataclass(frozen=True)
class MlflowRecord(Record):
    """One run in a store."""

    experiment_id: str
    artifact_uri: str
    mlflow: MlflowClient

    @classmethod
    def of(cls, run: Run, mlflow: MlflowClient) -> Self:
        """Of MLflow's own run."""
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
        """Every value of a metric with its step, in order."""
        with explained():
            points = self.mlflow.get_metric_history(self.run_id, metric)
        return sorted({point.step: float(point.value) for point in points}.items())

    def text(self, path: str) -> str:
        """An artifact; empty if there is none."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                where = {"artifact_uri": f"{self.artifact_uri}/{path}", "tracking_uri": self.mlflow.tracking_uri}
                return Path(download_artifacts(**where, dst_path=folder)).read_text("utf-8")
            except (MlflowException, OSError) as error:
                with explained():
                    known = self.mlflow.list_artifacts(self.run_id, path.rpartition("/")[0] or None)
                if path in [one.path for one in known]:
                    raise TrackingError(
                        f"MLflow does not give {path} of run {self.run_id}: {first_line(error)}"
                    ) from error
                return ""  # an older or a failed run does not have it

    def seed_losses(self) -> list[float]:
        """Held-out losses of the runs, this one too, that differ from it by nothing but the seed."""
        known = ((key, self.params.get(key, "")) for key in ("model.model_name_or_path", "method.name"))
        where = " and ".join(f"params.`{key}` = '{value}'" for key, value in known if "'" not in value)
        with explained():
            runs = list(_search(self.mlflow, [self.experiment_id], where, None))
        found = [MlflowRecord.of(run, self.mlflow) for run in runs]
        same = [one for one in found if one.config == self.config and one.outcome == "ok"]
        by_seed = {one.params.get("seed"): one.metrics["after/loss"] for one in same if "after/loss" in one.metrics}
        return list(by_seed.values())


def find(
    uri: str | None, chosen: Sequence[str] = (), experiment: str | None = None, where: str | None = None
) -> list[MlflowRecord]:
    """Runs of one key each, as they were chosen, oldest first; of one that ran again the newest that ended well.

    Repetitions (`reproduce`) are left out, unless chosen by id or name, or by `where` with their tag `reproduces`.

    Args:
        uri: MLflow's tracking URI; None is SQLite in ./mlruns.
        chosen: names of sweeps or runs, run ids (of a sweep: its jobs) or run keys; none is the newest sweep, or all
            runs if `experiment` or `where` is given.
        experiment: look only there.
        where: MLflow's own filter, such as `params.method.name = 'lora'`, beside `chosen`.

    Raises:
        TrackingError: the store does not answer, or has no such runs.
    """
    mlflow = _reader(uri)
    with explained():
        return [MlflowRecord.of(run, mlflow) for run in _find(mlflow, chosen, experiment, where)]


def by_ids(uri: str | None, run_ids: Sequence[str]) -> list[MlflowRecord]:
    """The runs with these ids, in this order.

    Raises:
        TrackingError: the store does not answer, or has lost one.
    """
    mlflow = _reader(uri)
    with explained():
        return [MlflowRecord.of(mlflow.get_run(one), mlflow) for one in run_ids]


@contextmanager
def explained() -> Iterator[None]:
    """MLflow's errors as `TrackingError`."""
    try:
        yield
    except MlflowException as error:
        raise TrackingError(f"MLflow: {first_line(error)}") from error


def _find(mlflow: MlflowClient, chosen: Sequence[str], experiment: str | None, where: str | None) -> list[Run]:
    chosen = [Path(word).name if Path(word).is_dir() else word for word in chosen]  # a sweep's folder has its name
    every = [mlflow.get_experiment_by_name(experiment)] if experiment else mlflow.search_experiments()
    if every == [None]:
        known = ", ".join(one.name for one in mlflow.search_experiments())
        raise TrackingError(f"MLflow has no experiment '{experiment}'; it has: {known}")
    ids = [one.experiment_id for one in every if one is not None]
    filters = [_filter(mlflow, ids, word) for word in chosen]
    if not filters:
        filters = [""] if experiment or where else [_newest_sweep(mlflow, ids)]
    found = [_search(mlflow, ids, one, where) for one in filters]
    # A repetition is for `reproduce` to judge: in a table it would stand for the run that it repeats.
    runs = [
        run
        for one, part in zip(filters, found, strict=True)
        for run in sorted(part, key=lambda run: run.info.start_time)
        if "reproduces" not in run.data.tags or one.startswith("attributes.") or "reproduces" in (where or "")
    ]
    newest = {
        run.data.tags["run_key"]: run for run in sorted(runs, key=lambda run: run.data.tags.get("outcome") == "ok")
    }
    if not newest and chosen and where:
        raise TrackingError(f"--filter {where}: matches no run of {', '.join(chosen)}")
    if not newest and chosen:
        sweeps = mlflow.search_runs(ids, "tags.`sweep.keys` LIKE '%'", max_results=_PAGE)
        known = ", ".join(dict.fromkeys(run.data.tags["sweep"] for run in sweeps))
        raise TrackingError(f"MLflow has no runs of {', '.join(chosen)}; sweeps that it has: {known or 'none'}")
    if not newest:
        raise TrackingError(f"MLflow has no runs of {', '.join([*chosen, where or '']).strip(', ') or 'this tool'} yet")
    return [run for run in runs if newest[run.data.tags["run_key"]] is run]


def page(uri: str | None, server: str) -> str:
    """Where the MLflow server at `server` shows the newest runs, of a store that may have none yet.

    Raises:
        TrackingError: the store is not there or does not answer.
    """
    mlflow = _reader(uri)
    with explained():
        experiments = {one.experiment_id: one for one in mlflow.search_experiments()}
        newest = mlflow.search_runs(list(experiments), max_results=1)
    if not newest:
        return server
    tags = experiments[newest[0].info.experiment_id].tags
    return mlflow_views.address(server, newest[0].info.experiment_id, list(tags), "sweep" in newest[0].data.tags)


def _reader(uri: str | None) -> MlflowClient:
    """The client of a store that is there; one that is not is not made."""
    file = Path(store_uri(uri).removeprefix("sqlite:///"))
    if store_uri(uri).startswith("sqlite:///") and not file.is_file():
        raise TrackingError(f"no runs yet: {file} is not there; start this where you train, or give --uri")
    return client(uri)


def _search(mlflow: MlflowClient, ids: list[str], found: str, where: str | None) -> Iterator[Run]:
    """Runs of ours, page by page."""
    token = None
    words = " and ".join(part for part in (found, where, "tags.run_key LIKE '%'") if part)
    while True:
        page = mlflow.search_runs(ids, words, max_results=_PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _filter(mlflow: MlflowClient, ids: list[str], word: str) -> str:
    """MLflow's filter for one of `chosen`."""
    if _RUN_ID.fullmatch(word):
        is_sweep = "sweep.keys" in mlflow.get_run(word).data.tags
        return f"tags.`mlflow.parentRunId` = '{word}'" if is_sweep else f"attributes.run_id = '{word}'"
    if _RUN_KEY.fullmatch(word):
        return f"tags.run_key = '{word}'"
    if "'" in word:
        raise TrackingError(f"{word}: MLflow cannot look for a name with a quote; give the run's id")
    of_sweep = f"tags.sweep = '{word}'"
    return of_sweep if mlflow.search_runs(ids, of_sweep, max_results=1) else f"attributes.run_name = '{word}'"


def _newest_sweep(mlflow: MlflowClient, ids: list[str]) -> str:
    newest = mlflow.search_runs(ids, "tags.`sweep.keys` LIKE '%'", max_results=1)
    return f"tags.`mlflow.parentRunId` = '{newest[0].info.run_id}'" if newest else ""
