"""Implement the sweepers for Hydra: grid and Optuna."""

import gc
import importlib.util
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from qlora_exp.config import idle, plugins
from qlora_exp.config.composer import Composer
from qlora_exp.config.overrides import combinations, of_job, quoted, readable
from qlora_exp.config.schema import Config
from qlora_exp.config.sections.sweep import SweepConfig
from qlora_exp.config.validate import from_composed
from qlora_exp.sweeps import jobs, sweep
from qlora_exp.sweeps.hydra_launchers import JobLauncher, LocalLauncher
from qlora_exp.sweeps.launchers import local as launcher
from qlora_exp.training.plugins import user_metrics
from qlora_exp.utils.display import say
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.secrets import redact
from qlora_exp.utils.text import FILE_NAME, shortened

log = logging.getLogger(__name__)


class JobSweeper(Sweeper):
    """Base of the sweepers: turns overrides into jobs, and passes jobs to the launcher."""

    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher

    def __init__(self, params: Mapping[str, str] | None = None) -> None:
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what Hydra passes before it calls `sweep`, and create the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.composer = Composer(hydra_context.config_loader, self._compose)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def _compose(self, overrides: list[str]) -> DictConfig:
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        for key in ("sweeper", "launcher", "sweep"):
            if composed.hydra[key] != self.config.hydra[key]:
                raise ConfigError(
                    f"hydra.{key}: must be the same for all jobs, but an option that is swept sets it; "
                    f"set it on the command line, or do not sweep over that option"
                )
        return composed

    def parse(self, arguments: Sequence[str]) -> list[Override]:
        """Parse the overrides of a named sweep, then those of the command line, which win.

        Returns:
            The last override of each key; swept keys come last.
        """
        words = readable([*(f"{key}={value}" for key, value in self.params.items()), *arguments])
        overrides = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(words)
        last = {override.key_or_group: override for override in overrides}
        for word in self.config.hydra.overrides.hydra:
            if word.lstrip("+").startswith(("hydra.sweep.subdir=", "hydra.run.")):
                raise ConfigError(f"{word} would change nothing: jobs' folders are named by their values")
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
        if len(name.encode()) > FILE_NAME:
            raise ConfigError(f"sweep.name: longer than {FILE_NAME} bytes, too long for the name of a folder")
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
            values, _ = self.composer(fixed, chosen)
            return from_composed(values)
        except ConfigError as error:
            words = " ".join(shortened(word) for word in (*fixed, *chosen))
            raise ConfigError(f"{error}\nin: {words}") from error

    def try_out(self, configs: Sequence[Config]) -> None:
        """Check before the first job costs time what each job checks again: the launcher, metrics and losses of others.

        Raises:
            ConfigError: a job cannot run.
        """
        if isinstance(self.launcher, JobLauncher):
            for remark in dict.fromkeys(self.launcher.try_out(configs)):
                log.warning("%s", remark)
        user_metrics.try_out(
            list(dict.fromkeys(name for each in configs for name in user_metrics.of_config(each.evaluation)))
        )
        losses = {each.training.loss_type for each in configs} - {*plugins.BUILT_IN["loss"]}
        if losses:
            from qlora_exp.training.plugins import user_losses  # imports torch, which takes seconds

            for name in sorted(losses):
                user_losses.load(name)

    def begin(self, folder: Path, settings: SweepConfig, is_part: bool = False) -> sweep.Sweep:
        """Return a sweep that passes its jobs to the launcher; `is_part` as in `Sweep`."""
        quiet()
        gc.enable()

        def words(of_jobs: Sequence[jobs.Job]) -> list[list[str]]:
            sweep_dir = f"hydra.sweep.dir={quoted(str(folder))}"
            return [
                [*job.overrides, *_of_environment(job), sweep_dir, f"hydra.sweep.subdir={quoted(job.folder.name)}"]
                for job in of_jobs
            ]

        def launch(waiting: Sequence[jobs.Job], more: jobs.MoreJobs) -> list[Any]:
            if isinstance(self.launcher, JobLauncher):
                self.launcher.more = lambda place: words(more(place))
            return [job_return.return_value for job_return in self.launcher.launch(words(waiting), initial_job_idx=0)]

        local = isinstance(self.launcher, LocalLauncher)
        if settings.fuse != "off" and not local:
            raise ConfigError("sweep.fuse: only hydra/launcher=local trains several jobs in one process")
        return sweep.Sweep(folder, settings, launch, lambda: local and launcher.warm(settings.n_jobs), is_part)


def _of_environment(job: jobs.Job) -> list[str]:
    """Return overrides with what MLflow's variables say, as they may be other ones where the job runs."""
    from qlora_exp.tracking.stores import uris  # imported late: SQLAlchemy takes half a second

    config, resolved = job.config.tracking, uris.resolved(job.config).tracking
    values = {"uri": (config.uri, resolved.uri), "experiment_name": (config.experiment_name, resolved.experiment_name)}
    return [f"tracking.{key}={quoted(str(used))}" for key, (own, used) in values.items() if used != own]


_SETTINGS = {"search": ("optuna", "a search"), "tuning": ("tuned", "a tuned comparison")}
"""Sections of the config, the sweeper that reads them, and what it makes."""


def refuse_settings_of_others(overrides: Sequence[Override], sweeper: str) -> None:
    """Refuse settings that only another sweeper reads."""
    for override in overrides:
        own, what = _SETTINGS.get(override.key_or_group.partition(".")[0], (sweeper, ""))
        if own != sweeper:
            raise ConfigError(f"{override.input_line}: this works only in {what}; add hydra/sweeper={own}")


def require_optuna(sweeper: str) -> None:
    """Raise an error if Optuna is not installed, which `sweeper` needs."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(f"hydra/sweeper={sweeper} needs the package optuna: pip install 'qlora-exp[optuna]'")


def refuse_idle_keys(configs: Sequence[Config], arguments: Sequence[str]) -> None:
    """Refuse overrides that would change nothing in any job."""
    if problems := [*idle.problems(configs, arguments, sweeping=True)]:
        raise ConfigError("\n".join(problems))


class GridSweeper(JobSweeper):
    """Runs every combination of the swept values that has not been run yet."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep; Hydra calls this with the overrides of the command line."""
        overrides = self.parse(arguments)
        refuse_settings_of_others(overrides, "grid")
        chosen = combinations(overrides)
        shared = sum(not override.is_sweep_override() for override in overrides)
        values = [[word.split("=", 1) for word in combination[shared:]] for combination in chosen]
        swept = [{key.lstrip("+"): value for key, value in pairs} for pairs in values]
        job_overrides = [of_job(combination) for combination in chosen]
        fixed = job_overrides[0][:shared]
        configs = [self.check(fixed, words[shared:]) for words in job_overrides]
        refuse_idle_keys(configs, arguments)
        self.try_out(configs)
        settings = configs[0].sweep
        folder = self.folder(overrides, settings)
        if few := few_seeds(swept):
            log.warning("%s", few)
        with self.begin(folder, settings) as running:
            running.run(jobs.jobs(configs, swept, job_overrides, folder))


def few_seeds(swept: Sequence[Mapping[str, str]]) -> str:
    """Return a warning if there are too few seeds to compare the rows; empty if there is one, or enough.

    Args:
        swept: swept keys and values of each job.
    """
    seeds = {values["seed"] for values in swept if "seed" in values}
    rows = {tuple(pair for pair in values.items() if pair[0] != "seed") for values in swept}
    if min(len(seeds), len(rows)) < 2:
        return ""
    from qlora_exp.results import stats  # imports SciPy

    enough = stats.seeds_needed(len(rows) - 1)
    few = f"{len(seeds)} seeds are too few to compare {len(rows)} rows whose results vary with the seed: use {enough}"
    return few if len(seeds) < enough else ""


class OptunaSweeper(JobSweeper):
    """Runs the values that Optuna proposes from sweeps, ranges and intervals; each trial is repeated for every seed."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the search; Hydra calls this with the overrides of the command line."""
        require_optuna("optuna")
        from qlora_exp.sweeps import search

        overrides = self.parse(arguments)
        refuse_settings_of_others(overrides, "optuna")
        searched = [
            override for override in overrides if override.is_sweep_override() and override.key_or_group != "seed"
        ]
        fixed = [override for override in overrides if override not in searched]
        if seeds := [override for override in fixed if override.is_sweep_override() and override.is_interval_sweep()]:
            raise ConfigError(f"{seeds[0].input_line}: seeds are repeats of a trial: list them, such as seed=1,2,3")
        if not searched:
            raise ConfigError(
                "hydra/sweeper=optuna: no key to search; give one, such as method.r=4,8,16 or "
                "training.learning_rate=interval(1e-5,1e-3)"
            )
        for override in searched:
            if redact(str(override.input_line)) != override.input_line:
                raise ConfigError(
                    f"{override.key_or_group}: a choice contains a secret, and the study writes its choices"
                )
        repeats = [of_job(repeat) for repeat in combinations(fixed)]
        space = {override.get_key_element(): search.distribution(override) for override in searched}

        def checked(repeat: Sequence[str], values: Mapping[str, Any]) -> Config:
            return self.check(repeat, of_job([f"{key}={value}" for key, value in values.items()]))

        def jobs_of(values: Mapping[str, Any]) -> list[jobs.Job]:
            chosen = of_job([f"{key}={value}" for key, value in values.items()])
            words = [[*repeat, *chosen] for repeat in repeats]
            shown = {key.lstrip("+"): short(value) for key, value in values.items()}
            swept = [shown | ({"seed": _seed(repeat)} if len(repeats) > 1 else {}) for repeat in repeats]
            return jobs.jobs([self.check(repeat, chosen) for repeat in repeats], swept, words, folder)

        valid, refused = _configs(lambda values: checked(repeats[0], values), space, searched)
        refuse_idle_keys([config for _, config in valid], arguments)
        self.try_out([config for _, config in valid])
        values, config = valid[0]
        for repeat in repeats[1:]:
            checked(repeat, values)
        settings, how = config.search, config.sweep
        if settings.prune and len(repeats) > 1:
            raise ConfigError("search.prune judges single jobs: use one seed only, or remove search.prune")
        folder = self.folder(overrides, how, "search")
        if refused and not (folder / search.STUDY_FILE).exists():  # a study that was begun goes on without them
            raise ConfigError(
                f"{len(refused)} of the combinations to search cannot run; remove them from the search:\n"
                + "\n".join(dict.fromkeys(refused[:3]))
            )
        if how.dry_run:
            say(f"would search {', '.join(space)} in {folder}: {search.progress(folder, settings.n_trials)}")
            return
        best: Sequence[Any] = ()
        try:
            with self.begin(folder, how) as running:
                best = search.search(running, space, jobs_of, settings, how)
        finally:  # also if trials failed
            for trial in best:
                results = zip(settings.metrics, trial.values, strict=True)
                means = ", ".join(f"{metric} {value:.6g}" for metric, value in results)
                chosen = " ".join(f"{key}={shortened(short(value))}" for key, value in trial.params.items())
                say(f"best: {chosen} ({means}; trial {trial.number + 1})")


_CHECKED = 400
"""Most combinations of choices that are all checked before a search: about a second."""


def _configs(
    check: Callable[[Mapping[str, Any]], Config], space: Mapping[str, Any], searched: Sequence[Override]
) -> tuple[list[tuple[Mapping[str, Any], Config]], list[str]]:
    """Check combinations of the choices of a search: all, or if they are too many, as many of each two keys.

    What is not checked here is checked when it is drawn: values that cannot run are a failed trial.

    Returns:
        The values that can run with their configs, and why the others cannot.

    Raises:
        ConfigError: none can run.
    """
    from qlora_exp.sweeps import search

    example = {key: search.example(choices) for key, choices in space.items()}
    choices = {key: getattr(values, "choices", (example[key],)) for key, values in space.items()}
    if math.prod(map(len, choices.values())) <= _CHECKED:
        candidates = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    else:
        candidates = [example]
        for first, second in itertools.combinations(choices, 2):
            pairs = itertools.product(choices[first], choices[second])
            candidates += [example | {first: one, second: other} for one, other in pairs]
    valid: list[tuple[Mapping[str, Any], Config]] = []
    refused: list[str] = []
    for candidate in itertools.islice(candidates, _CHECKED):
        try:
            valid.append((candidate, check(candidate)))
        except ConfigError as error:
            refused.append(str(error))
    if valid:
        return valid, refused
    whole = {key: round(value) if isinstance(value, float) else value for key, value in example.items()}
    try:
        check(whole)
    except ConfigError:
        raise ConfigError(refused[0]) from None
    intervals = [str(override.input_line) for override in searched if override.is_interval_sweep()]
    raise ConfigError(
        f"{', '.join(intervals)}: a key that takes whole numbers needs KEY=int(interval(A,B)); {refused[0]}"
    )


def short(value: Any) -> str:
    """Return a swept value as text."""
    return format(value, ".6g") if isinstance(value, float) else str(value)


def _seed(words: Sequence[str]) -> str:
    return next(word.removeprefix("seed=") for word in words if word.startswith("seed="))
