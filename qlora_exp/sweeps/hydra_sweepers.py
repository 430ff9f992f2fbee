"""Implement the sweepers for Hydra: grid and Optuna."""

import gc
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from qlora_exp.config import idle
from qlora_exp.config.schema import Config
from qlora_exp.config.sections.sweep import SweepConfig
from qlora_exp.config.validate import from_dict
from qlora_exp.libraries.hydra import every_combination
from qlora_exp.sweeps import jobs, sweep
from qlora_exp.sweeps.composer import Composer
from qlora_exp.sweeps.hydra_launchers import LocalLauncher
from qlora_exp.sweeps.launchers import local as launcher
from qlora_exp.utils.display import say
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.secrets import redact


class _Sweeper(Sweeper):
    """Base of both sweepers: turns overrides into jobs, and passes jobs to the launcher."""

    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher

    def __init__(self, params: Mapping[str, str] | None = None) -> None:
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what Hydra passes before it calls `sweep`, and create the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.compose = Composer(hydra_context.config_loader, config)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def parse(self, arguments: Sequence[str]) -> list[Override]:
        """Parse the overrides of a named sweep, then those of the command line, which win.

        Returns:
            The last override of each key; swept keys come last.
        """
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        overrides = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(words)
        last = {override.key_or_group: override for override in overrides}
        return sorted(last.values(), key=Override.is_sweep_override)

    def folder(self, overrides: Sequence[Override], settings: SweepConfig, kind: str = "") -> Path:
        """Return the folder of the sweep.

        Args:
            overrides: all overrides of the sweep.
            settings: `sweep` of the config.
            kind: first word of the default name.

        Raises:
            ConfigError: Hydra cannot use such a folder.
        """
        swept = [kind] * bool(kind) + [override.key_or_group for override in overrides if override.is_sweep_override()]
        name = settings.name or jobs.default_name(swept, [str(override.input_line) for override in overrides])
        if redact(name) != name:
            raise ConfigError("sweep.name: contains a secret, and would be the name of a folder; change the name")
        folder = Path(self.config.hydra.sweep.dir, name).resolve()
        if "\\" in str(folder) or "${" in str(folder):
            raise ConfigError(
                f"hydra.sweep.dir: Hydra does not accept a folder with a backslash or ${{ in its path: {folder}"
            )
        return folder

    def check(self, fixed: Sequence[str], chosen: Sequence[str]) -> Config:
        """Compose and validate the config of one job.

        Args:
            fixed: overrides that all jobs share; applied first.
            chosen: the job's own overrides.

        Raises:
            ConfigError: the config is invalid; the message includes the overrides.
        """
        try:
            return from_dict(self.compose(fixed, chosen))
        except ConfigError as error:
            raise ConfigError(f"{error}\nin: {' '.join([*fixed, *chosen])}") from error

    def begin(self, folder: Path, settings: SweepConfig) -> sweep.Sweep:
        """Return a sweep that passes its jobs to the launcher."""
        quiet()
        gc.enable()

        def launch(waiting: Sequence[jobs.Job]) -> list[Any]:
            sweep_dir = f"hydra.sweep.dir={_quoted(str(folder))}"
            job_overrides = [
                [*job.overrides, *_of_environment(job), sweep_dir, f"hydra.sweep.subdir={_quoted(job.folder.name)}"]
                for job in waiting
            ]
            return [job_return.return_value for job_return in self.launcher.launch(job_overrides, initial_job_idx=0)]

        local = isinstance(self.launcher, LocalLauncher)
        return sweep.Sweep(folder, settings, launch, lambda: local and launcher.warm(settings.n_jobs))


def _of_environment(job: jobs.Job) -> list[str]:
    """Return overrides with what MLflow's variables say, as they may be other ones where the job runs."""
    from qlora_exp.tracking import uris  # imported late: SQLAlchemy takes half a second

    config, resolved = job.config.tracking, uris.resolved(job.config).tracking
    values = {"uri": (config.uri, resolved.uri), "experiment_name": (config.experiment_name, resolved.experiment_name)}
    return [f"tracking.{key}={_quoted(str(used))}" for key, (own, used) in values.items() if used != own]


def _refuse_idle_keys(configs: Sequence[Config], arguments: Sequence[str]) -> None:
    """Refuse overrides that would change nothing in any job."""
    if problems := [*idle.problems(configs, arguments, sweeping=True)]:
        raise ConfigError("\n".join(problems))


def _quoted(text: str) -> str:
    """Quote text as a value in Hydra's override grammar."""
    return "'" + text.replace("'", r"\'") + "'"


class GridSweeper(_Sweeper):
    """Runs every combination of the swept values that has not been run yet."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep; Hydra calls this with the overrides of the command line."""
        overrides = self.parse(arguments)
        for override in overrides:
            if override.key_or_group.startswith("search.") or (
                override.is_sweep_override() and override.is_interval_sweep()
            ):
                raise ConfigError(f"{override.input_line}: this works only in a search; add hydra/sweeper=optuna")
        combinations = every_combination(overrides)
        shared = sum(not override.is_sweep_override() for override in overrides)
        values = [[word.split("=", 1) for word in combination[shared:]] for combination in combinations]
        swept = [{key.lstrip("+"): value for key, value in pairs} for pairs in values]
        configs = [self.check(combination[:shared], combination[shared:]) for combination in combinations]
        _refuse_idle_keys(configs, arguments)
        settings = configs[0].sweep
        folder = self.folder(overrides, settings)
        with self.begin(folder, settings) as running:
            running.run(jobs.jobs(configs, swept, combinations, folder))


class OptunaSweeper(_Sweeper):
    """Runs the values that Optuna proposes from sweeps, ranges and intervals; each trial is repeated for every seed."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the search; Hydra calls this with the overrides of the command line."""
        try:
            from qlora_exp.sweeps import search
        except ImportError as error:
            raise ConfigError(
                "hydra/sweeper=optuna needs the package optuna: pip install 'qlora-exp[optuna]'"
            ) from error
        overrides = self.parse(arguments)
        searched = [
            override for override in overrides if override.is_sweep_override() and override.key_or_group != "seed"
        ]
        fixed = [override for override in overrides if override not in searched]
        if not searched:
            raise ConfigError(
                "hydra/sweeper=optuna: no key to search; give one, such as method.r=4,8,16 or "
                "training.learning_rate=interval(1e-5,1e-3)"
            )
        repeats = every_combination(fixed)
        space = {override.get_key_element(): search.distribution(override.value()) for override in searched}

        def jobs_of(values: Mapping[str, Any]) -> list[jobs.Job]:
            chosen = [f"{key}={value}" for key, value in values.items()]
            combinations = [[*repeat, *chosen] for repeat in repeats]
            shown = {key.lstrip("+"): _short(value) for key, value in values.items()}
            swept = [shown | ({"seed": _seed(repeat)} if len(repeats) > 1 else {}) for repeat in repeats]
            return jobs.jobs([self.check(repeat, chosen) for repeat in repeats], swept, combinations, folder)

        example = {key: search.example(choices) for key, choices in space.items()}
        first_config = self.check(repeats[0], [f"{key}={value}" for key, value in example.items()])
        configs = [first_config]
        for key, choices in space.items():
            for choice in getattr(choices, "choices", ()):
                with suppress(ConfigError):  # an invalid combination fails as a trial
                    words = [f"{name}={value}" for name, value in (example | {key: choice}).items()]
                    configs.append(self.check(repeats[0], words))
        _refuse_idle_keys(configs, arguments)
        if first_config.search.prune and len(repeats) > 1:
            raise ConfigError("search.prune judges single jobs: use one seed only, or remove search.prune")
        folder = self.folder(overrides, first_config.sweep, "search")
        if first_config.sweep.dry_run:
            say(f"would search {', '.join(space)} in {folder}: {search.progress(folder, first_config.search.n_trials)}")
            return
        with self.begin(folder, first_config.sweep) as running:
            best = search.search(running, space, jobs_of, first_config.search, first_config.sweep)
        for trial in best:
            values = zip(first_config.search.metrics, trial.values, strict=True)
            means = ", ".join(f"{metric} {value:.6g}" for metric, value in values)
            chosen = " ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
            say(f"best: {chosen} ({means}; trial {trial.number + 1})")


def _short(value: Any) -> str:
    return format(value, ".6g") if isinstance(value, float) else str(value)


def _seed(words: Sequence[str]) -> str:
    return next(word.removeprefix("seed=") for word in words if word.startswith("seed="))
