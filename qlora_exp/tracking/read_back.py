"""Read a run back from MLflow and compare it with its journal: MLflow has a run when it was read, not when it was sent.

A server that answers every request with "yes" for a while looks like one that stores everything.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus, Run

from qlora_exp.tracking.delivery import name_of
from qlora_exp.tracking.journal import PARENT_TAG, Journal, parent_run_id
from qlora_exp.tracking.limits import fit_message
from qlora_exp.tracking.refusals import read_run


@dataclass
class _Sent:
    """What a journal says that MLflow must have."""

    params: set[str] = field(default_factory=set)
    tags: set[str] = field(default_factory=set)
    parent_tags: dict[str, str] = field(default_factory=dict)
    datasets: set[tuple[str, str]] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    models: list[dict[str, Any]] = field(default_factory=list)
    names: Counter[frozenset[str]] = field(default_factory=Counter)
    """How many messages have exactly these metrics."""
    status: str = ""


def missing(mlflow: MlflowClient, journal: Journal) -> list[str]:
    """List what MLflow lacks of a journal, without what was left out for good; one line each.

    Sets the tag with the sweep's id if the sweep was sent again since then.

    Raises:
        JournalError: a message cannot be read.
        Exception: the store does not answer.
    """
    sent = _read_sent(journal)
    run = read_run(mlflow, journal)
    if PARENT_TAG in sent.tags:  # a job that was sent without its sweep does not have it
        sent.tags.remove(PARENT_TAG)
        _correct_parent(mlflow, journal, run, sent)
    lacks = [f"status {sent.status}: MLflow says {run.info.status}"] * (sent.status not in ("", run.info.status))
    lacks += _listed("params", sent.params - run.data.params.keys())
    lacks += _listed("tags", sent.tags - run.data.tags.keys())
    names = frozenset().union(*sent.names)
    lacks += _listed("metrics", names - run.data.metrics.keys())
    lacks += _points(mlflow, journal, _cover(sent.names) & run.data.metrics.keys())
    inputs = {(item.dataset.name, item.dataset.digest) for item in (run.inputs.dataset_inputs if run.inputs else [])}
    lacks += _listed("datasets", {name for name, digest in sent.datasets - inputs})
    lacks += _listed("artifacts", sent.files - _artifacts(mlflow, run.info.run_id, sent.files))
    return lacks + _listed("models", _incomplete_models(mlflow, run, sent.models))


def _read_sent(journal: Journal) -> _Sent:
    sent, left_out = _Sent(), journal.state.get("left_out", {})
    for message in journal.messages():
        if name_of(message) in left_out:
            continue
        match fit_message(message):
            case {"op": "start" | "resume", "tags": tags} as begin:
                sent.tags |= tags.keys()
                sent.parent_tags |= tags if begin["op"] == "start" else {}
                sent.status = ""
            case {"op": "params" | "tags" as op, "values": values}:
                kind = getattr(sent, op)
                kind |= {key for key in values if f"{op[:-1]} {key}" not in left_out}
            case {"op": "metrics", "values": values}:
                sent.names[frozenset(key for key in values if f"metric {key}" not in left_out)] += 1
            case {"op": "file", "path": path}:
                sent.files.add(path)
            case {"op": "dataset", "name": name, "digest": digest}:
                sent.datasets.add((name, digest))
            case {"op": "model"} as model:
                sent.models.append(model)
            case {"op": "end", "status": status}:
                sent.status = status
    return sent


def _listed(kind: str, names: Iterable[str]) -> list[str]:
    listed = sorted(names)
    return [f"{kind} {', '.join(listed[:10])}{f' and {len(listed) - 10} more' * (len(listed) > 10)}"] * bool(listed)


def _correct_parent(mlflow: MlflowClient, journal: Journal, run: Run, sent: _Sent) -> None:
    parent_id = parent_run_id(journal.folder, sent.parent_tags, journal.uri)
    if parent_id is not None and run.data.tags.get(PARENT_TAG) != parent_id:
        mlflow.set_tag(run.info.run_id, PARENT_TAG, parent_id)


def _cover(names: Counter[frozenset[str]]) -> set[str]:
    """Choose few metrics such that each message has one of them: MLflow stores all metrics of a message, or none."""
    rest, chosen = Counter({each: count for each, count in names.items() if each}), set()
    while rest:
        counts: Counter[str] = Counter()
        for each, count in rest.items():
            counts.update(dict.fromkeys(each, count))
        best = max(sorted(counts), key=counts.__getitem__)
        chosen.add(best)
        rest = Counter({each: count for each, count in rest.items() if best not in each})
    return chosen


def _points(mlflow: MlflowClient, journal: Journal, names: set[str]) -> list[str]:
    """Say how many points of these metrics MLflow lacks. Of a metric with one point, MLflow's last value is that."""
    points = defaultdict[str, set[tuple[int, int]]](set)
    for message in journal.messages():
        if message["op"] == "metrics":
            for name in names & message["values"].keys():
                points[name].add((message["step"], message["timestamp"]))
    lacks = []
    for name, expected in sorted(points.items()):
        if len(expected) > 1:
            history = mlflow.get_metric_history(journal.state["run_id"], name)
            if lost := expected - {(point.step, point.timestamp) for point in history}:
                lacks.append(f"{len(lost)} of {len(expected)} points of {name}, and of the metrics logged with them")
    return lacks


def _artifacts(mlflow: MlflowClient, run_id: str, files: set[str]) -> set[str]:
    folders = {file.rpartition("/")[0] or None for file in files}
    return {file.path for folder in folders for file in mlflow.list_artifacts(run_id, folder)}


def _incomplete_models(mlflow: MlflowClient, run: Run, sent: list[dict[str, Any]]) -> list[str]:
    """List the models that MLflow lacks, that lack a file, or that are not linked to the run."""
    if not sent:
        return []
    where = f"source_run_id = '{run.info.run_id}'"
    models: dict[str, LoggedModel] = {
        model.name: model for model in mlflow.search_logged_models([run.info.experiment_id], where)
    }
    linked = {output.model_id for output in run.outputs.model_outputs} if run.outputs else set()
    return [
        message["name"]
        for message in sent
        if (model := models.get(message["name"])) is None
        or model.status != LoggedModelStatus.READY
        or model.model_id not in linked
        or not (files := {file.path for file in mlflow.list_logged_model_artifacts(model.model_id)})
        or {file.partition("/")[0] for file in message.get("files", [])} - files
    ]
