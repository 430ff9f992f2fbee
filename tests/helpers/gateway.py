"""MLflow behind a gateway that sometimes answers in its place, and MLflow in memory."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from mlflow.entities import (
    Experiment,
    ExperimentTag,
    FileInfo,
    Metric,
    Param,
    Run,
    RunData,
    RunInfo,
    RunInputs,
    RunOutputs,
    RunTag,
)  # fmt: skip
from mlflow.exceptions import MlflowException
from mlflow.protos import service_pb2
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST

ANSWERS = ("empty", "invalid", "gone", "error")
"""What a gateway may answer: 200 and `{}`, 400 INVALID_PARAMETER_VALUE, 404 RESOURCE_DOES_NOT_EXIST, anything else."""
_READS = {
    "get_run": lambda: Run.from_proto(service_pb2.Run()),
    "create_run": lambda: Run.from_proto(service_pb2.Run()),
    "get_experiment": lambda: Experiment.from_proto(service_pb2.Experiment()),
    "get_experiment_by_name": lambda: Experiment.from_proto(service_pb2.Experiment()),
}


class Gateway:
    """A client whose server is asked only while `answer` is "on"."""

    def __init__(self, mlflow: Any, answer: Callable[[str], str] = lambda _: "on") -> None:
        self.answer = answer
        self.requests: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._mlflow = mlflow

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.requests.append((name, args, kwargs))
            match self.answer(name):
                case "on":
                    return getattr(self._mlflow, name)(*args, **kwargs)
                case "empty":
                    return _READS.get(name, lambda: [] if name.startswith(("search", "list", "get")) else None)()
                case "invalid":
                    raise MlflowException("maintenance", INVALID_PARAMETER_VALUE)
                case "gone" if name == "get_experiment_by_name":
                    return None
                case "gone":
                    raise MlflowException("maintenance", RESOURCE_DOES_NOT_EXIST)
            raise MlflowException("connection refused")

        return call


class MemoryMlflow:
    """The part of an MLflow client that a run without models and files uses, on dictionaries."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.experiment_tags: dict[str, str] = {}
        self.has_experiment = False

    def search_experiments(self, **_: Any) -> list[Any]:
        return [self.get_experiment("0")]

    def get_experiment(self, experiment_id: str) -> Experiment:
        tags = [ExperimentTag(*item) for item in self.experiment_tags.items()]
        return Experiment(experiment_id, "e", "file:///nowhere", "active", tags)

    def get_experiment_by_name(self, _: str) -> Experiment | None:
        return self.get_experiment("1") if self.has_experiment else None

    def create_experiment(self, _name: str, artifact_location: str | None) -> str:
        self.has_experiment = True
        return "1"

    def set_experiment_tag(self, _: str, key: str, value: str) -> None:
        self.experiment_tags[key] = value

    def create_run(self, _: str, start_time: int, tags: dict[str, str], run_name: str) -> Run:
        run_id = f"{len(self.runs):032x}"
        points: dict[str, set[Any]] = defaultdict(set)
        self.runs[run_id] = {"tags": dict(tags), "params": {}, "points": points, "status": "RUNNING"}
        return self.get_run(run_id)

    def search_runs(self, _: Any, where: str, *args: Any, **kwargs: Any) -> list[Run]:
        return [self.get_run(key) for key, run in self.runs.items() if run["tags"]["attempt"] in where]

    def get_run(self, run_id: str) -> Run:
        if run_id not in self.runs:
            raise MlflowException("no such run", RESOURCE_DOES_NOT_EXIST)
        run = self.runs[run_id]
        last = [Metric(key, *max(points)[::-1]) for key, points in run["points"].items()]
        data = RunData(
            last, [Param(*item) for item in run["params"].items()], [RunTag(*i) for i in run["tags"].items()]
        )
        info = RunInfo(run_id, "1", "me", run["status"], 1, None, "active", "file:///nowhere", "name")
        return Run(info, data, RunInputs([]), RunOutputs([]))

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status

    def set_terminated(self, run_id: str, status: str, _: int) -> None:
        self.update_run(run_id, status)

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self.runs[run_id]["tags"][key] = value

    def log_batch(self, run_id: str, metrics: list[Metric], params: list[Param], tags: list[RunTag]) -> None:
        if any("@" in entry.key for entry in [*metrics, *params]):
            raise MlflowException("invalid name", INVALID_PARAMETER_VALUE)
        for metric in metrics:
            self.runs[run_id]["points"][metric.key].add((metric.step, metric.timestamp, metric.value))
        self.runs[run_id]["params"] |= {param.key: param.value for param in params}
        self.runs[run_id]["tags"] |= {tag.key: tag.value for tag in tags}

    def get_metric_history(self, run_id: str, key: str) -> list[Metric]:
        points = self.runs[run_id]["points"][key]
        return [Metric(key, value, timestamp, step) for step, timestamp, value in points]

    def list_artifacts(self, _run_id: str, _path: str | None = None) -> list[FileInfo]:
        return []
