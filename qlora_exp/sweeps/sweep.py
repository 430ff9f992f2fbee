"""A sweep under way: an MLflow run whose children are the jobs, and what became of each.

Knows nothing of Hydra, nor of how jobs are launched.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from qlora_exp.config.sections.sweep import SweepConfig
from qlora_exp.sweeps.jobs import (
    GOOD,
    JOB_FILE,
    RUNNING,
    Action,
    Ending,
    Job,
    Launch,
    decide,
    let_start,
    state,
    stopped,
    was_late,
)
from qlora_exp.sweeps.tables import row, show_plan, show_rows
from qlora_exp.tracking import mlflow_views
from qlora_exp.tracking.journal import is_held, is_settled, run_id
from qlora_exp.utils.errors import JournalError, SweepError, TrackingError
from qlora_exp.utils.files import write_atomically
from qlora_exp.utils.signals import heeded

log = logging.getLogger(__name__)

_ORPHAN_SECONDS = 15.0
"""How long to wait for jobs of an earlier sweep that was killed: they are ending too."""


class Sweep:
    """Runs jobs that are not done yet; as a context it ends with the table of all jobs.

    Raises:
        SweepError: at the end, if not every job ended well.
        TrackingError: MLflow cannot be reached.
    """

    def __init__(
        self,
        folder: Path,
        settings: SweepConfig,
        launch: Launch,
        warm: Callable[[], object] = lambda: None,
    ) -> None:
        """What runs jobs.

        Args:
            folder: of the sweep.
            settings: `sweep` of the config.
            launch: how.
            warm: called as soon as there may be jobs to launch.
        """
        self.folder = folder
        self._warm = warm
        self._settings = settings
        self._launch = launch
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
        if ended_well:
            show_rows(rows, self.folder)
        if self._parent is not None:
            self._end(error)
        if ended_well:
            if self.folder.is_dir():  # else all was done elsewhere
                print(f"files  {self.folder}\ntable  qlora-exp compare {self.folder.name}")
            if advice := _advice([row["outcome"] for row in rows]):
                raise SweepError(advice)
        if isinstance(error, KeyboardInterrupt) and self._jobs:
            done = sum(self.ended(job)["outcome"] in GOOD for job in self._jobs.values())
            print(f"{done} of {len(self._jobs)} jobs are done; the same command goes on with the others")

    def _end(self, error: BaseException | None) -> None:
        """What MLflow is told at the end of the sweep."""
        try:
            if error is None:
                try:
                    self._record()
                    self._compare()
                finally:
                    self._parent.end("FINISHED", "ok")
            elif isinstance(error, Exception):
                self._parent.end("FAILED", "error", f"{type(error).__name__}: {error}")
            else:
                self._parent.end("KILLED", "killed", "the sweep was interrupted")
        finally:
            self._parent.close()

    def know(self, jobs: Sequence[Job]) -> None:
        """That these are the sweep's too: its tables and its verdict are of them all."""
        self._jobs |= {job.key: job for job in jobs}

    def run(self, jobs: Sequence[Job], pruning: Mapping[str, Any] | None = None) -> None:
        """Run those of `jobs` that are left to do; returns when they have ended, however.

        Args:
            jobs: any of the sweep's.
            pruning: for a job's key how it asks whether to go on (`search.judge`).
        """
        self.know(jobs)
        plan = {job.key: decide(job, self._settings.rerun) for job in jobs}
        deadline = time.monotonic() + _ORPHAN_SECONDS
        while (held := [job for job in jobs if plan[job.key] == RUNNING]) and time.monotonic() < deadline:
            time.sleep(0.2)
            plan |= {job.key: decide(job, self._settings.rerun) for job in held}
        if not self._settings.dry_run and any(action != "skip" for action, _ in plan.values()):
            self._warm()
        if (new := [job for job in jobs if plan[job.key][0] == "run"]) and self._settings.rerun != "all":
            self._elsewhere |= _finished(new)
            plan |= {
                job.key: ("skip", f"done as MLflow run {self._elsewhere[job.key]['run_id']}")
                for job in new
                if job.key in self._elsewhere
            }
        with heeded():
            plan |= self._screen([job for job in jobs if plan[job.key][0] != "skip"])
        waiting = [job for job in jobs if plan[job.key][0] != "skip"]
        show_plan(jobs, plan, self.folder)
        if not waiting or self._settings.dry_run:
            return
        if self._parent is None:
            self._open(jobs[0])
        for job in waiting:
            if plan[job.key][0] == "rerun":
                _put_aside(job.folder)
            job.folder.mkdir(parents=True, exist_ok=True)
            tags = {"mlflow.parentRunId": str(self._parent.run_id), "mlflow.runName": job.name}
            tags |= {"sweep": self.folder.name, **{f"sweep.{key}": value for key, value in job.swept.items()}}
            minutes = self._settings.timeout_minutes
            told = {"tags": tags, "parts": job.parts, "fail_fast": self._settings.fail_fast}
            told |= {"time_limit": minutes and 60 * minutes, "pruning": (pruning or {}).get(job.key)}
            write_atomically(job.folder / JOB_FILE, json.dumps(told))
        with heeded():
            left = self._launch_some(waiting)
            while left and len(left) < len(waiting) and not stopped(self.folder):  # a launcher that gave up
                waiting, left = left, self._launch_some(left)

    def _screen(self, waiting: Sequence[Job]) -> dict[str, tuple[Action, str]]:
        """What becomes of those that would not fit their device, if that is asked for.

        Raises:
            SweepError: they are refused.
        """
        if self._settings.unfit == "run" or not waiting:
            return {}
        from qlora_exp.planning import screening

        log.info("planning %d jobs", len(waiting))
        why = screening.unfit([job.config for job in waiting], self._settings.vram)
        found = {job.key: said for job, said in zip(waiting, why, strict=True) if said}
        if found and self._settings.unfit == "refuse":
            told = "\n".join(f"{job.name}: {found[job.key]}" for job in waiting if job.key in found)
            raise SweepError(f"sweep.unfit=refuse, and so nothing was run:\n{told}")
        self._unfit |= found
        return {key: ("skip", said) for key, said in found.items()}

    def _open(self, job: Job) -> None:
        """The MLflow run that the jobs are children of; a sweep's own folder has its journal."""
        from qlora_exp.tracking import lifecycle

        self.folder.mkdir(parents=True, exist_ok=True)
        let_start(self.folder)
        settings = job.config.tracking
        tags = {"sweep": self.folder.name, "sweep.keys": ", ".join(job.swept)}
        name = self.folder.name
        self._parent = lifecycle.open_run(self.folder, settings.uri, settings.experiment_name, name, tags)
        self._parent.view(*mlflow_views.newest_sweep(name, list(job.swept), int(1000 * time.time())))

    def _launch_some(self, waiting: Sequence[Job]) -> list[Job]:
        """Launch jobs and record those that died; the jobs that were not even started."""
        from qlora_exp.tracking import lifecycle

        endings: Sequence[Ending | None] = [None] * len(waiting)
        try:
            endings = self._launch(waiting)
        except Exception as error:  # a launcher that lost a job may give up the others; what each did is on disk
            log.error("the launcher gave up: %s: %s", type(error).__name__, error)  # noqa: TRY400
        finally:  # also of a sweep that is interrupted
            for job, ending in zip(waiting, endings, strict=True):
                if ending is not None or state(job.folder)[0] == "cut off":
                    died = ending or Ending("killed", "its process is gone")
                    if was_late(job.folder):
                        died = Ending("timeout", "the time limit of the job is over")
                    try:
                        tags = json.loads((job.folder / JOB_FILE).read_text("utf-8"))["tags"]
                        lifecycle.record_death(job.config, job.folder, tags, died.outcome, died.failure)
                    except (JournalError, OSError) as error:  # its folder was deleted or damaged: the others go on
                        log.error("%s: how it ended cannot be recorded: %s", job.name, error)  # noqa: TRY400
        return [job for job in waiting if state(job.folder)[0] == "new" and (job.folder / JOB_FILE).is_file()]

    def _settle(self, complete: bool) -> None:
        """Tell MLflow what it missed of the jobs, and if they are `complete` also of a sweep that was killed itself."""
        jobs = list(self._jobs.values())
        try:
            if complete and jobs and self._parent is None and not is_settled(self.folder):
                self._open(jobs[0])
        except JournalError as error:
            log.warning("the sweep's own run: %s", error)
        except TrackingError as error:
            log.warning("%s; `qlora-exp sync` tells it later", error)
            return
        for job in jobs:
            try:
                if not is_settled(job.folder) and not is_held(job.folder):
                    from qlora_exp.tracking import recovery

                    recovery.finish(job.folder, "killed", "its process is gone")
            except (JournalError, OSError) as error:  # the others are told
                log.warning("%s: MLflow does not get all of it: %s", job.name, error)

    def ended(self, job: Job) -> dict[str, Any]:
        """How a job ended, by its journal or, if it ran elsewhere, by MLflow: `outcome`, `metrics`, `seconds`.

        One that did not fit has not run.
        """
        if job.key in self._elsewhere:
            return self._elsewhere[job.key]
        if job.key in self._unfit:
            return {"outcome": "unfit", "failure": self._unfit[job.key]}
        found, last = state(job.folder)
        return {"outcome": "not started" if found == "new" else found, **last}

    def rows(self) -> list[dict[str, Any]]:
        """What became of each job."""
        return [row(job, self.ended(job)) for job in self._jobs.values()]

    def _record(self) -> None:
        """What became of the jobs, for MLflow."""
        rows = self.rows()
        failed = sum(row["outcome"] not in GOOD for row in rows)
        self._parent.metrics({"jobs": len(rows), "jobs_failed": failed})
        columns = dict.fromkeys(name for row in rows for name in row)
        self._parent.table({name: [row.get(name, "") for row in rows] for name in columns}, "jobs.json")

    def _compare(self) -> None:
        """The jobs compared, as files in the sweep's folder and with its run in MLflow."""
        from qlora_exp.results import compare, records, report
        from qlora_exp.tracking.mlflow_store import store_uri

        uri = next(iter(self._jobs.values())).config.tracking.uri
        try:
            ids = [self._elsewhere[key]["run_id"] if key in self._elsewhere else run_id(job.folder, store_uri(uri))
                   for key, job in self._jobs.items()]  # fmt: skip
            found = compare.compare(records.by_ids(uri, [one for one in ids if one is not None]))
            for file in report.write(found, self.folder):
                self._parent.file(file.name)
            self._parent.describe(report.markdown(found, "short"))
        except Exception as error:  # the jobs are done, whatever this comes to; `qlora-exp compare` can be asked again
            log.warning("no comparison: %s", error)


def _advice(outcomes: Sequence[str]) -> str:
    """What to do about jobs that did not end well; empty if all did."""
    later = sum(one in ("killed", "cut off", "not started", "running") for one in outcomes)
    failed = len(outcomes) - later - sum(one in GOOD for one in outcomes)
    parts = [f"{failed} failed: sweep.rerun=failed runs them again"] * bool(failed)
    parts += [f"{later} did not come to an end: the same command goes on with them"] * bool(later)
    return f"{failed + later} of {len(outcomes)} jobs did not end well; {'; '.join(parts)}" if parts else ""


def _finished(new: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """MLflow's finished runs of these jobs, by key: they may have run in another folder or on another machine."""
    from qlora_exp.tracking import mlflow_store

    settings = new[0].config.tracking
    return mlflow_store.finished_runs(settings.uri, settings.experiment_name, [job.key for job in new])


def _put_aside(folder: Path) -> None:
    """Keep an ended attempt under another name."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
