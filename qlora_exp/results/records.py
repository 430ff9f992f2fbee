"""Read past runs back from an MLflow store, so that they can be compared or repeated.

This module only reads: it changes nothing in the store, and imports no training code.
"""

import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

from qlora_exp.libraries.mlflow import stored_runs
from qlora_exp.results.record import Record
from qlora_exp.tracking.journal import ELSEWHERE_TAG, PARENT_TAG, run_id
from qlora_exp.tracking.journal import FILE as JOURNAL_FILE
from qlora_exp.tracking.mlflow_store import reader
from qlora_exp.tracking.refusals import hint
from qlora_exp.tracking.stores import artifacts, mlflow_views
from qlora_exp.tracking.stores.sqlite_store import sqlite_file
from qlora_exp.tracking.stores.uris import store_uri
from qlora_exp.utils.errors import TrackingError, first_line
from qlora_exp.utils.files import open_inside
from qlora_exp.utils.secrets import redact

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

_PAGE = 200
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_RUN_KEY = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class MlflowRecord(Record):
    """A run in an MLflow store."""

    experiment_id: str
    artifact_uri: str
    start_time: int
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
            info.start_time,
            mlflow,
        )

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Return every value of a metric with its step, in order."""
        with mlflow_errors_explained():
            points = self.mlflow.get_metric_history(self.run_id, metric)
        return sorted({point.step: float(point.value) for point in points}.items())

    @cached_property
    def _artifacts(self) -> tuple[Path | None, str | None]:
        """The folder with the artifacts, None if MLflow has to download them; and why they cannot be read."""
        try:
            folder = artifacts.folder(self.artifact_uri, self.mlflow.tracking_uri)
        except TrackingError as error:
            return None, str(error)
        is_there = folder is None or folder.is_dir()
        return folder, None if is_there else f"its artifacts were in {folder}, which is not there"

    @property
    def lost(self) -> str | None:
        """Why no artifact can be read; None if they can."""
        return self._artifacts[1]

    def text(self, path: str) -> str:
        """Return the text of an artifact; empty if there is none."""
        folder, lost = self._artifacts
        if lost:
            return ""
        if folder is not None:
            try:
                with open_inside(folder, path) as file:
                    return file.read().decode("utf-8")
            except FileNotFoundError:
                return ""  # older runs and failed runs do not have every file
            except (OSError, ValueError) as error:
                raise TrackingError(f"run {self.run_id}: {path} cannot be read: {first_line(error)}") from error
        with tempfile.TemporaryDirectory() as target:
            try:
                where = {"artifact_uri": f"{self.artifact_uri}/{path}", "tracking_uri": self.mlflow.tracking_uri}
                return Path(download_artifacts(**where, dst_path=target)).read_text("utf-8")
            except (MlflowException, OSError) as error:
                with mlflow_errors_explained():
                    files = self.mlflow.list_artifacts(self.run_id, path.rpartition("/")[0] or None)
                if path in [file.path for file in files]:
                    raise TrackingError(
                        f"MLflow lists {path} but does not return it, for run {self.run_id}: {first_line(error)}"
                    ) from error
                return ""

    def seed_losses(self) -> list[float]:
        """Return the held-out losses of all runs (this one included) that differ from it in the seed only."""
        known_params = ((key, self.params.get(key, "")) for key in ("model.model_name_or_path", "method.name"))
        where = " and ".join(f"params.`{key}` = '{value}'" for key, value in known_params if "'" not in value)
        with mlflow_errors_explained():
            records = list(_search(self.mlflow, [self.experiment_id], None, where))
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
        chosen: names of sweeps or runs, output folders, run ids (the id of a sweep stands for its jobs) or run keys.
            Default: the newest sweep, or all runs if `experiment` or `where` is given.
        experiment: name of the only MLflow experiment to search.
        where: filter in MLflow's syntax, such as `params.method.name = 'lora'`; applied in addition to `chosen`.

    Raises:
        TrackingError: the store cannot be reached, or has no such runs.
    """
    mlflow = reader(uri)
    words = [_word(word, store_uri(uri)) for word in chosen]
    with mlflow_errors_explained():
        return _find(mlflow, words, experiment, where)


def every(
    uri: str | None, chosen: Sequence[str] = (), experiment: str | None = None, where: str | None = None
) -> list[MlflowRecord]:
    """Return all runs, newest first: also those that failed, earlier ones of the same run key, and repetitions.

    Args:
        uri: MLflow tracking URI. Default: SQLite in ./mlruns.
        chosen: names of sweeps or runs, output folders, run ids or run keys. Default: all.
        experiment: name of the only MLflow experiment to search.
        where: filter in MLflow's syntax, such as `params.method.name = 'lora'`.

    Raises:
        TrackingError: the store cannot be reached, or has no such experiment or run id.
    """
    mlflow = reader(uri)
    words = [_word(word, store_uri(uri)) for word in chosen]
    with mlflow_errors_explained():
        ids = _experiments(mlflow, experiment)
        selections: list[_Selection | None] = [_selection(mlflow, ids, word) for word in words] or [None]
        runs = {run.run_id: run for selection in selections for run in _selected(mlflow, ids, selection, where)}
    return sorted(runs.values(), key=lambda run: run.start_time, reverse=True)


def by_ids(uri: str | None, run_ids: Sequence[str]) -> list[MlflowRecord]:
    """Return the runs with these ids, in this order.

    Raises:
        TrackingError: the store cannot be reached, or lacks one of the runs.
    """
    mlflow = reader(uri)
    with mlflow_errors_explained():
        return [MlflowRecord.of(mlflow.get_run(run_id), mlflow) for run_id in run_ids]


@contextmanager
def mlflow_errors_explained() -> Iterator[None]:
    """Raise errors of MLflow as `TrackingError`."""
    try:
        yield
    # RequestException: what is no answer of MLflow, such as HTML; the others: a damaged file.
    except (MlflowException, RequestException, SQLAlchemyError, sqlite3.Error) as error:
        raise TrackingError(f"MLflow: {first_line(error)}{hint(error)}") from error


def _find(mlflow: MlflowClient, chosen: Sequence[str], experiment: str | None, where: str | None) -> list[MlflowRecord]:
    ids = _experiments(mlflow, experiment)
    selections: list[_Selection | None] = [_selection(mlflow, ids, word) for word in chosen]
    if not selections:
        selections = [None] if experiment or where else [_newest_sweep(mlflow, ids)]
    results = [_selected(mlflow, ids, selection, where) for selection in selections]
    # Only `reproduce` judges repetitions: in a table, a repetition would replace the run that it repeats.
    runs = [
        run
        for selection, group in zip(selections, results, strict=True)
        for run in sorted(group, key=lambda run: run.start_time)
        if "reproduces" not in run.tags or (selection and selection.attribute) or "reproduces" in (where or "")
    ]
    newest = {run.tags["run_key"]: run for run in sorted(runs, key=lambda run: run.outcome == "ok")}
    if not newest and chosen and where:
        raise TrackingError(f"--filter {where}: no run of {', '.join(chosen)} matches this filter")
    if not newest and chosen:
        sweeps = mlflow.search_runs(ids, "tags.`sweep.keys` LIKE '%'", max_results=_PAGE)
        names = ", ".join(dict.fromkeys(run.data.tags["sweep"] for run in sweeps))
        raise TrackingError(f"MLflow has no runs of {', '.join(chosen)}; sweeps in the store: {names or 'none'}")
    if not newest:
        raise TrackingError(f"MLflow has no runs of {', '.join([*chosen, where or '']).strip(', ') or 'this tool'} yet")
    return [run for run in runs if newest[run.tags["run_key"]] is run]


def _experiments(mlflow: MlflowClient, name: str | None) -> list[str]:
    """Return the id of the experiment with this name, or those of all."""
    experiments = [mlflow.get_experiment_by_name(name)] if name else mlflow.search_experiments()
    if experiments == [None]:
        names = ", ".join(existing.name for existing in mlflow.search_experiments())
        raise TrackingError(f"MLflow has no experiment '{name}'; existing experiments: {names}")
    if deleted := [entry for entry in experiments if entry is not None and entry.lifecycle_stage != "active"]:
        raise TrackingError(
            f"experiment '{name}' was deleted in MLflow; MlflowClient().restore_experiment"
            f"('{deleted[0].experiment_id}') restores it"
        )
    return [entry.experiment_id for entry in experiments if entry is not None]


def page(uri: str | None, server: str) -> str:
    """Return the address at which the MLflow server at `server` shows the newest runs; `server` if there are no runs.

    Raises:
        TrackingError: the store does not exist or cannot be reached.
    """
    mlflow = reader(uri)
    with mlflow_errors_explained():
        experiments = {experiment.experiment_id: experiment for experiment in mlflow.search_experiments()}
        newest = mlflow.search_runs(list(experiments), max_results=1)
    if not newest:
        return server
    tags = experiments[newest[0].info.experiment_id].tags
    return mlflow_views.address(server, newest[0].info.experiment_id, list(tags), "sweep" in newest[0].data.tags)


@dataclass(frozen=True)
class _Selection:
    """Runs with this value of a tag, or of an attribute that names runs themselves."""

    key: str
    value: str
    attribute: bool = False

    def __str__(self) -> str:
        """Return it as an MLflow filter."""
        quoted = f'"{self.value}"' if "'" in self.value else f"'{self.value}'"
        return f"{'attributes' if self.attribute else 'tags'}.`{self.key}` = {quoted}"


def _selected(
    mlflow: MlflowClient, ids: list[str], selection: "_Selection | None", where: str | None
) -> Iterator[MlflowRecord]:
    """Iterate over the runs that match; of a sweep also over the jobs that were done before it, as other runs."""
    yield from _search(mlflow, ids, selection, where)
    if selection is None or selection.key not in ("sweep", PARENT_TAG):
        return
    its_own = _Selection("run_id", selection.value, attribute=True) if selection.key == PARENT_TAG else selection
    for sweep in mlflow.search_runs(ids, f"{its_own} and tags.`{ELSEWHERE_TAG}0` LIKE '%'", max_results=_PAGE):
        for key, run_ids in sweep.data.tags.items():
            listed = ", ".join(f"'{run_id}'" for run_id in run_ids.split() if _RUN_ID.fullmatch(run_id))
            if key.startswith(ELSEWHERE_TAG) and listed:
                by_id = f"attributes.run_id IN ({listed})"
                yield from _search(mlflow, ids, None, f"{by_id} and {where}" if where else by_id)


def _search(
    mlflow: MlflowClient, ids: list[str], selection: _Selection | None, where: str | None
) -> Iterator[MlflowRecord]:
    """Iterate over the runs made by qlora-exp that match."""
    file = sqlite_file(mlflow.tracking_uri)
    if file is not None and where is None and not (selection and selection.attribute):
        tags_wanted = {"run_key": None} | ({selection.key: selection.value} if selection else {})
        for run in stored_runs(file, ids, tags_wanted):
            tags = {"outcome": run.status.lower()} | run.tags
            place = run.experiment_id, run.artifact_uri, run.start_time
            yield MlflowRecord(run.run_id, run.name, run.params, tags, run.metrics, *place, mlflow)
        return
    token = None
    filter_string = " and ".join(str(part) for part in (selection, where, "tags.run_key LIKE '%'") if part)
    while True:
        runs = mlflow.search_runs(ids, filter_string, max_results=_PAGE, page_token=token)
        yield from (MlflowRecord.of(run, mlflow) for run in runs)
        if not (token := runs.token):
            return


def _selection(mlflow: MlflowClient, ids: list[str], word: str) -> _Selection:
    """Return the runs that one word of `chosen` names."""
    if _RUN_ID.fullmatch(word):
        is_sweep = "sweep.keys" in mlflow.get_run(word).data.tags
        return _Selection(PARENT_TAG, word) if is_sweep else _Selection("run_id", word, attribute=True)
    if _RUN_KEY.fullmatch(word):
        return _Selection("run_key", word)
    if "'" in word and '"' in word:
        raise TrackingError(
            f"{word}: MLflow cannot search for a name that contains both kinds of quotes; give the run id"
        )
    sweep = _Selection("sweep", word)
    is_sweep = bool(mlflow.search_runs(ids, str(sweep), max_results=1))
    return sweep if is_sweep else _Selection("run_name", word, attribute=True)


def _word(word: str, uri: str) -> str:
    """Return what to search for: for an output folder the id of its run, for any other folder its name."""
    try:
        folder = Path(word).resolve() if Path(word).is_dir() else None
    except OSError:  # too long for a path
        return word
    if folder is None:
        return word
    if not (folder / JOURNAL_FILE).is_file():
        return folder.name
    if (found := run_id(folder, uri)) is None:
        at = redact(uri)
        raise TrackingError(f"{folder}: MLflow at {at} has no run of this folder: give its --uri, or qlora-exp sync")
    return found


def _newest_sweep(mlflow: MlflowClient, ids: list[str]) -> _Selection | None:
    newest = mlflow.search_runs(ids, "tags.`sweep.keys` LIKE '%'", max_results=1)
    return _Selection(PARENT_TAG, newest[0].info.run_id) if newest else None
