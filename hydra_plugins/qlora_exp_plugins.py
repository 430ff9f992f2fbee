"""What Hydra finds by itself: the sweeper and the launcher behind `qlora-exp train -m`.

Only the bridge: what a sweep is stands in `qlora_exp/sweep.py`, how jobs are run in `qlora_exp/launcher.py`. Hydra
imports this module for every command, so it must stay light.
"""

import gc
import pickle
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from qlora_exp import config, jobs, launcher, sweep
from qlora_exp.errors import ConfigError
from qlora_exp.quiet import quiet
from qlora_exp.schema import Config, SweepConfig

Stopped = Callable[[], bool]
Died = Callable[[], object]


class _Sweeper(Sweeper):
    """What both sweepers share: from overrides to jobs, and from jobs to the launcher."""

    def __init__(self, params: Mapping[str, str] | None = None) -> None:
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's, before `sweep`."""
        self.hydra_context, self.config = hydra_context, config
        self.compose = Composer(hydra_context.config_loader, config)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def parse(self, arguments: Sequence[str]) -> list[Override]:
        """A named sweep's overrides, and those of the command line after them; what is swept comes last."""
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        overrides = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(words)
        last = {override.key_or_group: override for override in overrides}
        return sorted(last.values(), key=Override.is_sweep_override)

    def folder(self, overrides: Sequence[Override], settings: SweepConfig, kind: str = "") -> Path:
        """The sweep's own."""
        swept = [kind] * bool(kind) + [one.key_or_group for one in overrides if one.is_sweep_override()]
        name = settings.name or jobs.default_name(swept, [str(override.input_line) for override in overrides])
        folder = Path(self.config.hydra.sweep.dir, name).resolve()
        if "\\" in str(folder) or "${" in str(folder):
            raise ConfigError(f"hydra.sweep.dir: Hydra takes no folder with a backslash or ${{ in it: {folder}")
        return folder

    def check(self, fixed: Sequence[str], chosen: Sequence[str]) -> Config:
        """The config of one job: of the overrides that all share, then its own.

        Raises:
            ConfigError: with the overrides that it is of.
        """
        try:
            return config.from_dict(self.compose(fixed, chosen))
        except ConfigError as error:
            raise ConfigError(f"{error}\nin: {' '.join([*fixed, *chosen])}") from error

    def begin(self, folder: Path, settings: SweepConfig) -> sweep.Sweep:
        """The sweep, whose jobs go to the launcher."""
        quiet()
        gc.enable()

        def launch(waiting: Sequence[jobs.Job]) -> list[Any]:
            where = f"hydra.sweep.dir={_quoted(str(folder))}"
            every = [[*job.overrides, where, f"hydra.sweep.subdir={_quoted(job.folder.name)}"] for job in waiting]
            return [done.return_value for done in self.launcher.launch(every, initial_job_idx=0)]

        local = isinstance(self.launcher, LocalLauncher)
        return sweep.Sweep(folder, settings, launch, lambda: local and launcher.warm(settings.n_jobs))


def _quoted(text: str) -> str:
    """As a value of Hydra's override grammar."""
    return "'" + text.replace("'", r"\'") + "'"


class GridSweeper(_Sweeper):
    """Every combination, but only those that are not done yet."""

    def sweep(self, arguments: list[str]) -> None:
        """Hydra's: everything."""
        overrides = self.parse(arguments)
        for one in overrides:
            if one.key_or_group.startswith("search.") or (one.is_sweep_override() and one.is_interval_sweep()):
                raise ConfigError(f"{one.input_line}: that is for a search; add hydra/sweeper=optuna")
        combinations = BasicSweeper.split_arguments(overrides, None)[0]
        shared = sum(not override.is_sweep_override() for override in overrides)
        values = [[word.split("=", 1) for word in combination[shared:]] for combination in combinations]
        swept = [{key.lstrip("+"): value for key, value in one} for one in values]
        configs = [self.check(combination[:shared], combination[shared:]) for combination in combinations]
        settings = configs[0].sweep
        folder = self.folder(overrides, settings)
        with self.begin(folder, settings) as running:
            running.run(jobs.jobs(configs, swept, combinations, folder))


class OptunaSweeper(_Sweeper):
    """What Optuna proposes, in the space that sweeps, ranges and intervals span; seeds are repeats of each trial."""

    def sweep(self, arguments: list[str]) -> None:
        """Hydra's: everything."""
        try:
            from qlora_exp import search
        except ImportError as error:
            raise ConfigError("hydra/sweeper=optuna needs its package: pip install 'qlora-exp[optuna]'") from error
        overrides = self.parse(arguments)
        open_ = [one for one in overrides if one.is_sweep_override() and one.key_or_group != "seed"]
        fixed = [one for one in overrides if one not in open_]
        if not open_:
            raise ConfigError("hydra/sweeper=optuna: no key to search, such as method.r=4,8,16 or interval(1e-5,1e-3)")
        repeats = BasicSweeper.split_arguments(fixed, None)[0]
        space = {one.get_key_element(): search.distribution(one.value()) for one in open_}

        def jobs_of(values: Mapping[str, Any]) -> list[jobs.Job]:
            chosen = [f"{key}={value}" for key, value in values.items()]
            words = [[*repeat, *chosen] for repeat in repeats]
            shown = {key.lstrip("+"): _short(value) for key, value in values.items()}
            swept = [shown | ({"seed": _seed(repeat)} if len(repeats) > 1 else {}) for repeat in repeats]
            return jobs.jobs([self.check(repeat, chosen) for repeat in repeats], swept, words, folder)

        first = self.check(repeats[0], [f"{key}={search.example(one)}" for key, one in space.items()])
        if first.search.prune and len(repeats) > 1:
            raise ConfigError("search.prune judges single jobs: leave one seed, or leave out search.prune")
        folder = self.folder(overrides, first.sweep, "search")
        if first.sweep.dry_run:
            print(f"would search {', '.join(space)} in {folder}: {search.progress(folder, first.search.n_trials)}")
            return
        with self.begin(folder, first.sweep) as running:
            best = search.search(running, space, jobs_of, first.search, first.sweep)
        for trial in best:
            values = zip(first.search.metrics, trial.values, strict=True)
            means = ", ".join(f"{metric} {value:.6g}" for metric, value in values)
            chosen = " ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
            print(f"best: {chosen} ({means}; trial {trial.number + 1})")


def _short(value: Any) -> str:
    return format(value, ".6g") if isinstance(value, float) else str(value)


def _seed(words: Sequence[str]) -> str:
    return next(word.removeprefix("seed=") for word in words if word.startswith("seed="))


class Composer:
    """Composes the jobs of a sweep: what Hydra does for each is done once for what they share.

    Hydra applies `key=value`, in order, to what the chosen options gave, after everything else; so may we (hydra 1.3).
    """

    def __init__(self, loader: Any, master: DictConfig) -> None:
        self._loader, self._master = loader, master
        self._parser = OverridesParser.create()
        self._begun: dict[tuple[str, ...], _Begun] = {}

    def __call__(self, fixed: Sequence[str], chosen: Sequence[str]) -> Any:
        """The config of one job, plain, without the `hydra` node: of overrides that others share, then its own.

        Raises:
            ConfigError: a value is missing, or cannot be worked out.
        """
        own = [self._parser.parse_override(word) for word in chosen]
        values = [one for one in own if self._is_value(one)]
        shared = (*fixed, *(str(one.input_line) for one in own if one not in values))
        if shared not in self._begun:
            self._begun[shared] = _Begun(self._begin(shared))
        return self._begun[shared].with_values(values)

    def _begin(self, words: Sequence[str]) -> DictConfig:
        found = self._loader.load_sweep_config(self._master, list(words))
        rest = OmegaConf.masked_copy(found, [key for key in found if key != "hydra"])
        OmegaConf.set_struct(rest, True)
        return rest

    def _is_value(self, override: Override) -> bool:
        if override.is_delete() or override.is_hydra_override() or override.package:
            return False
        return not self._loader.repository.group_exists(override.key_or_group)


class _Begun:
    """A config that jobs share, to which each adds values of its own."""

    def __init__(self, composed: DictConfig) -> None:
        self._pickled = pickle.dumps(composed)
        self._plain = b""
        """The same as plain dictionaries, which are much faster; if no value is worked out from others, or missing."""
        values = OmegaConf.to_container(composed)
        if "${" not in (text := str(values)) and "???" not in text:
            self._plain = pickle.dumps(values)

    def with_values(self, values: Sequence[Override]) -> Any:
        """Plain."""
        if self._plain:
            found = pickle.loads(self._plain)
            if all(_put(found, one) for one in values):
                return found
        composed = pickle.loads(self._pickled)
        ConfigLoaderImpl._apply_overrides_to_config(values, composed)
        return config.plain(composed)


def _put(found: Any, override: Override) -> bool:
    """Set one value that is there, to another that is no more than a value; whether that is all there is to do."""
    value, *path = override.value(), *override.key_or_group.split(".")
    is_value = isinstance(value, bool | int | float | str) and "$" not in str(value) and value != "???"
    if override.type is not OverrideType.CHANGE or not is_value:
        return False
    for name in path[:-1]:
        found = found.get(name)
        if not isinstance(found, dict):
            return False
    if path[-1] not in found or isinstance(found[path[-1]], dict | list):
        return False
    found[path[-1]] = value
    return True


class _Launcher(Launcher):
    """What our launchers share: what Hydra asks of one, as tasks for processes."""

    package, extra = "", ""
    """What it needs, and the extra of ours that has it."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's, before `launch`."""
        if self.package and find_spec(self.package) is None:
            raise ConfigError(f"this hydra/launcher needs a package: pip install 'qlora-exp[{self.extra}]'")
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Hydra's: run these jobs; a job's return value is how its process died, None if it did not."""
        import cloudpickle

        parser, tasks = OverridesParser.create(), []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            words = [word for word in overrides if word.startswith("hydra.sweep.")]
            where = {one.key_or_group: str(one.value()) for one in map(parser.parse_override, words)}
            parent = where.get("hydra.sweep.dir", str(self.config.hydra.sweep.dir))
            folder = Path(parent, where.get("hydra.sweep.subdir", str(number)))
            job = _HydraJob(self.hydra_context, self.task_function, self.config, list(overrides), number)
            tasks.append(launcher.Task(cloudpickle.dumps(job), folder))
        parent_folder = tasks[0].folder.parent
        fail_fast = self.config.sweep.fail_fast
        endings = self.run_all(
            tasks,
            stopped=lambda: fail_fast and jobs.stopped(parent_folder),
            died=lambda: fail_fast and jobs.stop(parent_folder),
        )
        return [_returned(ending) for ending in endings]

    @abstractmethod
    def run_all(self, tasks: Sequence[launcher.Task], stopped: Stopped, died: Died) -> Sequence[sweep.Ending | None]:
        """Each in a process of its own."""


class LocalLauncher(_Launcher):
    """Jobs on this machine."""

    def run_all(self, tasks: Sequence[launcher.Task], stopped: Stopped, died: Died) -> Sequence[sweep.Ending | None]:
        """Each in a process of its own."""
        return launcher.run_all(tasks, self.config.sweep.n_jobs, stopped, died)


class RayLauncher(_Launcher):
    """Jobs on a Ray cluster."""

    package, extra = "ray", "ray"

    def run_all(self, tasks: Sequence[launcher.Task], stopped: Stopped, died: Died) -> Sequence[sweep.Ending | None]:
        """Each in a worker of its own."""
        from qlora_exp import ray_launcher

        return ray_launcher.run_all(tasks, self.config.sweep.n_jobs, **self.settings, died=died)


class SubmititLauncher(_Launcher):
    """Jobs on a SLURM cluster."""

    package, extra = "submitit", "slurm"

    def run_all(self, tasks: Sequence[launcher.Task], stopped: Stopped, died: Died) -> Sequence[sweep.Ending | None]:
        """Each a job of the cluster's."""
        from qlora_exp import submitit_launcher

        return submitit_launcher.run_all(tasks, **self.settings, died=died)


class _HydraJob:
    """What every launcher of Hydra does in a job's process."""

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
        self.singletons = Singleton.get_state()

    def __call__(self) -> None:
        setup_globals()
        Singleton.set_state(self.singletons)
        config = self.hydra_context.config_loader.load_sweep_config(self.config, self.overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = self.number
        _ = run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        ).return_value  # raises what the job raised


def _returned(value: Any) -> JobReturn:
    done = JobReturn(status=JobStatus.COMPLETED)
    done.return_value = value
    return done
