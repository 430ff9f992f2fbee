"""Search with Optuna over the jobs of a sweep: Optuna proposes values, jobs run with them, Optuna gets the results.

The study is a file in the sweep's folder, so that an interrupted search can resume. Seeds are repeats of a trial: the
value of a trial is the mean over its seeds. Needs the extra `optuna`.
"""

import itertools
import json
import logging
import math
import random
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock, Timeout
from hydra.core.override_parser.types import Glob, Override
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from qlora_exp.config.sections.sweep import SearchConfig, SweepConfig
from qlora_exp.libraries.hydra import as_written
from qlora_exp.results.metric_direction import lower_is_better
from qlora_exp.sweeps import fused
from qlora_exp.sweeps.jobs import NOT_FAILED, Job, Proposal
from qlora_exp.sweeps.sweep import Sweep
from qlora_exp.training.plugins import user_metrics
from qlora_exp.utils.errors import ConfigError, did_you_mean
from qlora_exp.utils.files import write_atomically
from qlora_exp.utils.names import valid_names
from qlora_exp.utils.text import shortened

log = logging.getLogger(__name__)
STUDY_FILE = "optuna.log"
"""File in the sweep's folder with Optuna's study."""
STARTUP_TRIALS = 10
"""Number of trials that TPE draws at random before it learns from results."""
BEST_FILE = "best.json"
"""File in the sweep's folder with the best trials."""


def search(
    sweep: Sweep,
    space: Mapping[str, BaseDistribution],
    jobs_of: Callable[[Mapping[str, Any]], list[Job]],
    settings: SearchConfig,
    how: SweepConfig,
) -> list[FrozenTrial]:
    """Run trials until there are `settings.n_trials`, including those of earlier processes.

    Args:
        sweep: the sweep that runs the jobs.
        space: the searched keys and their distributions.
        jobs_of: function that returns the jobs for a trial's values, one for each seed.
        settings: `search` of the config.
        how: `sweep` of the config: how many trials are proposed together, and whether failed trials run again.

    Returns:
        The best trials.

    Raises:
        ConfigError: jobs do not have a metric, the study in the folder searched something else, or another process is
            searching there.
    """
    with alone(sweep.folder):
        study = _study(sweep.folder, settings, space)
        trials = _Trials(sweep, study, space, jobs_of, settings, retry_failed=how.rerun == "failed")
        for trial in study.trials:
            if trial.state.is_finished() and trial.params:
                failed = trial.state == TrialState.FAIL  # a failed job without a folder exceeded memory and was not run
                with suppress(*[ConfigError] * failed):  # its values cannot run
                    sweep.register([job for job in jobs_of(trial.params) if job.folder.exists() or not failed])
        at_once = fused.jobs_at_once(how)
        unguided = settings.n_trials if settings.sampler == "random" else STARTUP_TRIALS
        # Values that do not depend on results are proposed ahead.
        while first := trials.next(max(at_once, unguided - trials.proposed) if at_once > 1 else 1):
            sweep.run(first.jobs, first.pruning, trials.following if at_once > 1 else lambda: None)
            trials.tell()
            if any(sweep.ended(job)["outcome"] == "not started" for job in trials.jobs):
                break  # the launcher failed, or jobs may not start; the next start of the search resumes these trials
        best_trials = list({str(trial.params): trial for trial in study.best_trials}.values())
        entries = [
            {"trial": trial.number, "params": trial.params, **dict(zip(settings.metrics, trial.values, strict=True))}
            for trial in best_trials
        ]
        write_atomically(sweep.folder / BEST_FILE, json.dumps(entries, indent=1))
        return best_trials


class _Trials:
    """What a search runs next, and what it tells Optuna."""

    def __init__(
        self,
        sweep: Sweep,
        study: optuna.Study,
        space: Mapping[str, BaseDistribution],
        jobs_of: Callable[[Mapping[str, Any]], list[Job]],
        settings: SearchConfig,
        retry_failed: bool,
    ) -> None:
        self._sweep, self._study, self._space, self._jobs_of, self._settings = sweep, study, space, jobs_of, settings
        failed = {trial.number for trial in study.trials if trial.state == TrialState.FAIL}
        self._replaced = failed if retry_failed else set[int]()
        """Trials whose values run again as another trial."""
        self._unfinished = _unfinished(study, space, retry_failed)
        self._begun: dict[int, list[Job]] = {}
        """Jobs of each trial that was begun here."""

    @property
    def jobs(self) -> list[Job]:
        """Jobs of all trials that were begun here."""
        return [job for repeats in self._begun.values() for job in repeats]

    @property
    def proposed(self) -> int:
        """Number of trials that were proposed, here and earlier."""
        return sum(trial.number not in self._replaced for trial in self._study.get_trials(deepcopy=False))

    def next(self, size: int) -> Proposal | None:
        """Return the jobs of so many trials, or of those that are left; None if none is."""
        while batch := self._ask(size):
            numbers = ", ".join(str(trial.number + 1) for trial in batch)
            log.info("trials %s of %d", shortened(numbers), self._settings.n_trials)
            self._begun.update(jobs := _jobs(self._study, batch, self._jobs_of))
            if jobs:
                pruning = {
                    repeats[0].key: _pruning(self._sweep.folder, number, self._settings.pruner)
                    for number, repeats in (jobs if self._settings.prune else {}).items()
                }
                return Proposal([job for repeats in jobs.values() for job in repeats], pruning)
        return None

    def following(self) -> Proposal | None:
        """Return the jobs of the next trial, as one has ended; None if there is none."""
        try:
            self.tell(leave="oom")  # beside others: it runs again, alone
        except ConfigError:  # it is raised again when the others have ended
            return None
        return self.next(1)

    def tell(self, leave: str = "") -> None:
        """Tell Optuna the results of trials that have ended, but not of those with a job of the outcome `leave`."""
        trials = self._study.get_trials(deepcopy=False)
        untold = {number: jobs for number, jobs in self._begun.items() if not trials[number].state.is_finished()}
        for number, repeats in untold.items():  # the jobs of others have told
            endings = [self._sweep.ended(job) for job in repeats]
            if leave not in {ending["outcome"] for ending in endings}:
                _tell(self._study, number, endings, self._settings.metrics)

    def _ask(self, size: int) -> list[FrozenTrial]:
        """Return unfinished trials of earlier processes, then new ones, while there may be more."""
        batch = self._unfinished[:size]
        del self._unfinished[:size]
        while len(batch) < size and self.proposed < self._settings.n_trials:
            if new := _unseen(self._study, self._space):
                self._study.enqueue_trial(new)
            number = self._study.ask(dict(self._space)).number
            batch.append(self._study.trials[number])
        return batch


def _tell(study: optuna.Study, number: int, endings: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> None:
    """Tell Optuna the result of a trial whose jobs have ended; nothing if one was interrupted."""
    outcomes = {ending["outcome"] for ending in endings}
    if "pruned" in outcomes:
        study.tell(number, state=TrialState.PRUNED)
    elif outcomes == {"ok"} and (missing := failed_metrics(endings, metrics)):
        log.warning("trial %d counts as failed: %s is not measured", number + 1, ", ".join(missing))
        study.tell(number, state=TrialState.FAIL)
    elif outcomes == {"ok"}:
        columns = zip(*(values(ending["metrics"], metrics) for ending in endings), strict=True)
        means = [statistics.fmean(column) for column in columns]
        measured = all(map(math.isfinite, means))
        study.tell(number, means if measured else None, None if measured else TrialState.FAIL)
    elif outcomes <= {*NOT_FAILED, "oom", "nan", "timeout", "error"}:
        study.tell(number, state=TrialState.FAIL)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock the study in `folder`, which is created, until the context or the process ends.

    Raises:
        ConfigError: another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f"{STUDY_FILE}.running").acquire(timeout=1):
            yield
    except Timeout as error:
        raise ConfigError(f"{folder}: another process is searching in this folder") from error


def _jobs(
    study: optuna.Study, batch: Sequence[FrozenTrial], jobs_of: Callable[[Mapping[str, Any]], list[Job]]
) -> dict[int, list[Job]]:
    """Return the jobs of each trial by its number; a trial whose values cannot run has failed, and has none."""
    jobs = {}
    for trial in batch:
        try:
            jobs[trial.number] = jobs_of(trial.params)
        except ConfigError as error:  # no reason to end the search: other values can run
            log.warning("trial %d cannot run and counts as failed: %s", trial.number + 1, str(error))
            study.tell(trial.number, state=TrialState.FAIL)
    return jobs


def progress(folder: Path, n_trials: int) -> str:
    """Describe how many trials of the search in `folder` are done."""
    done = 0
    if (folder / STUDY_FILE).is_file():
        file = storage(folder)
        studies = [optuna.load_study(study_name=name, storage=file) for name in optuna.get_all_study_names(file)]
        done = sum(trial.state.is_finished() for study in studies for trial in study.trials)
    return f"{done} trials are done, {max(0, n_trials - done)} to run"


def storage(folder: Path) -> JournalStorage:
    """Return Optuna's storage in the file in `folder`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return JournalStorage(JournalFileBackend(str(folder / STUDY_FILE)))


def distribution(override: Override) -> BaseDistribution:
    """Convert a Hydra sweep to an Optuna distribution: `a,b`, `glob(a*)`, `range(1,9)`, `tag(log,interval(a,b))`.

    Raises:
        ConfigError: nothing matches, or Optuna rejects the values.
    """
    try:
        return _distribution(override)
    except ValueError as error:  # raised by Optuna, e.g. for bounds in the wrong order or no choice
        raise ConfigError(f"search space {override.input_line}: {error}") from error


def _distribution(override: Override) -> BaseDistribution:
    value: Any = override.value()
    if isinstance(value, Glob):
        if not (names := list(override.sweep_string_iterator())):
            raise ValueError("nothing matches")
        return CategoricalDistribution(names)
    log = "log" in value.tags
    if hasattr(value, "list"):
        return CategoricalDistribution([_plain(choice) for choice in value.list])
    if hasattr(value, "stop"):  # Hydra's `range` excludes the stop value
        return CategoricalDistribution(list(value.range()))
    if isinstance(value.start, int) and isinstance(value.end, int):
        return IntDistribution(value.start, value.end, log=log)
    return FloatDistribution(value.start, value.end, log=log)


def _plain(value: Any) -> Any:
    """Convert a choice to a type that Optuna can store."""
    return value if isinstance(value, bool | int | float) else as_written(value)


def example(space: Any) -> Any:
    """Return a value that could be drawn, to check a config with it."""
    return space.choices[0] if isinstance(space, CategoricalDistribution) else space.low


def contains(space: Any, value: Any) -> bool:
    """Return whether a value could be drawn."""
    if isinstance(space, CategoricalDistribution):
        return value in space.choices
    return isinstance(value, int | float) and bool(space.low <= value <= space.high)


def _unseen(study: optuna.Study, space: Mapping[str, BaseDistribution]) -> dict[str, Any] | None:
    """Return values that were not tried yet, or None.

    Only for a space of choices, and only while TPE still draws at random: then TPE could draw the same values twice.
    """
    choices = [values.choices for values in space.values() if isinstance(values, CategoricalDistribution)]
    if len(study.trials) >= STARTUP_TRIALS or len(choices) < len(space):
        return None
    tried = [trial.params for trial in study.trials]
    all_values = (dict(zip(space, values, strict=True)) for values in itertools.product(*choices))
    untried = [values for values in itertools.islice(all_values, 10_000) if values not in tried]
    return random.Random(len(tried)).choice(untried) if untried else None


def _unfinished(study: optuna.Study, space: Mapping[str, BaseDistribution], retry_failed: bool) -> list[FrozenTrial]:
    """Return the trials that an earlier process left unfinished; with `retry_failed`, propose failed trials again."""
    for trial in study.trials:
        # Its process was killed before the trial had all values.
        if trial.state == TrialState.RUNNING and trial.params.keys() != space.keys():
            study.tell(trial.number, state=TrialState.FAIL)
    queued_params = [trial.params for trial in study.trials if trial.state != TrialState.FAIL]
    for trial in study.trials if retry_failed else ():
        if trial.params.keys() == space.keys() and trial.params not in queued_params:
            queued_params.append(trial.params)
            study.enqueue_trial(trial.params)
            study.ask(dict(space))
    return [trial for trial in study.trials if trial.state == TrialState.RUNNING]


def direction(metric: str, key: str) -> Literal["minimize", "maximize"]:
    """Return whether less of a metric is better; `key` sets it where only the user knows.

    Raises:
        ConfigError: the user must say it; or the metric is one of a package and cannot be imported.
    """
    if "/metric/" in metric:
        declared = user_metrics.load(metric.partition("/metric/")[2]).facts
        return "maximize" if declared.higher_is_better else "minimize"
    if "lm_eval/" in metric:
        raise ConfigError(f"{key}: must be set: whether higher {metric} is better depends on its task")
    return "minimize" if lower_is_better(metric) else "maximize"


def _study(folder: Path, settings: SearchConfig, space: Mapping[str, BaseDistribution]) -> optuna.Study:
    directions = settings.directions or [direction(metric, "search.directions") for metric in settings.metrics]
    file = storage(folder)
    studies = {study.study_name: study for study in optuna.get_all_study_summaries(file)}
    name = ",".join(settings.metrics)
    if studies and name not in studies:
        other = optuna.load_study(study_name=next(iter(studies)), storage=file)
        if any(trial.state == TrialState.COMPLETE for trial in other.trials):
            raise ConfigError(
                f"search.metrics: the study in {folder} optimizes {other.study_name}; give sweep.name=ANOTHER"
            )
        # It has no results, e.g. because a metric was misspelled.
        optuna.delete_study(study_name=other.study_name, storage=file)
    study = optuna.create_study(storage=file, study_name=name, directions=directions, load_if_exists=True)
    check_space(study, space, folder, {"search.directions": ",".join(directions)})
    sampler_seed = settings.seed + len(study.trials)  # so that a resumed search does not draw the same values again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # Trials that are running count as bad ones, so that those beside them try other values.
        tpe = optuna.samplers.TPESampler(seed=sampler_seed, n_startup_trials=STARTUP_TRIALS, constant_liar=True)
    study.sampler = tpe if settings.sampler == "tpe" else optuna.samplers.RandomSampler(sampler_seed)
    return study


def check_space(
    study: optuna.Study, space: Mapping[str, BaseDistribution], folder: Path, more: Mapping[str, str]
) -> None:
    """Note in a study what it searches, and refuse to continue it with something else.

    Args:
        study: Optuna's study.
        space: searched keys and their distributions.
        folder: folder of the study.
        more: other keys and values that must not change.

    Raises:
        ConfigError: the study searched something else.
    """
    searched = {key: distribution_to_json(distribution_of_key) for key, distribution_of_key in space.items()} | {**more}
    previous = study.user_attrs.get("space", searched)
    if changed := sorted(key for key in previous.keys() | searched.keys() if previous.get(key) != searched.get(key)):
        raise ConfigError(
            f"{', '.join(changed)}: differs from what the study in {folder} searched; give sweep.name=ANOTHER"
        )
    study.set_user_attr("space", searched)


def failed_metrics(endings: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """List which of these metrics are of packages and failed in a job; other names are misspelled if they are missing.

    Args:
        endings: how jobs ended.
        names: names of metrics.
    """
    return [name for name in names if "/metric/" in name and any(name not in each["metrics"] for each in endings)]


def values(metrics: Mapping[str, float], names: Sequence[str], key: str = "search.metrics") -> list[float]:
    """Return the values of metrics by name.

    Raises:
        ConfigError: the jobs do not have one of them, which `key` names.
    """
    valid = valid_names(names)  # as a run names them
    names = [name if name in metrics else valid[name] for name in names]
    if missing := [name for name in names if name not in metrics]:
        raise ConfigError(f"{key}: jobs have no metric '{missing[0]}'{did_you_mean(missing[0], metrics)}")
    return [metrics[name] for name in names]


def _pruning(folder: Path, trial: int, pruner: str) -> dict[str, Any]:
    return {"file": str(folder / STUDY_FILE), "trial": trial, "pruner": pruner}
