"""What a run leaves in MLflow, and how its status stays true when something fails.

Everything is in the run's journal on disk before it reaches MLflow: a store that is away loses nothing.
"""

import json
import logging
import re
import time
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from qlora_exp.tracking.journal import Journal
from qlora_exp.tracking.mlflow_store import client, has_lost, is_refused, store_uri, tell
from qlora_exp.utils.errors import JournalError, TrackingError, first_line
from qlora_exp.utils.secrets import redact
from qlora_exp.utils.signals import held

log = logging.getLogger(__name__)

LOG_FILE = "run.log"
CURVES = ("train/", "eval/")
"""Prefixes of metrics that have a value at many steps."""
PARAM_LIMIT = 6000
_RETRY_SECONDS = 30.0
_LONGEST_RETRY_SECONDS = 600.0


class Tracker:
    """One MLflow run. Every message is in the journal before it is sent; the store gets what it missed later."""

    def __init__(self, journal: Journal, uri: str | None, resumed: bool = False) -> None:
        self.output_dir = journal.folder
        self.resumed = resumed
        """Whether an earlier process began this run."""
        self._journal = journal
        self._journal.use(store_uri(uri))
        self._uri = uri
        self._mlflow: MlflowClient | None = None
        self._retry_at = 0.0
        self._patience = _RETRY_SECONDS
        self._known: dict[tuple[int, str], float] = {}
        self._summary: dict[str, float] = {}
        if resumed:
            for message in journal.messages():
                if message["op"] == "metrics":
                    self._known |= {(message["step"], key): value for key, value in message["values"].items()}
                    self._summary |= _without_curves(message["values"])

    @property
    def run_id(self) -> str | None:
        """MLflow's; None until a store that was away at the start is back."""
        return self._journal.state.get("run_id")

    def params(self, values: dict[str, Any]) -> None:
        """Parameters; a value beyond MLflow's 6000 characters is cut here, and is whole in the artifacts."""
        self._send(op="params", values={key: redact(str(value))[:PARAM_LIMIT] for key, value in values.items()})

    def tags(self, values: dict[str, Any]) -> None:
        """Tags."""
        self._send(op="tags", values={key: redact(str(value)) for key, value in values.items()})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Metrics of one step; what is measured once is of step 0, which MLflow draws as bars.

        A resumed run repeats no point of a curve, and no value that it already told.
        """
        new = {
            key: value
            for key, value in values.items()
            if (step, key) not in self._known or (not key.startswith(CURVES) and self._known[step, key] != value)
        }
        self._summary |= _without_curves(values)
        if new:
            self._send(op="metrics", step=step, timestamp=now_ms(), values=new)

    def text(self, text: str, name: str) -> None:
        """A text artifact, kept in the output folder too."""
        self._journal.check()  # a folder that was deleted is not made again
        file = self.output_dir / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(redact(text), encoding="utf-8")
        self.file(name)

    def json(self, value: Any, name: str) -> None:
        """A JSON artifact, kept in the output folder too."""
        self.text(json.dumps(value, indent=1, ensure_ascii=False, default=str), name)

    def table(self, columns: dict[str, list[Any]], name: str) -> None:
        """A table that the MLflow UI shows as one."""
        rows = zip(*columns.values(), strict=True)
        self.json({"columns": list(columns), "data": [[str(value) for value in row] for row in rows]}, name)
        self.tags({"mlflow.loggedArtifacts": json.dumps([{"path": name, "type": "table"}])})

    def file(self, name: str) -> None:
        """A file of the output folder as an artifact, by its path there."""
        self._send(op="file", path=name)

    def dataset(self, name: str, digest: str, source: str, context: str, rows: int) -> None:
        """A dataset as an input of the run; `digest` is of all rows, where MLflow's own reads the first 10,000."""
        self._send(op="dataset", name=name, digest=digest, source=redact(source), context=context, rows=rows)

    def model(self, folder: str, name: str, params: dict[str, Any], step: int) -> None:
        """A trained adapter or model, in a folder of the output folder, as a logged model: `load` brings it back.

        It gets the metrics that were told before under `after/`, as measured on the dataset `evaluation`.
        """
        clean = {key: redact(str(value))[:500] for key, value in params.items()}
        # MLflow allows these in names of runs, not of models.
        self._send(op="model", folder=folder, name=re.sub(r"[/:.%\"']", "-", name), params=clean, step=step)

    def check(self) -> None:
        """That the output folder is still this run's.

        Raises:
            JournalError: it was deleted or replaced.
        """
        self._journal.check()

    def describe(self, markdown: str) -> None:
        """What MLflow shows above everything else of the run; what is beyond its 8000 characters is cut."""
        self.tags({"mlflow.note.content": markdown[:8000]})

    def view(self, key: str, value: str) -> None:
        """A saved view of the experiment's runs (`views`)."""
        self._send(op="view", key=key, value=value)

    def _send(self, **message: Any) -> None:
        self._journal.append(message)
        if time.monotonic() >= self._retry_at:
            self.deliver()

    def connect(self) -> MlflowClient:
        """The store's client.

        Raises:
            TrackingError: it does not answer.
        """
        if self._mlflow is None:
            with held():
                self._mlflow = client(self._uri)
        return self._mlflow

    def deliver(self, strict: bool = False) -> bool:
        """Send what MLflow has not got yet, in order; whether it has everything now.

        Args:
            strict: raise what the store raises, instead of keeping the messages for later.

        Raises:
            JournalError: a message cannot be read; those before it are sent.
        """
        for message, offset in self._journal.undelivered():
            try:
                with held():
                    tell(self.connect(), self._journal, message)
            except JournalError:
                raise
            except Exception as error:  # whatever the store or its artifact store raises: training must go on
                if has_lost(error, self._mlflow, self.run_id):
                    log.warning("MLflow has lost this run: it is told all of it again")
                    self._journal.forget()
                    return self.deliver(strict)
                if strict and not is_refused(error, message):
                    raise
                if is_refused(error, message):  # for good; what comes after it must not wait
                    log.error("MLflow refuses a message, which is left out: %s", redact(first_line(error)))  # noqa: TRY400
                else:
                    if self._retry_at == 0.0:
                        log.warning(
                            "MLflow does not take a message; the run goes on and keeps it: %s",
                            redact(first_line(error)),
                        )
                    self._retry_at = time.monotonic() + self._patience
                    self._patience = min(2 * self._patience, _LONGEST_RETRY_SECONDS)  # one that hangs takes its time
                    return False
            self._journal.note(offset=offset)
        self._retry_at, self._patience = 0.0, _RETRY_SECONDS
        return True

    def close(self) -> None:
        """Let another process have the folder."""
        self._journal.close()

    def end(self, status: str, outcome: str, failure: str | None = None, **facts: Any) -> None:
        """Give the run its final status (FINISHED, FAILED or KILLED), after everything else was told.

        Args:
            status: MLflow's.
            outcome: ok, pruned, oom, nan, killed, timeout, error.
            failure: one line that says why.
            facts: kept in the journal's last message, for those who list runs without MLflow.
        """
        why = {} if failure is None else {"failure": redact(failure)}
        last = {"status": status, "outcome": outcome, "timestamp": now_ms(), **why, **facts, "metrics": self._summary}
        self._retry_at = 0.0
        try:
            if (self.output_dir / LOG_FILE).is_file():
                self.file(LOG_FILE)
            self.tags({"outcome": outcome, **why})
            self._send(op="end", **last)
        except (OSError, JournalError) as lost:  # how a run ended is told even where the disk takes no more
            if str(lost) not in (failure or ""):
                log.error("the journal cannot be written: %s", lost)  # noqa: TRY400
            try:
                for message in ({"op": "tags", "values": {"outcome": outcome, **why}}, {"op": "end", **last}):
                    tell(self.connect(), self._journal, message)
            except (MlflowException, TrackingError) as error:
                log.error("MLflow does not take how the run ended: %s", redact(first_line(error)))  # noqa: TRY400
        if self._retry_at:
            log.error(
                "MLflow did not take everything of this run; it is kept in %s, and `qlora-exp sync` sends it later",
                self.output_dir,
            )


def _without_curves(values: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if not key.startswith(CURVES)}


def now_ms() -> int:
    """Return the time as MLflow wants it: milliseconds since the epoch."""
    return int(time.time() * 1000)
