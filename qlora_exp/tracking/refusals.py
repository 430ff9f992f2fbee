"""Find out why an MLflow store does not accept something: a state that will change, or content that it never accepts.

Content counts as refused for good only if the store accepts another write to the same run right before it refuses the
content again. Everything else is a state: a server under maintenance may answer anything, and what was deleted in
MLflow can be restored. Messages are kept while a state lasts.
"""

from collections.abc import Sequence
from itertools import chain

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from qlora_exp.tracking.journal import Journal
from qlora_exp.utils.errors import DeletedError, TrackingError, UserError, first_line
from qlora_exp.utils.secrets import redact

Entry = Metric | Param | RunTag
LeftOut = tuple[str, str]
"""What was left out for good, such as `metric after/x`, and why."""

_CONTENT_ERRORS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_NOT_THERE = "RESOURCE_DOES_NOT_EXIST"
_KINDS = {Metric: "metric", Param: "param", RunTag: "tag"}


def cause(error: BaseException) -> str:
    """Return the line of an error that says what went wrong, without secrets; messages of this package as they are."""
    return redact(str(error) if isinstance(error, UserError) else first_line(error))


_HINTS = {
    "CERTIFICATE_VERIFY_FAILED": "MLFLOW_TRACKING_SERVER_CERT_PATH=FILE names a certificate to trust",
    "MLFLOW_ALLOW_FILE_STORE": "MLFLOW_ALLOW_FILE_STORE=true allows a store of files; a database is better: "
    "tracking.uri=sqlite:///FILE",
    "error code 401": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the "
    "environment or in .env",
    "error code 403": "ask who manages the experiment or model there for the right to do this, or choose another name",
}
"""What to do about errors that MLflow explains at length or not at all, by a part of their text."""


def hint(error: BaseException) -> str:
    """Return what to do about an error, to be written after its cause; empty if nothing is known."""
    return next((f"; {advice}" for part, advice in _HINTS.items() if part in str(error)), "")


def no_content(uri: str) -> TrackingError:
    """Make the error about a server that answers without content, as gateways do while a server is away."""
    return TrackingError(
        f"MLflow at {redact(uri)} answers without content: it is under maintenance, or another program answers there"
    )


def read_run(mlflow: MlflowClient, journal: Journal) -> Run:
    """Read the run of a journal from MLflow.

    Raises:
        DeletedError: it was deleted in MLflow, or its experiment was.
        TrackingError: the answer has no content.
    """
    run_id = journal.state["run_id"]
    run = mlflow.get_run(run_id)
    if run.info.run_id != run_id:
        raise no_content(journal.uri)
    if run.info.lifecycle_stage != LifecycleStage.ACTIVE:
        experiment = mlflow.get_experiment(run.info.experiment_id)
        what, command = f"run {run_id}", f"runs restore --run-id {run_id}"
        if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
            what = f"experiment '{experiment.name}'"
            command = f"experiments restore --experiment-id {experiment.experiment_id}"
        begin = next(journal.messages(), {"uri": ""})
        elsewhere = "" if begin["uri"] == journal.uri else f" --uri {journal.uri}"
        raise DeletedError(
            f"{what} was deleted in MLflow: restore it there (MLFLOW_TRACKING_URI={redact(journal.uri)} mlflow "
            f"{command}), then `qlora-exp sync {journal.folder}{redact(elsewhere)}` sends the rest"
        )
    return run


def is_refused(error: Exception, mlflow: MlflowClient, journal: Journal) -> bool:
    """Check whether a store raised `error` because of the content that was sent, while it accepts other content.

    Raises:
        DeletedError: the run was deleted in MLflow.
        Exception: the store does not accept other content either.
    """
    if getattr(error, "error_code", None) not in _CONTENT_ERRORS:
        return False
    run = read_run(mlflow, journal)
    mlflow.set_tag(run.info.run_id, "attempt", run.data.tags.get("attempt", ""))  # changes nothing
    return True


def has_lost(error: Exception, mlflow: MlflowClient, journal: Journal) -> bool:
    """Check whether a store raised `error` because it no longer has the run, while it answers other questions."""
    run_id = journal.state.get("run_id")
    if run_id is None or getattr(error, "error_code", None) != _NOT_THERE:
        return False
    try:
        mlflow.get_run(run_id)
    except MlflowException as run_error:
        return bool(run_error.error_code == _NOT_THERE) and _has_experiments(mlflow)
    return False


def _has_experiments(mlflow: MlflowClient) -> bool:
    """Check whether a store answers as MLflow does, which has at least one experiment."""
    try:
        return bool(mlflow.search_experiments(view_type=ViewType.ALL, max_results=1))
    except MlflowException:
        return False


def log_entries(mlflow: MlflowClient, journal: Journal, entries: Sequence[Entry]) -> list[LeftOut]:
    """Log metrics, params and tags, in one request if MLflow accepts all; return those that it refuses for good.

    Raises:
        Exception: the store does not accept them now; it may have accepted some.
    """
    known: dict[str, dict[str, str]] = journal.state.get("left_out", {})
    names: dict[str, list[Entry]] = {}
    for entry in entries:
        names.setdefault(f"{_KINDS[type(entry)]} {entry.key}", []).append(entry)
    refused = {name: names.pop(name) for name in list(names) if name in known}
    left_out = [(name, known[name]["why"]) for name, same_name in refused.items() for _ in same_name]
    return left_out + _log(mlflow, journal, names)


def _log(mlflow: MlflowClient, journal: Journal, names: dict[str, list[Entry]]) -> list[LeftOut]:
    """Log entries by name; if the store refuses them, log each half alone, to find the name that it refuses."""
    try:
        _log_batch(mlflow, journal, names)
    except MlflowException as error:
        if not is_refused(error, mlflow, journal):
            raise
        if len(names) > 1:
            items, half = list(names.items()), len(names) // 2
            return _log(mlflow, journal, dict(items[:half])) + _log(mlflow, journal, dict(items[half:]))
        try:
            _log_batch(mlflow, journal, names)
        except MlflowException as second_error:
            if not is_refused(second_error, mlflow, journal):
                raise
            return [(name, cause(second_error)) for name, same_name in names.items() for _ in same_name]
    return []


def _log_batch(mlflow: MlflowClient, journal: Journal, names: dict[str, list[Entry]]) -> None:
    entries = list(chain.from_iterable(names.values()))
    mlflow.log_batch(
        journal.state["run_id"],
        [entry for entry in entries if isinstance(entry, Metric)],
        [entry for entry in entries if isinstance(entry, Param)],
        [entry for entry in entries if isinstance(entry, RunTag)],
    )
