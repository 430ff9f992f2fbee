"""End runs whose process is gone, and send what they left undelivered."""

import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from filelock import Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from qlora_exp.environment import provenance
from qlora_exp.tracking.journal import FILE, Journal, is_held, last_message, read
from qlora_exp.tracking.tracker import Tracker
from qlora_exp.utils.errors import JournalError, first_line, type_and_first_line
from qlora_exp.utils.secrets import redact

log = logging.getLogger(__name__)


def finish(folder: Path, outcome: str, failure: str, uri: str | None = None) -> bool:
    """Send what the run in `folder` left undelivered; if its process died without a word, end it with `outcome`.

    Returns:
        Whether MLflow has everything now; False too while a living process holds the folder.

    Raises:
        JournalError: a message cannot be read; those before it are sent, and the run is not ended.
    """
    try:
        journal = Journal(folder)
    except Timeout:
        return False
    try:
        begin = next(journal.messages(), None)
        if begin is None:
            return True
        try:
            tracker = Tracker(journal, uri or begin["uri"], resumed=True)
        except JournalError:
            with suppress(JournalError):  # the same
                Tracker(journal, uri or begin["uri"]).deliver()
            raise
        last = last_message(folder)
        if last is not None and last["op"] != "end":
            tracker.end("KILLED" if outcome == "killed" else "FAILED", outcome, failure)
        return tracker.deliver()
    finally:
        journal.close()


def reap(mlflow: MlflowClient, experiment: str, uri: str | None) -> None:
    """Runs whose process on this host is gone without a word (kill -9, power) are KILLED, not RUNNING for ever."""
    found = mlflow.get_experiment_by_name(experiment)
    if found is None:
        return
    recorded = provenance.process()
    for run in mlflow.search_runs([found.experiment_id], "attributes.status = 'RUNNING'"):
        tags, run_id, why = run.data.tags, run.info.run_id, "MLflow did not get all of it"
        folder = Path(tags.get("process.folder", ""))
        try:
            if not provenance.is_dead({key: tags.get(f"process.{key}", "") for key in recorded}):
                continue
            _check_stale(folder, tags.get("attempt"))
            if not finish(folder, "killed", "its process is gone", uri) and is_held(folder):  # it goes on
                continue
        except Exception as error:  # tags and folder are what anybody wrote: they must not stop the run that begins
            why = type_and_first_line(error)
        try:
            if mlflow.get_run(run_id).info.status == "RUNNING":
                log.warning("run %s in %s is gone, and is KILLED as it stands: %s", run_id, folder, redact(why))
                mlflow.set_tag(run_id, "outcome", "killed")
                mlflow.set_terminated(run_id, "KILLED")
        except MlflowException as error:  # it may have been deleted just now
            log.warning("run %s in %s stays RUNNING: %s", run_id, folder, redact(first_line(error)))


def _check_stale(folder: Path, attempt: str | None) -> None:
    """That the journal in `folder` is this user's and the attempt's: the tag is what anybody may have written.

    Raises:
        JournalError: it is not, or cannot be read.
        OSError: it is not there.
    """
    for path in (folder, folder / FILE):
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid():
            raise JournalError(f"{path}: a link, or another user's")
    begin = next((message for message, _ in read(folder / FILE)), None)
    if begin is None or attempt is None or begin["tags"].get("attempt") != attempt:
        raise JournalError(f"{folder}: holds another run")
