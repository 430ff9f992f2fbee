"""Jobs on a SLURM cluster, through submitit, each a job of the cluster's.

All nodes must see the sweep's folder and have this package installed. Needs the extra `slurm`. Knows nothing of what a
job does.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cloudpickle
import submitit
from submitit.helpers import DelayedSubmission

from qlora_exp.sweeps.jobs import Ending
from qlora_exp.sweeps.launchers.local import Task
from qlora_exp.utils.errors import last_line

log = logging.getLogger(__name__)
FOLDER = ".submitit"
"""Of submitit's own files, in the sweep's folder."""


def run_all(
    tasks: Sequence[Task],
    cluster: str,
    max_num_timeout: int,
    parameters: Mapping[str, Any],
    died: Callable[[], object] = lambda: None,
) -> list[Ending | None]:
    """Submit every task and wait for all, however long they queue; what happens to one does not touch the others.

    Args:
        tasks: in order.
        cluster: `slurm`, or `local`: processes on this machine.
        max_num_timeout: how often a job that SLURM's own time limit stops is queued again; one that is preempted is.
        parameters: submitit's.
        died: called when a process has died.

    Returns:
        For each task how its process ended, None if it returned.
    """
    where = tasks[0].folder.parent / FOLDER / "%j"
    limits = {"slurm_max_num_timeout": max_num_timeout} if cluster == "slurm" else {}
    executor = submitit.AutoExecutor(folder=where, cluster=cluster, **limits)
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    begun = executor.map_array(_Call(), [task.call for task in tasks])
    for job, task in zip(begun, tasks, strict=True):
        log.info("job %s: %s; its output: %s", job.job_id, task.folder.name, job.paths.stdout)
    try:
        endings = []
        for job in begun:
            endings.append(_ending(job))
            if endings[-1]:
                died()
    except BaseException:  # Ctrl-C, SIGTERM: the jobs are told to end
        for job in begun:
            job.cancel()
        raise
    return endings


class _Call:
    def __call__(self, pickled: bytes) -> None:
        cloudpickle.loads(pickled)()

    def checkpoint(self, pickled: bytes) -> DelayedSubmission:
        """What is queued again for a job that was preempted: it goes on from its own checkpoint."""
        return DelayedSubmission(self, pickled)


def _ending(job: submitit.Job[None]) -> Ending | None:
    error = job.exception()  # waits
    if error is None:
        return None
    state = job.state
    for outcome, named in (("oom", "OUT_OF_MEMORY"), ("timeout", "TIMEOUT")):
        if named in state:
            return Ending(outcome, f"{state} (job {job.job_id})")
    if isinstance(error, submitit.core.utils.FailedJobError):  # it raised something
        return Ending("error", last_line(error))
    return Ending("killed", f"the process died: {state} (job {job.job_id})")
