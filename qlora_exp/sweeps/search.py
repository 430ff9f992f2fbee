"""Optuna over the jobs of a sweep: it proposes values, every seed runs with them, it is told what came of it.

The study is a file in the sweep's folder, so that a search that was cut off goes on. Seeds are repeats: a trial's value
is the mean over them. Needs the extra `optuna`.
"""

import itertools
import json
import logging
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from qlora_exp.config.metric_direction import lower_is_better
from qlora_exp.config.sections.sweep import SearchConfig, SweepConfig
from qlora_exp.libraries.hydra import as_written
from qlora_exp.sweeps.jobs import GOOD, Job
from qlora_exp.sweeps.sweep import Sweep
from qlora_exp.utils.errors import ConfigError, did_you_mean
from qlora_exp.utils.files import write_atomically

log = logging.getLogger(__name__)
STUDY_FILE = "optuna.log"
STARTUP_TRIALS = 10
"""How many trials TPE draws at random before it learns from them."""
BEST_FILE = "best.json"


def search(
    sweep: Sweep,
    space: Mapping[str, BaseDistribution],
    jobs_of: Callable[[Mapping[str, Any]], list[Job]],
    settings: SearchConfig,
    how: SweepConfig,
) -> list[FrozenTrial]:
    """Run trials until there are `settings.n_trials`, those of earlier processes included; the best ones.

    Args:
        sweep: runs the jobs.
        space: the keys that are searched.
        jobs_of: the jobs of a trial's values, one for each seed.
        settings: `search` of the config.
        how: `sweep` of the config: how many trials are proposed together, and whether failed ones are run again.

    Raises:
        ConfigError: a metric that jobs do not have, a study that searched for something else, or one under way.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(sweep.folder / f"{STUDY_FILE}.running")  # let go when this returns, or the process ends
    try:
        lock.acquire(timeout=1)
    except Timeout as error:
        raise ConfigError(f"{sweep.folder}: another process is searching there") from error
    study = _study(sweep.folder, settings, space)
    unfinished = _left_over(study, space, again=how.rerun == "failed")
    for trial in study.trials:
        if trial.state.is_finished() and trial.params:
            failed = trial.state == TrialState.FAIL  # without a folder it did not fit, and was not run
            sweep.know([job for job in jobs_of(trial.params) if job.folder.exists() or not failed])

    def proposed() -> int:
        return sum(trial.state != TrialState.FAIL or how.rerun != "failed" for trial in study.trials)

    while unfinished or proposed() < settings.n_trials:
        batch = unfinished[: how.n_jobs]
        unfinished = unfinished[how.n_jobs :]
        while len(batch) < how.n_jobs and proposed() < settings.n_trials:
            if new := _unseen(study, space):
                study.enqueue_trial(new)
            number = study.ask(dict(space)).number
            batch.append(study.trials[number])
        log.info("trials %s of %d", ", ".join(str(trial.number + 1) for trial in batch), settings.n_trials)
        jobs = {trial.number: jobs_of(trial.params) for trial in batch}
        pruning = {jobs[trial.number][0].key: _told(sweep.folder, trial) for trial in batch} if settings.prune else {}
        sweep.run([job for repeats in jobs.values() for job in repeats], pruning)
        for trial in batch:
            ended = [sweep.ended(job) for job in jobs[trial.number]]
            outcomes = {one["outcome"] for one in ended}
            if "pruned" in outcomes:
                study.tell(trial.number, state=TrialState.PRUNED)
            elif outcomes == {"ok"}:
                values = [_values(one["metrics"], settings.metrics) for one in ended]
                study.tell(trial.number, [statistics.fmean(one) for one in zip(*values, strict=True)])
            elif outcomes <= {*GOOD, "oom", "nan", "timeout", "error"}:
                study.tell(trial.number, state=TrialState.FAIL)
        if any(sweep.ended(job)["outcome"] == "not started" for repeats in jobs.values() for job in repeats):
            break  # the launcher cannot, or was told not to; what is not told goes on when the search is started again
    best = list({str(trial.params): trial for trial in study.best_trials}.values())
    found = [
        {"trial": one.number, "params": one.params, **dict(zip(settings.metrics, one.values, strict=True))}
        for one in best
    ]
    write_atomically(sweep.folder / BEST_FILE, json.dumps(found, indent=1))
    return best


def progress(folder: Path, n_trials: int) -> str:
    """How far the search in `folder` came."""
    done = 0
    if (folder / STUDY_FILE).is_file():
        storage = JournalStorage(JournalFileBackend(str(folder / STUDY_FILE)))
        studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
        done = sum(trial.state.is_finished() for study in studies for trial in study.trials)
    return f"{done} trials are done, {max(0, n_trials - done)} to run"


def distribution(value: Any) -> BaseDistribution:
    """What Optuna draws from, for one of Hydra's sweeps: `a,b`, `range(1,9)`, `tag(log,interval(a,b))`."""
    try:
        return _distribution(value)
    except ValueError as error:  # Optuna's, e.g. of bounds in the wrong order
        raise ConfigError(f"search space {value}: {error}") from error


def _distribution(value: Any) -> BaseDistribution:
    log = "log" in value.tags
    if hasattr(value, "list"):
        return CategoricalDistribution([_plain(one) for one in value.list])
    if hasattr(value, "stop"):  # Hydra's stop is not included
        return CategoricalDistribution(list(value.range()))
    if isinstance(value.start, int) and isinstance(value.end, int):
        return IntDistribution(value.start, value.end, log=log)
    return FloatDistribution(value.start, value.end, log=log)


def _plain(value: Any) -> Any:
    """A choice as Optuna can keep it."""
    return value if isinstance(value, bool | int | float) else as_written(value)


def example(space: Any) -> Any:
    """One value that may be drawn, to check a config with."""
    return space.choices[0] if isinstance(space, CategoricalDistribution) else space.low


def _unseen(study: optuna.Study, space: Mapping[str, BaseDistribution]) -> dict[str, Any] | None:
    """Of a space of choices only, while TPE still draws at random: values that were not tried yet, if any are left."""
    choices = [one.choices for one in space.values() if isinstance(one, CategoricalDistribution)]
    if len(study.trials) >= STARTUP_TRIALS or len(choices) < len(space):
        return None
    tried = [trial.params for trial in study.trials]
    every = (dict(zip(space, values, strict=True)) for values in itertools.product(*choices))
    left = [values for values in itertools.islice(every, 10_000) if values not in tried]
    return random.Random(len(tried)).choice(left) if left else None


def _left_over(study: optuna.Study, space: Mapping[str, BaseDistribution], again: bool) -> list[FrozenTrial]:
    """The trials that an earlier process left unfinished, and if `again` those that failed, proposed anew."""
    for trial in study.trials:
        if trial.state == TrialState.RUNNING and trial.params.keys() != space.keys():  # killed before it had all values
            study.tell(trial.number, state=TrialState.FAIL)
    known = [trial.params for trial in study.trials if trial.state != TrialState.FAIL]
    for trial in study.trials if again else ():
        if trial.params.keys() == space.keys() and trial.params not in known:
            known.append(trial.params)
            study.enqueue_trial(trial.params)
            study.ask(dict(space))
    return [trial for trial in study.trials if trial.state == TrialState.RUNNING]


def _direction(metric: str) -> Literal["minimize", "maximize"]:
    if "lm_eval/" in metric:
        raise ConfigError(f"search.directions: give them; whether more {metric} is better depends on its task")
    return "minimize" if lower_is_better(metric) else "maximize"


def _study(folder: Path, settings: SearchConfig, space: Mapping[str, BaseDistribution]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = settings.directions or [_direction(metric) for metric in settings.metrics]
    storage = JournalStorage(JournalFileBackend(str(folder / STUDY_FILE)))
    known = {study.study_name: study for study in optuna.get_all_study_summaries(storage)}
    name = ",".join(settings.metrics)
    if known and name not in known:
        other = optuna.load_study(study_name=next(iter(known)), storage=storage)
        if any(trial.state == TrialState.COMPLETE for trial in other.trials):
            raise ConfigError(
                f"search.metrics: the study in {folder} is of {other.study_name}; give sweep.name=ANOTHER"
            )
        optuna.delete_study(study_name=other.study_name, storage=storage)  # it found nothing, e.g. of a misspelled one
    study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    searched = {key: distribution_to_json(one) for key, one in space.items()}
    searched["search.directions"] = ",".join(directions)
    before = study.user_attrs.get("space", searched)
    if changed := sorted(key for key in before.keys() | searched.keys() if before.get(key) != searched.get(key)):
        raise ConfigError(f"{', '.join(changed)}: not what the study in {folder} searched; give sweep.name=ANOTHER")
    study.set_user_attr("space", searched)
    drawn = settings.seed + len(study.trials)  # a search that goes on does not draw the same again
    tpe = optuna.samplers.TPESampler(seed=drawn, n_startup_trials=STARTUP_TRIALS)
    study.sampler = tpe if settings.sampler == "tpe" else optuna.samplers.RandomSampler(drawn)
    return study


def _values(metrics: Mapping[str, float], names: Sequence[str]) -> list[float]:
    if missing := [name for name in names if name not in metrics]:
        raise ConfigError(f"search.metrics: jobs have no '{missing[0]}'{did_you_mean(missing[0], metrics)}")
    return [metrics[name] for name in names]


def _told(folder: Path, trial: FrozenTrial) -> dict[str, Any]:
    return {"file": str(folder / STUDY_FILE), "trial": trial.number}
