"""End runs whose process is gone, and send the messages that they did not deliver to MLflow."""

import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from filelock import Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from qlora_exp.environment import provenance
from qlora_exp.tracking.journal import FILE, Journal, is_locked, last_message, read
from qlora_exp.tracking.stores.known_stores import store_of
from qlora_exp.tracking.stores.uris import store_uri
from qlora_exp.tracking.tracker import Tracker
from qlora_exp.utils.errors import JournalError, first_line, type_and_first_line

log = logging.getLogger(__name__)


def finish(folder: Path, outcome: str, failure: str, uri: str | None = None, again: bool = False) -> list[str]:
    """Send the undelivered messages of the run in `folder`; end it with `outcome` if its process did not end it.

    Args:
        folder: the run's output folder.
        outcome: outcome of a run whose process is gone.
        failure: one line that says why it ended.
        uri: MLflow store to send to; default: the one that the run was started with, if this user has used it before.
        again: read the run back from MLflow even if that was done before.

    Returns:
        What MLflow lacks, one line each; empty if everything was read back. A running process that has locked the
        folder is one such line.

    Raises:
        JournalError: a message cannot be read; those before it are sent, and the run is not ended.
        TrackingError: only the journal names the store, and this user has never sent runs there.
    """
    try:
        journal = Journal(folder)
    except Timeout:
        return ["a running process has locked the folder"]
    try:
        begin = next(journal.messages(), None)
        if begin is None:
            return []
        store = uri or store_of(folder, begin["uri"])
        try:
            tracker = Tracker(journal, store, resumed=True)
        except JournalError:
            with suppress(JournalError):  # the same error, raised below
                Tracker(journal, store).deliver()
            raise
        last = last_message(folder)
        if last is not None and last["op"] != "end":
            tracker.end("KILLED" if outcome == "killed" else "FAILED", outcome, failure)
        if journal.state.get("left_out"):  # files may be back, and this version may send more than the one before
            journal.save_state(offset=0, verified=0, left_out={})
        return tracker.settle(again)
    finally:
        journal.close()


class _ElsewhereError(Exception):
    """A run that may be running on another machine with this machine's name."""


def reap(mlflow: MlflowClient, experiment: str, uri: str | None) -> None:
    """Set runs to KILLED whose process on this host ended without recording it (kill -9, power failure).

    Without this they would stay RUNNING in MLflow for ever. A run of another boot may be one of another machine with
    this machine's name: it is ended only if its journal is here.
    """
    found_experiment = mlflow.get_experiment_by_name(experiment)
    if found_experiment is None:
        return
    process_keys = provenance.process()
    for run in mlflow.search_runs([found_experiment.experiment_id], "attributes.status = 'RUNNING'"):
        tags, run_id, why = run.data.tags, run.info.run_id, "MLflow did not receive all of its messages"
        folder = Path(tags.get("process.folder", ""))
        try:
            process = {key: tags.get(f"process.{key}", "") for key in process_keys}
            if not provenance.is_dead(process):
                log.debug("run %s is running, or on another machine: %s", run_id, process)
                continue
            try:
                _check_stale(folder, tags.get("attempt"))
            except Exception as error:
                if not provenance.is_of_this_boot(process):
                    raise _ElsewhereError(f"its journal is not on this machine: {first_line(error)}") from error
                raise
            problems = finish(folder, "killed", "its process is gone", store_uri(uri))
            if problems and is_locked(folder):  # it still runs, or another process ends it
                log.debug("run %s: %s", run_id, "; ".join(problems))
                continue
            why = "; ".join(problems) or why
        # The next run there, or of its own user, ends it: from here its process may only look gone.
        except (PermissionError, _ElsewhereError) as error:
            log.info("run %s stays RUNNING: %s", run_id, error)
            continue
        # Anybody may have written tags and folder: what is wrong there must not stop the run that starts now.
        except Exception as error:
            why = type_and_first_line(error)
        try:
            if mlflow.get_run(run_id).info.status == "RUNNING":
                log.warning(
                    "the process of run %s in %s is gone; the run is set to KILLED, with what MLflow has of it: %s",
                    run_id,
                    folder,
                    why,
                )
                mlflow.set_tag(run_id, "outcome", "killed")
                mlflow.set_terminated(run_id, "KILLED")
        except MlflowException as error:  # for example, somebody deleted the run just now
            log.warning("run %s in %s stays RUNNING in MLflow: %s", run_id, folder, first_line(error))


def _check_stale(folder: Path, attempt: str | None) -> None:
    """Check that the journal in `folder` belongs to this user and to the run with the tag `attempt`.

    The folder comes from a tag in MLflow, which anybody may have written.

    Raises:
        JournalError: it does not, or it cannot be read.
        PermissionError: it belongs to another user, or cannot be read.
        OSError: it does not exist.
    """
    for path in (folder, folder / FILE):
        status = path.lstat()
        if status.st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to another user")
        if stat.S_ISLNK(status.st_mode):
            raise JournalError(f"{path} is a link")
    begin = next((message for message, _ in read(folder / FILE)), None)
    if begin is None or attempt is None or begin["tags"].get("attempt") != attempt:
        raise JournalError(f"{folder}: contains another run")
