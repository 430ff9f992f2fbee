"""Log a run to MLflow, and keep its status correct when something fails.

Everything is written to the run's journal on disk before it is sent: nothing is lost while the MLflow store is
unavailable.
"""

import json
import logging
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from qlora_exp.tracking import delivery, read_back
from qlora_exp.tracking.journal import Journal
from qlora_exp.tracking.mlflow_store import client, send
from qlora_exp.tracking.refusals import cause, has_lost
from qlora_exp.tracking.stores.uris import store_uri
from qlora_exp.utils.errors import DeletedError, JournalError, TrackingError
from qlora_exp.utils.files import write_atomically
from qlora_exp.utils.names import valid_names
from qlora_exp.utils.processes.signals import defer_signals
from qlora_exp.utils.secrets import redact, redacted

log = logging.getLogger(__name__)

LOG_FILE = "run.log"
CURVES = ("train/", "eval/")
"""Prefixes of metrics that have a value at many steps."""
_DELIVERY_SECONDS = 1.0
"""Least seconds between two deliveries: each costs the run transactions."""
_RETRY_SECONDS = 30.0
_LONGEST_RETRY_SECONDS = 600.0


class Tracker:
    """One MLflow run. A message is in the journal before it is sent; what the store missed is sent again later."""

    def __init__(self, journal: Journal, uri: str | None, resumed: bool = False) -> None:
        self.output_dir = journal.folder
        self.resumed = resumed
        """Whether an earlier process started this run."""
        self._journal = journal
        self._journal.use(store_uri(uri))
        self._uri = uri
        self._mlflow: MlflowClient | None = None
        self._retry_at = 0.0
        self._patience = _RETRY_SECONDS
        self._delivered_at = 0.0
        self._waits_for = ""
        """Why MLflow did not accept the last message that was sent; empty if it did."""
        self._params: dict[str, str] = {}
        self._logged: dict[tuple[int, str], float] = {}
        self._summary: dict[str, float] = {}
        if resumed:
            for message in journal.messages():
                if message["op"] == "metrics":
                    self._logged |= {(message["step"], key): value for key, value in message["values"].items()}
                    self._summary |= _without_curves(message["values"])
                elif message["op"] == "params":
                    self._params |= message["values"]

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None as long as the store, unavailable at the start, has not answered yet."""
        return self._journal.state.get("run_id")

    def params(self, values: dict[str, Any]) -> None:
        """Log parameters. MLflow cannot change one: a resumed run logs another value as a tag `resumed.KEY`."""
        new = dict(zip(values, redacted([str(value) for value in values.values()]), strict=True))
        changed = {key: value for key, value in new.items() if self._params.setdefault(key, value) != value}
        self._send(op="params", values={key: value for key, value in new.items() if key not in changed})
        if changed:
            self.tags({f"resumed.{key}": value for key, value in changed.items()})

    def tags(self, values: dict[str, Any]) -> None:
        """Set tags of the run."""
        self._send(op="tags", values={key: str(value) for key, value in values.items()})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics of one step; values that are measured once go to step 0, which MLflow draws as bars.

        A resumed run does not log a point of a curve twice, nor a value that it already logged. Names that MLflow does
        not accept are changed by `valid_names`.
        """
        names = valid_names(values)
        values = {names[key]: value for key, value in values.items()}
        new = {
            key: value
            for key, value in values.items()
            if (step, key) not in self._logged or (not key.startswith(CURVES) and self._logged[step, key] != value)
        }
        self._summary |= _without_curves(values)
        if new:
            self._send(op="metrics", step=step, timestamp=now_ms(), values=new)

    def recall(self) -> None:
        """Learn from MLflow which points it has, if the journal has lost lines: they must not be logged twice.

        Raises:
            MlflowException, TrackingError: the store does not answer.
        """
        if not self._journal.state.get("lost") or self.run_id is None:
            return
        mlflow = self.connect()
        for name in mlflow.get_run(self.run_id).data.metrics:
            for point in mlflow.get_metric_history(self.run_id, name):
                self._logged.setdefault((point.step, name), point.value)

    def text(self, text: str, name: str) -> None:
        """Write a text file to the output folder, without secrets, and log it as an artifact."""
        self._write(redact(text), name)

    def _write(self, text: str, name: str) -> None:
        self._journal.check()  # else `mkdir` would create a deleted output folder again
        file = self.output_dir / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
        self.file(name)

    def json(self, value: Any, name: str) -> None:
        """Write a JSON file to the output folder, without secrets, and log it as an artifact."""
        # Before they are written: a secret has other characters in JSON, and may be a number in it.
        plain = json.loads(json.dumps(value, default=str))
        self._write(json.dumps(redacted(plain), indent=1, ensure_ascii=False), name)

    def table(self, columns: dict[str, list[Any]], name: str) -> None:
        """Log a table in the format that the MLflow UI shows as a table."""
        rows = zip(*columns.values(), strict=True)
        self.json({"columns": list(columns), "data": [[str(value) for value in row] for row in rows]}, name)
        self.tags({"mlflow.loggedArtifacts": json.dumps([{"path": name, "type": "table"}])})

    def file(self, name: str) -> None:
        """Log a file of the output folder as an artifact; `name` is its path relative to that folder."""
        self._send(op="file", path=name)

    def dataset(self, name: str, digest: str, source: str, context: str, rows: int) -> None:
        """Log a dataset as an input of the run; `digest` covers all rows (MLflow's own only the first 10,000)."""
        self._send(op="dataset", name=name, digest=digest, source=source, context=context, rows=rows)

    def model(self, folder: str, name: str, params: dict[str, Any], step: int) -> None:
        """Log a trained adapter or model, saved in `folder` of the output folder, as a logged model, for `load`.

        The metrics `after/...` logged so far are attached to it, as measured on the dataset `evaluation`.
        """
        clean = {key: redact(str(value))[:500] for key, value in params.items()}
        path = self.output_dir / folder
        files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        # MLflow allows these characters in names of runs, but not of models.
        name = re.sub(r"[/:.%\"']", "-", name)
        self._send(op="model", folder=folder, name=name, params=clean, step=step, files=files)

    def check(self) -> None:
        """Check that the output folder still belongs to this run.

        Raises:
            JournalError: it was deleted or replaced.
        """
        self._journal.check()

    def describe(self, markdown: str) -> None:
        """Set the description that MLflow shows at the top of the run's page; truncated to its 8000 characters."""
        self.tags({"mlflow.note.content": redact(markdown)[:8000]})

    def view(self, key: str, value: str) -> None:
        """Save a view of the experiment's runs (see `mlflow_views`)."""
        self._send(op="view", key=key, value=value)

    def _send(self, **message: Any) -> None:
        self._journal.append(message)
        if time.monotonic() >= max(self._retry_at, self._delivered_at + _DELIVERY_SECONDS):
            self.deliver()

    def deliver_now(self) -> None:
        """Deliver what waits, before work that takes long."""
        if time.monotonic() >= self._retry_at:
            self.deliver()

    def connect(self) -> MlflowClient:
        """Return a client of the store, connecting at the first call.

        Raises:
            TrackingError: the store does not answer.
        """
        if self._mlflow is None:
            with defer_signals():
                self._mlflow = client(self._uri)
        return self._mlflow

    def deliver(self, strict: bool = False, warn: bool = True) -> bool:
        """Send the messages that MLflow has not received yet, in order.

        Args:
            strict: raise errors of the store instead of keeping the messages for later.
            warn: log the first error.

        Returns:
            Whether MLflow has accepted everything, or refused it for good.

        Raises:
            JournalError: a message cannot be read; those before it are sent.
        """
        try:
            delivery.deliver(self.connect(), self._journal)
        except JournalError:
            raise
        except Exception as error:  # training must continue, whatever the store or its artifact store raises
            if strict and not isinstance(error, DeletedError):  # what was deleted does not stop the run
                raise
            self._waits_for = cause(error)
            if warn and self._retry_at == 0.0:
                log.warning(
                    "MLflow did not accept a message; the run continues and sends it later: %s", self._waits_for
                )
            self._retry_at = time.monotonic() + self._patience
            # Wait longer each time: every try at a store that hangs costs the run the request timeout.
            self._patience = min(2 * self._patience, _LONGEST_RETRY_SECONDS)
            return False
        self._retry_at, self._patience, self._waits_for = 0.0, _RETRY_SECONDS, ""
        self._delivered_at = time.monotonic()
        return True

    def settle(self, again: bool = False) -> list[str]:
        """Deliver everything, read it back from MLflow, and send once more what is missing there.

        Args:
            again: read back also what was read back before.

        Returns:
            What MLflow lacks or waits for, one line each; empty if it has everything.

        Raises:
            JournalError: a message cannot be read; those before it are sent.
        """
        lacks: list[str] = []
        for is_last in (False, True):
            if not self.deliver(warn=False):
                return [self._waits_for]
            state = self._journal.state
            if state.get("verified") == state["offset"] and not again:
                break
            try:
                with defer_signals():
                    lacks = read_back.missing(self.connect(), self._journal)
            except JournalError:
                raise
            except Exception as error:  # as in `deliver`
                if not has_lost(error, self.connect(), self._journal):
                    return [cause(error)]
                log.warning("MLflow has lost this run: all of it is sent again, as a new run")
                self._journal.reset_delivery()
                lacks = ["the run, which MLflow has lost again"]
                continue
            if not lacks:
                self._journal.save_state(verified=state["offset"])
                break
            if not is_last:
                log.info("MLflow lacks %s of %s: all of it is sent again", "; ".join(lacks), self.output_dir)
                self._journal.save_state(offset=0, verified=0, left_out={})
        left_out = self._journal.state.get("left_out", {}).items()
        return [*lacks, *(f"{what}{_times(each['count'])}: {each['why']}" for what, each in left_out)]

    def close(self) -> None:
        """Release the lock on the output folder."""
        self._journal.close()

    def end(self, status: str, outcome: str, failure: str | None = None, **facts: Any) -> None:
        """Set the final status of the run, after everything else was logged.

        Args:
            status: MLflow's status: FINISHED, FAILED or KILLED.
            outcome: ok, pruned, oom, nan, killed, timeout, error.
            failure: one line that says why the run failed.
            facts: further fields of the journal's last message, for listing runs without MLflow.
        """
        why = {} if failure is None else {"failure": redact(failure)}  # it may be sent without the journal
        last = {"status": status, "outcome": outcome, "timestamp": now_ms(), **why, **facts, "metrics": self._summary}
        self._retry_at = 0.0
        try:
            if (self.output_dir / LOG_FILE).is_file():
                self.file(LOG_FILE)
            self.tags({"outcome": outcome, **why})
            self._send(op="end", **last)
        except (OSError, JournalError) as journal_error:  # MLflow must get the outcome even if the disk is full
            if str(journal_error) not in (failure or ""):
                log.error("the journal cannot be written: %s", journal_error)  # noqa: TRY400
            waiting = []
            with suppress(OSError, JournalError):  # the folder may be gone
                waiting = [message for message, _ in self._journal.undelivered()]
            try:
                for message in (*waiting, {"op": "tags", "values": {"outcome": outcome, **why}}, {"op": "end", **last}):
                    send(self.connect(), self._journal, message)
            except (MlflowException, TrackingError) as error:
                log.error("MLflow did not accept the end of the run: %s", cause(error))  # noqa: TRY400
            return
        try:
            problems = [self._waits_for] if self._waits_for else self.settle()  # a moment ago it did not answer
        except (OSError, JournalError) as error:  # must not hide why the run failed
            problems = [str(error)]
        if problems:
            log.error(
                "MLflow did not receive everything of this run: %s. It is in %s, and `qlora-exp sync` sends it again",
                "; ".join(problems),
                self.output_dir,
            )


def _times(count: int) -> str:
    return f" ({count} times)" if count > 1 else ""


def _without_curves(values: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if not key.startswith(CURVES)}


def now_ms() -> int:
    """Return the current time in milliseconds since the epoch, the unit that MLflow uses."""
    return int(time.time() * 1000)
