"""Run a sweep: an MLflow run whose children are the jobs, with the outcome of each.

This module does not depend on Hydra, nor on how jobs are launched.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, cast

from qlora_exp.config.sections.sweep import SweepConfig
from qlora_exp.environment import provenance
from qlora_exp.sweeps import fused, tables
from qlora_exp.sweeps.fused import Group
from qlora_exp.sweeps.jobs import (
    JOB_FILE,
    NOT_FAILED,
    RUNNING,
    UNFINISHED,
    Action,
    Ending,
    Job,
    Launch,
    MoreJobs,
    Place,
    Proposal,
    allow_starts,
    decide,
    exceeded_time_limit,
    finished_elsewhere,
    keep_under_other_name,
    state,
    stopped,
)
from qlora_exp.tracking.journal import ELSEWHERE_TAG, is_delivered, run_id
from qlora_exp.tracking.stores import mlflow_views
from qlora_exp.utils.display import pasteable, say
from qlora_exp.utils.errors import JournalError, SweepError, TrackingError
from qlora_exp.utils.files import remove_if_empty, write_atomically
from qlora_exp.utils.processes.signals import handle_signals
from qlora_exp.utils.secrets import redacted

log = logging.getLogger(__name__)

_ORPHAN_SECONDS = 15.0
"""Seconds to wait for jobs of an earlier sweep that was killed, because they are about to end as well."""
_IDS_IN_A_TAG = 100  # MLflow's tags have a greatest length


class Sweep:
    """Runs the jobs of a sweep that are not done yet. As a context manager, it prints the table of all jobs at the end.

    Raises:
        SweepError: at the end of the context, if a job did not end well.
        TrackingError: MLflow cannot be reached.
    """

    def __init__(
        self,
        folder: Path,
        settings: SweepConfig,
        launch: Launch,
        warm: Callable[[], object] = lambda: None,
        is_part: bool = False,
    ) -> None:
        """Create a sweep.

        Args:
            folder: folder of the sweep.
            settings: `sweep` of the config.
            launch: function that runs jobs.
            warm: called as soon as there may be jobs to launch, to prepare for them.
            is_part: whether another sweep uses the results: they are not shown or compared, and a job may fail.
        """
        self.folder = folder
        self._warm = warm
        self._settings = settings
        self._launch = launch
        self._is_part = is_part
        self._jobs: dict[str, Job] = {}
        self._elsewhere: dict[str, dict[str, Any]] = {}
        self._unfit: dict[str, str] = {}
        self._parent: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._settings.dry_run:
            self._settle(complete=error is None)
        ended_well = error is None and not self._settings.dry_run
        rows = self.rows() if ended_well else []
        if ended_well and not self._is_part:
            tables.show_rows(rows, self.folder)
        if self._parent is not None:
            self._end(error)
        if ended_well and not self._is_part:
            if self.folder.is_dir():  # otherwise every job was done elsewhere
                uri = next(iter(self._jobs.values())).config.tracking.uri
                say(f"files  {self.folder}", f"table  {pasteable('compare', self.folder.name, uri=uri)}")
            if advice := tables.advice([row["outcome"] for row in rows]):
                raise SweepError(advice)
        if isinstance(error, KeyboardInterrupt) and self._jobs:
            done = sum(self.ended(job)["outcome"] in NOT_FAILED for job in self._jobs.values())
            print(f"{done} of {len(self._jobs)} jobs are done; run the same command again to resume the others")

    def _end(self, error: BaseException | None) -> None:
        """Record the end of the sweep in MLflow."""
        try:
            if error is None:
                try:
                    self._record()
                    if not self._is_part:
                        self._compare()
                finally:
                    self._parent.end("FINISHED", "ok")
            elif isinstance(error, Exception):
                self._parent.end("FAILED", "error", f"{type(error).__name__}: {error}")
            else:
                self._parent.end("KILLED", "killed", "the sweep was interrupted")
        finally:
            self._parent.close()

    def register(self, jobs: Sequence[Job]) -> None:
        """Register jobs of earlier processes, so that tables and exit status include them."""
        self._jobs |= {job.key: job for job in jobs}

    def run(
        self,
        jobs: Sequence[Job],
        pruning: Mapping[str, Any] = MappingProxyType({}),
        more: Callable[[], Proposal | None] = lambda: None,
    ) -> None:
        """Run those of `jobs` that are not done yet, and return when all have ended, whatever their outcomes.

        Args:
            jobs: any jobs of the sweep.
            pruning: for a run key, the study file and trial with which the job asks whether to stop early.
            more: called when one has ended and another could begin in its place, if the launcher can begin it.
        """
        waiting, grouped = self._prepared(jobs, pruning := {**pruning})
        apart: list[Proposal] = []  # they cannot join the group that has a free place
        failures: list[Exception] = []

        def added(place: Place | None) -> list[Job]:
            group = next((each for each in grouped.values() if each.place == place), None)
            if apart or failures or (group is None and self._settings.fuse != "off"):
                return []
            try:
                while (proposed := more()) is not None:
                    if group is not None and not all(fused.joins(job.config, group) for job in proposed.jobs):
                        apart.append(proposed)
                        break
                    twins = [job for job in waiting if job.key in {each.key for each in proposed.jobs}]
                    if any(self.ended(job)["outcome"] in UNFINISHED for job in twins):
                        break  # another trial with these values is running
                    pruning.update(proposed.pruning)
                    if new := self._prepared(proposed.jobs, pruning, group)[0]:
                        grouped.update({job.key: group for job in new} if group else {})
                        waiting.extend(new)
                        return new
            except Exception as error:  # raised below, once they have ended
                failures.append(error)
            return []

        with handle_signals():
            self._launch_all(waiting, added)
            beside = {job.key: job for job in waiting if job.key in grouped}.values()
            again = [job for job in beside if self.ended(job)["outcome"] == "oom"]
            if again and not stopped(self.folder):
                log.warning("%d jobs ran out of memory beside others; they run again, alone", len(again))
                for job in again:
                    keep_under_other_name(job.folder)
                    self._prepare(job, None, pruning.get(job.key))
                self._launch_all(again)
        for error in failures:
            raise error
        for proposed in apart:
            self.run(proposed.jobs, proposed.pruning)

    def _prepared(
        self, jobs: Sequence[Job], pruning: Mapping[str, Any], group: Group | None = None
    ) -> tuple[list[Job], dict[str, Group]]:
        """Decide which of `jobs` to run in `group`, or in groups of their own; print that, and write the jobs' files.

        Returns:
            The jobs to run, none in a dry run; and the groups of those that are not alone, by run key.
        """
        jobs = list({job.key: job for job in jobs}.values())  # trials of a search may have the same values
        self.register(jobs)
        plan = {job.key: decide(job, self._settings.rerun) for job in jobs}
        deadline = time.monotonic() + _ORPHAN_SECONDS
        while (already_running := [job for job in jobs if plan[job.key] == RUNNING]) and time.monotonic() < deadline:
            time.sleep(0.2)
            plan |= {job.key: decide(job, self._settings.rerun) for job in already_running}
        if not self._settings.dry_run and any(action != "skip" for action, _ in plan.values()):
            self._warm()
        if (new_jobs := [job for job in jobs if plan[job.key][0] == "run"]) and self._settings.rerun != "all":
            self._elsewhere |= finished_elsewhere(new_jobs)
            plan |= {
                job.key: ("skip", f"done as MLflow run {self._elsewhere[job.key]['run_id']}")
                for job in new_jobs
                if job.key in self._elsewhere
            }
        with handle_signals():
            plan |= self._screen([job for job in jobs if plan[job.key][0] != "skip"])
        waiting = [job for job in jobs if plan[job.key][0] != "skip"]
        if group is None:
            grouped, together = self._groups(waiting)
        else:
            grouped = {job.key: group for job in waiting}
            together = {job.key: f"joins group {group.place.group + 1}" for job in waiting}
        tables.show_plan(jobs, plan, self.folder, together)
        if not waiting or self._settings.dry_run:
            return [], {}
        if self._parent is None:
            self._open(jobs[0])
        for job in waiting:
            if plan[job.key][0] == "rerun":
                keep_under_other_name(job.folder)
            self._prepare(job, grouped.get(job.key), pruning.get(job.key))
        return waiting, grouped

    def _prepare(self, job: Job, group: Group | None, pruning: Any) -> None:
        """Write what the process of a job needs to know."""
        job.folder.mkdir(parents=True, exist_ok=True)
        tags = {"mlflow.parentRunId": str(self._parent.run_id), "mlflow.runName": job.name}
        tags |= {"sweep": self.folder.name, **{f"sweep.{key}": value for key, value in job.swept.items()}}
        tags |= job.tags
        tags |= {"mlflow.source.name": provenance.command()}  # a scheduler starts the job with another one
        minutes = self._settings.timeout_minutes
        known = {
            "tags": redacted(tags),
            "parts": job.parts,
            "fail_fast": self._settings.fail_fast,
            "processes": job.processes,
            "time_limit": minutes and 60 * minutes,
            "pruning": pruning,
            "group": group and asdict(group.place),
        }
        write_atomically(job.folder / JOB_FILE, json.dumps(known))

    def _launch_all(self, waiting: Sequence[Job], more: MoreJobs = lambda place: ()) -> None:
        not_started = self._launch_some(waiting, more) if waiting else []
        # If the launcher failed before it started all jobs, launch the others, as long as that starts at least one.
        while not_started and any(job not in not_started for job in waiting) and not stopped(self.folder):
            waiting, not_started = not_started, self._launch_some(not_started, more)

    def _groups(self, waiting: Sequence[Job]) -> tuple[dict[str, Group], dict[str, str]]:
        """Return by run key the groups of jobs that are not alone; and with which others each is, or why alone."""
        if self._settings.fuse == "off" or not waiting:
            return {}, {}
        found = fused.groups(waiting, self._settings)
        grouped = {job.key: group for group in found for job in group.jobs if len(group.jobs) > 1}
        return grouped, {job.key: fused.described(job, grouped) for job in waiting}

    def _screen(self, waiting: Sequence[Job]) -> dict[str, tuple[Action, str]]:
        """Decide what to do with jobs that would exceed their device's memory, as `sweep.unfit` demands.

        Returns:
            Action and reason for each run key of a job to skip.

        Raises:
            SweepError: there are such jobs, and `sweep.unfit` is `refuse`.
        """
        if self._settings.unfit == "run" or not waiting:
            return {}
        from qlora_exp.planning import screening

        log.info("planning %d job%s", len(waiting), "s" * (len(waiting) > 1))
        found_reasons = screening.unfit([job.config for job in waiting], self._settings.vram)
        reasons = {job.key: reason for job, reason in zip(waiting, found_reasons, strict=True) if reason}
        if reasons and self._settings.unfit == "refuse":
            listed = "\n".join(f"{job.name}: {reasons[job.key]}" for job in waiting if job.key in reasons)
            raise SweepError(f"sweep.unfit=refuse, so nothing was run; these jobs exceed memory:\n{listed}")
        self._unfit |= reasons
        return {key: ("skip", reason) for key, reason in reasons.items()}

    def _open(self, job: Job) -> None:
        """Open the sweep's MLflow run, the parent of its jobs' runs; its journal is in the sweep's folder."""
        from qlora_exp.tracking import lifecycle

        self.folder.mkdir(parents=True, exist_ok=True)
        allow_starts(self.folder)
        settings = job.config.tracking
        tags = {"sweep": self.folder.name, "sweep.keys": ", ".join(job.swept)}
        name = self.folder.name
        try:
            self._parent = lifecycle.open_run(self.folder, settings.uri, settings.experiment_name, name, tags)
        finally:
            remove_if_empty(self.folder)  # MLflow refused the sweep
        self._view()

    def _view(self, scores: Sequence[str] = ()) -> None:
        """Save the view of the sweep's jobs in MLflow, with columns for these scores."""
        swept = list(next(iter(self._jobs.values())).swept)
        self._parent.view(*mlflow_views.newest_sweep(self.folder.name, swept, int(1000 * time.time()), scores))

    def _launch_some(self, waiting: Sequence[Job], more: MoreJobs) -> list[Job]:
        """Launch jobs, record those whose process died, and return the jobs that were not started."""
        from qlora_exp.tracking import lifecycle

        waiting, endings = [*waiting], cast(Sequence[Ending | None] | None, None)

        def added(place: Place | None) -> Sequence[Job]:
            waiting.extend(new := more(place))
            return new

        try:
            endings = self._launch(tuple(waiting), added)
        except Exception as error:  # a launcher may fail when it loses a job; each job's progress is on disk
            log.error("the launcher failed: %s: %s", type(error).__name__, error)  # noqa: TRY400
        finally:  # also if the sweep is interrupted
            for job, ending in zip(waiting, [None] * len(waiting) if endings is None else endings, strict=True):
                if ending is not None or state(job.folder)[0] == "cut off":
                    died = ending or Ending("killed", "its process is gone")
                    if exceeded_time_limit(job.folder):
                        died = Ending("timeout", "the time limit of the job is over")
                    try:
                        tags = json.loads((job.folder / JOB_FILE).read_text("utf-8"))["tags"]
                        lifecycle.record_dead_process(job.config, job.folder, tags, died.outcome, died.failure)
                    except (JournalError, OSError) as error:  # folder deleted or damaged: continue with the others
                        log.error("%s: cannot record how the job ended: %s", job.name, error)  # noqa: TRY400
        return [job for job in waiting if state(job.folder)[0] == "new" and (job.folder / JOB_FILE).is_file()]

    def _settle(self, complete: bool) -> None:
        """Send MLflow what it lacks about the jobs; if `complete`, also about a sweep that was itself killed."""
        from qlora_exp.tracking.sync import settle

        jobs = list(self._jobs.values())
        try:
            if complete and jobs and self._parent is None and not is_delivered(self.folder):
                self._open(jobs[0])
            elif self._parent is not None:  # if the store has lost it, it is sent again before its jobs
                self._parent.settle(again=True)
        except JournalError as error:
            log.warning("cannot open the MLflow run of the sweep: %s", error)
        except TrackingError as error:
            log.warning("%s; run `qlora-exp sync` later to send it", error)
            return
        settled = settle([*[self.folder] * complete, *(job.folder for job in jobs)])
        for folder, lacks in settled.lacks.items():
            log.warning("MLflow lacks a part of %s: %s", folder, "; ".join(lacks))
        for why in settled.unread:
            log.warning("MLflow lacks a part of a run: %s", why)
        for why in settled.away:
            log.warning("%s; run `qlora-exp sync` later", why)

    def ended(self, job: Job) -> dict[str, Any]:
        """Return how a job ended: `outcome`, `metrics`, `seconds`.

        The source is its journal or, for a job that ran elsewhere, MLflow. The outcome `unfit` means that the job would
        exceed its device's memory and was not run.
        """
        if job.key in self._elsewhere:
            return self._elsewhere[job.key]
        if job.key in self._unfit:
            return {"outcome": "unfit", "failure": self._unfit[job.key]}
        job_state, last = state(job.folder)
        return {"outcome": "not started" if job_state == "new" else job_state, **last}

    def rows(self) -> list[dict[str, Any]]:
        """Return the table row of each job."""
        return [tables.row(job, self.ended(job)) for job in self._jobs.values()]

    def _record(self) -> None:
        """Log the outcomes of the jobs to MLflow."""
        rows = self.rows()
        failed = sum(row["outcome"] not in NOT_FAILED for row in rows)
        self._parent.metrics({"jobs": len(rows), "jobs_failed": failed})
        ids = [ended["run_id"] for ended in self._elsewhere.values()]
        parts = enumerate(ids[at : at + _IDS_IN_A_TAG] for at in range(0, len(ids), _IDS_IN_A_TAG))
        self._parent.tags({f"{ELSEWHERE_TAG}{number}": " ".join(part) for number, part in parts})
        measured = {name for job in self._jobs.values() for name in self.ended(job).get("metrics", {})}
        if scores := tables.further_scores(measured):
            self._view(scores)
        columns = dict.fromkeys(name for row in rows for name in row)
        self._parent.table({name: [row.get(name, "") for row in rows] for name in columns}, "jobs.json")

    def _compare(self) -> None:
        """Compare the jobs: write files in the sweep's folder and log them to the sweep's MLflow run."""
        from qlora_exp.results import compare, records, report
        from qlora_exp.tracking.stores.uris import store_uri

        uri = next(iter(self._jobs.values())).config.tracking.uri
        try:
            ids = [self._elsewhere[key]["run_id"] if key in self._elsewhere else run_id(job.folder, store_uri(uri))
                   for key, job in self._jobs.items()]  # fmt: skip
            if not any(ids):
                return  # no job was started
            comparison = compare.compare(records.by_ids(uri, [id_ for id_ in ids if id_ is not None]))
            for file in report.write(comparison, self.folder):
                self._parent.file(str(file.relative_to(self.folder)))
            self._parent.describe(report.markdown(comparison, "short"))
        except Exception as error:  # must not fail the sweep, whose jobs are done; `qlora-exp compare` can repeat it
            log.warning("no comparison: %s", error)
