"""Define the jobs of a sweep: each has a folder named by its run key, whose journal records its progress.

The journals are the only state of a sweep. How jobs are chosen, composed or launched is decided elsewhere.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from qlora_exp.config.schema import Config
from qlora_exp.data.reading.recognize import recognized_each
from qlora_exp.tracking import run_key
from qlora_exp.tracking.journal import FILE, is_locked, last_message, read
from qlora_exp.training.checkpoints import checkpoints, is_complete, step
from qlora_exp.utils.digests import json_digest
from qlora_exp.utils.errors import ConfigError, JournalError
from qlora_exp.utils.secrets import redacted
from qlora_exp.utils.text import FILE_NAME, RUN_NAME, cut_to_bytes, shortened

log = logging.getLogger(__name__)

JOB_FILE = "job.json"
"""File with what a job needs besides its config: tags, parts of the run key, `fail_fast`, time limit, pruning."""
_STOP_FILE = "stop"
"""File in the sweep's folder: while it exists, no further job starts."""
TIME_LIMIT_FILE = "out_of_time"
"""File in a job's folder: the job has exceeded its time limit."""
_LABEL = 100
"""Most bytes of the swept values in a job's folder name; the run key after them tells jobs apart."""
NOT_FAILED = ("ok", "pruned", "unfit")
"""Outcomes that do not count as failures."""
UNFINISHED = ("killed", "cut off", "not started", "running")
"""Outcomes of jobs that the same command resumes."""

State = Literal["new", "running", "cut off", "damaged", "ok", "pruned", "oom", "nan", "timeout", "error"]
Action = Literal["run", "resume", "rerun", "skip"]
RUNNING: tuple[Action, str] = ("skip", "another process is running it")
"""Decision for a job that is running already, and its reason."""


@dataclass(frozen=True)
class Job:
    """One job of a sweep."""

    swept: Mapping[str, str]
    """Swept keys with the values of this job."""
    overrides: Sequence[str]
    """Hydra overrides from which its config is composed."""
    config: Config
    parts: Mapping[str, str]
    """Parts of the run key (`run_key.digests`), computed when the sweep was planned."""
    key: str
    """Run key."""
    folder: Path
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further tags of its MLflow run."""

    @property
    def processes(self) -> int:
        """Number of processes of the job on one machine; each takes a GPU, if there are any."""
        return processes(self.config)

    @property
    def name(self) -> str:
        """The swept keys and values as text, short enough for a table and for the name of an MLflow run."""
        values = (f"{key}={shortened(value)}" for key, value in self.swept.items())
        return shortened(" ".join(values), RUN_NAME) or self.config.method.name


def processes(config: Config) -> int:
    """Return the number of processes of a job on one machine."""
    shared = config.distributed
    return 1 if isinstance(shared.num_processes, str) else shared.num_processes // shared.num_machines


@dataclass(frozen=True)
class Ending:
    """How a job's process died, for a process that could not record its own end."""

    outcome: str
    """`killed`, `oom`, `timeout` or `error`."""
    failure: str
    """Description of the failure."""


@dataclass(frozen=True)
class Place:
    """Group of a job, as its launcher needs it."""

    group: int
    """Number of the group."""
    rows_together: bool
    """Whether the jobs' rows go through the base in one pass; else they take turns, a step each."""
    at_once: int
    """Number of jobs that train at the same time, at most; as one ends, the next begins."""


@dataclass(frozen=True)
class Proposal:
    """Jobs that a search proposes."""

    jobs: Sequence[Job]
    """Those of one trial or more, one for each seed."""
    pruning: Mapping[str, Any] = field(default_factory=dict)
    """For a run key, the study file and trial with which the job asks whether to stop early."""


MoreJobs = Callable[[Place | None], Sequence[Job]]
"""Function that a launcher may call to fill a free place: of a group that shares a process; or None, any other."""
Launch = Callable[[Sequence[Job], MoreJobs], Sequence[Ending | None]]
"""Function that runs jobs, and those it asks for, and returns once all have ended.

For jobs whose process died it returns an `Ending`; those it has asked for come last, in that order.
"""


def jobs(
    configs: Sequence[Config],
    swept: Sequence[Mapping[str, str]],
    overrides: Sequence[Sequence[str]],
    folder: Path,
    tags: Mapping[str, str] = MappingProxyType({}),
) -> list[Job]:
    """Make the jobs of a sweep.

    Args:
        configs: config of each job.
        swept: swept keys and values of each job.
        overrides: Hydra overrides of each job.
        folder: folder of the sweep.
        tags: further tags of all runs.

    Returns:
        The jobs in order; of jobs with the same run key only the first.

    Raises:
        ConfigError: the number of processes of a job is not set.
        DataError: the format of the rows is to be recognized (`dataset.format=auto`), and cannot be.
    """
    if any(config.distributed.engine != "none" and config.distributed.num_processes == "auto" for config in configs):
        raise ConfigError("distributed.num_processes: jobs of a sweep need a number, not auto")
    jobs_by_key: dict[str, Job] = {}
    for config, values, job_overrides in zip(recognized_each(configs), swept, overrides, strict=True):
        parts = run_key.digests(config)
        key = run_key.combine(parts)
        words = [f"{name.split('.')[-1]}-{value}" for name, value in redacted(dict(values)).items()]
        label = re.sub(r"[^\w.+-]+", "-", "_".join(words))
        name = f"{cut_to_bytes(label, _LABEL)}_{key}".lstrip("_")
        jobs_by_key.setdefault(key, Job(values, job_overrides, config, parts, key, folder / name, tags))
    return list(jobs_by_key.values())


def default_name(swept: Sequence[str], overrides: Sequence[str]) -> str:
    """Return the default name of a sweep: its swept keys and a digest of all overrides that affect the results."""
    keys = [key.split(".")[-1] for key in swept]
    ignored = ("sweep.", "search.", "tuning.", "hydra", "tracking.")
    relevant = [word for word in overrides if not word.lstrip("+~").startswith(ignored)]
    digest = f"_{json_digest(sorted(relevant), digits=6)}"
    return (cut_to_bytes("_".join(keys), FILE_NAME - len(digest)) + digest).lstrip("_")


def state(folder: Path) -> tuple[State, dict[str, Any]]:
    """Return the state of the job in `folder`, and the last message of its journal."""
    under_way = is_locked(folder)
    try:
        last = last_message(folder) or {}
        if under_way:
            return "running", last
        if not last:
            return "new", last
        if last["op"] == "end" and last["outcome"] != "killed":
            return last["outcome"], last
        for _ in read(folder / FILE):  # the job can resume only if every message is readable
            pass
    except JournalError as error:
        return ("running", {}) if under_way else ("damaged", {"failure": str(error)})
    return "cut off", last


def decide(job: Job, rerun: str) -> tuple[Action, str]:
    """Decide what to do with a job.

    Args:
        job: the job.
        rerun: `sweep.rerun` of the config.

    Returns:
        The action and its reason.
    """
    job_state, last = state(job.folder)
    if job_state == "new":
        return "run", _why_new(job)
    if job_state == "running":
        return RUNNING
    if job_state == "cut off":
        saved_steps = [
            step(checkpoint) for checkpoint in checkpoints(job.folder / "checkpoints") if is_complete(checkpoint)
        ]
        from_step = max(saved_steps, default=0)
        resumes = f"resumes from step {from_step}" if from_step else "no checkpoint yet"
        return "resume", f"was interrupted; {resumes}"
    if job_state == "damaged":  # its result cannot be read; its files are kept in a renamed folder
        return "rerun", last["failure"]
    if job_state in NOT_FAILED:
        done = "done" if job_state == "ok" else job_state
        done_in = f"{done} in {last['seconds']:.0f} s" if "seconds" in last else done
        return ("rerun", f"{done} before") if rerun == "all" else ("skip", done_in)
    reason = f"{job_state}: {last.get('failure', '')}"
    return ("rerun", reason) if rerun != "none" else ("skip", f"{reason} (sweep.rerun=failed runs it again)")


def _why_new(job: Job) -> str:
    """Return why the job is new: whether the same values were run before, and what has changed since."""
    label = job.folder.name.removesuffix(job.key)
    now = job.parts
    for folder in job.folder.parent.glob(f"{label}{'[0-9a-f]' * len(job.key)}"):
        try:
            begin = next((message for message, _ in read(folder / FILE)), {})
        except JournalError as error:
            return f"new: the journal of the previous run cannot be read: {error}"
        before = {part: begin.get("tags", {}).get(f"identity.{part}") for part in now}
        if changed := [part for part in now if before[part] not in (None, now[part])]:
            return f"new: not the same {', '.join(changed)} as in the previous run"
    return "new"


def exceeded_time_limit(folder: Path) -> bool:
    """Return whether the job in `folder` has exceeded its time limit."""
    return (folder / TIME_LIMIT_FILE).exists()


def stop(folder: Path) -> None:
    """Prevent further jobs of the sweep in `folder` from starting."""
    (folder / _STOP_FILE).touch()


def allow_starts(folder: Path) -> None:
    """Allow jobs of the sweep in `folder` to start again."""
    (folder / _STOP_FILE).unlink(missing_ok=True)


def stopped(folder: Path) -> bool:
    """Return whether no further job of the sweep in `folder` may start."""
    return (folder / _STOP_FILE).exists()


def finished_elsewhere(new: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """Return finished MLflow runs of these jobs by run key; they may be from another folder or another machine."""
    from qlora_exp.tracking import mlflow_store

    settings = new[0].config.tracking
    return mlflow_store.finished_runs(settings.uri, settings.experiment_name, [job.key for job in new])


def keep_under_other_name(folder: Path) -> None:
    """Rename the folder of an ended run, to keep it."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
