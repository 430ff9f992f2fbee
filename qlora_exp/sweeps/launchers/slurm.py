"""Run jobs on a SLURM cluster through submitit, each as a job of the cluster.

All nodes must see the sweep's folder and have this package installed. Needs the extra `slurm`. This module is
independent of what a job does.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import submitit
from submitit.helpers import DelayedSubmission

from qlora_exp.sweeps.jobs import Ending
from qlora_exp.sweeps.launchers.local import Task
from qlora_exp.utils.errors import last_line
from qlora_exp.utils.processes import signals

log = logging.getLogger(__name__)
FOLDER = ".submitit"
"""Folder of submitit's own files, inside the sweep's folder."""


def run_all(
    tasks: Sequence[Task],
    cluster: str,
    max_num_timeout: int,
    parameters: Mapping[str, Any],
    died: Callable[[], object] = lambda: None,
) -> list[Ending | None]:
    """Submit every task and wait for all, however long they queue; a failed task does not affect the others.

    Args:
        tasks: tasks in order.
        cluster: `slurm`, or `local` for processes on this machine.
        max_num_timeout: how often a job stopped by SLURM's own time limit is queued again. A preempted job is always
            queued again.
        parameters: parameters of submitit.
        died: called when a process has died.

    Returns:
        For each task how its process died; None if it returned.

    """
    log_folder = tasks[0].folder.parent / FOLDER / "%j"
    limits = {"slurm_max_num_timeout": max_num_timeout} if cluster == "slurm" else {}
    executor = submitit.AutoExecutor(folder=log_folder, cluster=cluster, **limits)
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    # On this machine, submitit's processes beside the jobs print a traceback each when the sweep is interrupted.
    with _errors_in(tasks[0].folder.parent / FOLDER / "submitit.log") if cluster == "local" else nullcontext():
        submitted = executor.map_array(_Call(), [task.call for task in tasks])
    for job, task in zip(submitted, tasks, strict=True):
        log.info("job %s: %s; output: %s", job.job_id, task.folder.name, job.paths.stdout)
    try:
        endings = []
        for job in submitted:
            endings.append(_ending(job))
            if endings[-1]:
                died()
    except BaseException:  # on Ctrl-C or SIGTERM, cancel the jobs
        for job in submitted:
            job.cancel()
        raise
    return endings


@contextmanager
def _errors_in(file: Path) -> Iterator[None]:
    """Let processes that are started inside write their errors to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    own = os.dup(2)
    try:
        with file.open("ab") as log_file:
            os.dup2(log_file.fileno(), 2)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


class _Call:
    def __call__(self, pickled: bytes) -> None:
        _save_at_time_limit()
        cloudpickle.loads(pickled)()

    def checkpoint(self, pickled: bytes) -> DelayedSubmission:
        """Return what submitit queues again for a preempted job; the job resumes from its own checkpoint."""
        return DelayedSubmission(self, pickled)


def _save_at_time_limit() -> None:
    """At the cluster's time limit, end the job once it has saved a checkpoint, and let submitit queue it again.

    Submitit's own handler ends the job at once, or, if it may not be queued again, raises an error in it, which would
    count as one of its own. Here it is interrupted instead: the same command resumes it.
    """
    number = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}")
    told, own = signal.getsignal(number), os.getpid()

    def handle(received: int, frame: Any) -> None:
        if os.getpid() != own:  # SLURM tells all processes of the job, forked ones too
            return
        signal.signal(number, signal.SIG_IGN)  # it may come twice, and submitit's handler is not made for that
        log.warning("the cluster ends this job; a checkpoint is saved first if it trains")
        signals.end(partial(finish, received, frame))
        if not signals.is_ending():
            signal.signal(number, handle)

    def finish(received: int, frame: Any) -> None:
        assert callable(told)
        try:
            told(received, frame)
        except submitit.core.utils.UncompletedJobError as error:
            log.warning("%s; the same command resumes it", error)
            signals.interrupt()

    if callable(told):
        signal.signal(number, handle)


def _ending(job: submitit.Job[None]) -> Ending | None:
    error = job.exception()  # waits for the job to end
    if error is None:
        return None
    state = job.state
    if "OUT_OF_MEMORY" in state:
        return Ending("oom", f"{state} (job {job.job_id})")
    if "TIMEOUT" in state:  # not the limit of a job, which is `sweep.timeout_minutes`
        return Ending("killed", f"the cluster's time limit is over: {state} (job {job.job_id})")
    if isinstance(error, submitit.core.utils.FailedJobError):  # the job raised an exception
        return Ending("error", last_line(error))
    return Ending("killed", f"the process died: {state} (job {job.job_id})")
