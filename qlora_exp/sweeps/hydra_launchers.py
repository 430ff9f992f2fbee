"""Implement the launchers for Hydra: local processes, Ray, SLURM."""

import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from qlora_exp.config.schema import Config
from qlora_exp.environment import likely
from qlora_exp.libraries.hydra import singletons
from qlora_exp.sweeps import jobs
from qlora_exp.sweeps.jobs import Ending, Place
from qlora_exp.sweeps.launchers import local, request
from qlora_exp.utils.env_file import load_env_file
from qlora_exp.utils.errors import ConfigError

log = logging.getLogger(__name__)
Stopped = Callable[[], bool]
Died = Callable[[], object]
More = Callable[[Place | None], Sequence[local.Task]]


class JobLauncher(Launcher):
    """Base of the launchers: turns the jobs that Hydra passes into tasks for processes."""

    package, extra = "", ""
    """Package that the launcher needs, and the extra of qlora-exp that installs it."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.more: Callable[[Place | None], Sequence[Sequence[str]]] = lambda place: ()
        """Called, if the launcher can, when there is a place for another job: in a group, or None for any other.

        It returns the overrides of jobs.
        """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what Hydra passes before it calls `launch`."""
        if self.package and find_spec(self.package) is None:
            raise ConfigError(f"this hydra/launcher needs an extra package: pip install 'qlora-exp[{self.extra}]'")
        if not str(config.hydra.sweeper["_target_"]).startswith("hydra_plugins.qlora_exp_plugins."):
            choice = config.hydra.runtime.choices.get("hydra/sweeper")
            raise ConfigError(f"hydra/sweeper={choice}: this launcher needs hydra/sweeper=grid, optuna or tuned")
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run these jobs, as Hydra's interface demands, and those that `more` returns.

        Returns:
            For each job how its process died as the return value; None if it did not die.
        """
        tasks = self._tasks(job_overrides, initial_job_idx)
        count = len(tasks)
        parent_folder = tasks[0].folder.parent
        fail_fast = self.config.sweep.fail_fast

        def more(place: Place | None) -> list[local.Task]:
            nonlocal count
            added = self._tasks(self.more(place), initial_job_idx + count)
            count += len(added)
            return added

        endings = self.run_all(
            tasks,
            stopped=lambda: fail_fast and jobs.stopped(parent_folder),
            died=lambda: jobs.stop(parent_folder) if fail_fast else None,
            more=more,
        )
        return [_job_return(ending) for ending in endings]

    def _tasks(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[local.Task]:
        """Return the task of each job; their numbers begin with `first`."""
        import cloudpickle

        parser, tasks = OverridesParser.create(), []
        for number, overrides in enumerate(job_overrides, first):
            words = [word for word in overrides if word.startswith("hydra.sweep.")]
            sweep_settings = {
                override.key_or_group: str(override.value()) for override in map(parser.parse_override, words)
            }
            parent = sweep_settings.get("hydra.sweep.dir", str(self.config.hydra.sweep.dir))
            folder = Path(parent, sweep_settings.get("hydra.sweep.subdir", str(number)))
            job = _HydraJob(self.hydra_context, self.task_function, self.config, list(overrides), number)
            known = json.loads((folder / jobs.JOB_FILE).read_text("utf-8"))
            place = known["group"] and Place(**known["group"])
            tasks.append(local.Task(cloudpickle.dumps(job), folder, known["processes"], place))
        return tasks

    def try_out(self, configs: Sequence[Config]) -> list[str]:
        """Check, before anything starts, that the launcher can run jobs of these configs.

        Returns:
            What is to be said about that.

        Raises:
            ConfigError: it cannot.
        """
        return []

    @abstractmethod
    def run_all(self, tasks: Sequence[local.Task], stopped: Stopped, died: Died, more: More) -> Sequence[Ending | None]:
        """Run each task in a process of its own.

        Args:
            tasks: the tasks in order.
            stopped: returns true if no further task may start.
            died: called when a process has died.
            more: may be called for further tasks, if there is a place for them.

        Returns:
            For each task how its process died; None if it did not die. Further tasks come last.
        """


class LocalLauncher(JobLauncher):
    """Jobs on this machine."""

    def try_out(self, configs: Sequence[Config]) -> list[str]:
        """Check that this machine can run them."""
        return [remark for config in configs for remark in likely.check(config)]

    def run_all(self, tasks: Sequence[local.Task], stopped: Stopped, died: Died, more: More) -> Sequence[Ending | None]:
        """Run each task in a process of its own, or those of a group in one."""
        return local.run_groups(tasks, self.config.sweep.n_jobs, stopped, died, more)


class RayLauncher(JobLauncher):
    """Jobs on a Ray cluster."""

    package, extra = "ray", "ray"

    def run_all(self, tasks: Sequence[local.Task], stopped: Stopped, died: Died, more: More) -> Sequence[Ending | None]:
        """Run each task in a Ray worker of its own."""
        from qlora_exp.sweeps.launchers import ray

        return ray.run_all(tasks, self.config.sweep.n_jobs, **self.settings, died=died)


class SubmititLauncher(JobLauncher):
    """Jobs on a SLURM cluster."""

    package, extra = "submitit", "slurm"

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Check as well that this machine can submit jobs."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        if (cluster := self.settings["cluster"]) not in ("slurm", "local"):
            raise ConfigError(f"hydra.launcher.cluster={cluster}: choose slurm or local")
        if cluster == "slurm" and not which("srun") and not config.sweep.dry_run:
            raise ConfigError(
                "hydra/launcher=slurm: this machine has no command srun: start the sweep on a node of the cluster, "
                "such as its login node, or try it here with hydra.launcher.cluster=local"
            )

    def try_out(self, configs: Sequence[Config]) -> list[str]:
        """Check that the processes of each job are those that SLURM starts, and that there is a GPU for each."""
        cluster, parameters = self.settings["cluster"], self.settings["parameters"]
        log.info("%s: %s", cluster, request.described(self.settings))
        return [*filter(None, (request.check(config, cluster, parameters) for config in configs))]

    def run_all(self, tasks: Sequence[local.Task], stopped: Stopped, died: Died, more: More) -> Sequence[Ending | None]:
        """Run each task as a job of the cluster."""
        from qlora_exp.sweeps.launchers import slurm

        return slurm.run_all(tasks, **self.settings, died=died)


class _HydraJob:
    """The call made in a job's process: what every Hydra launcher must do there."""

    def __init__(
        self,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
        overrides: list[str],
        number: int,
    ) -> None:
        self.hydra_context, self.task_function = hydra_context, task_function
        self.config, self.overrides, self.number = config, overrides, number
        self.restore_hydra = singletons()

    def __call__(self, *overrides: str) -> None:
        load_env_file()  # on another machine the environment may not be that of the sweep
        self.restore_hydra()
        config = self.hydra_context.config_loader.load_sweep_config(self.config, [*self.overrides, *overrides])
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = self.number
        _ = run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        ).return_value  # reading `return_value` raises the exception of the job


def _job_return(ending: Any) -> JobReturn:
    result = JobReturn(status=JobStatus.COMPLETED)
    result.return_value = ending
    return result
