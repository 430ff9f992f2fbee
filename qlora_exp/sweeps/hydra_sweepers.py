"""The sweepers that Hydra finds: grid and Optuna."""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.sweep import SweepConfig
from qlora_exp.config.validate import from_dict
from qlora_exp.libraries.hydra import every_combination
from qlora_exp.sweeps import jobs, sweep
from qlora_exp.sweeps.composer import Composer
from qlora_exp.sweeps.hydra_launchers import LocalLauncher
from qlora_exp.sweeps.launchers import local as launcher
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.quiet import quiet


class _Sweeper(Sweeper):
    """What both sweepers share: from overrides to jobs, and from jobs to the launcher."""

    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher

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
            return from_dict(self.compose(fixed, chosen))
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
        combinations = every_combination(overrides)
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
            from qlora_exp.sweeps import search
        except ImportError as error:
            raise ConfigError("hydra/sweeper=optuna needs its package: pip install 'qlora-exp[optuna]'") from error
        overrides = self.parse(arguments)
        open_ = [one for one in overrides if one.is_sweep_override() and one.key_or_group != "seed"]
        fixed = [one for one in overrides if one not in open_]
        if not open_:
            raise ConfigError("hydra/sweeper=optuna: no key to search, such as method.r=4,8,16 or interval(1e-5,1e-3)")
        repeats = every_combination(fixed)
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
