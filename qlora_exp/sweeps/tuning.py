"""Tune each row of a comparison with the same budget: Optuna proposes values, successive halving drops the worst.

All rows try the same values, but for the first trial, which takes the row's own. Each rung runs its trials for all rows
at the same time; the best go on to longer runs (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943). Trials
are judged on validation rows, and their seed is not one of the final runs', so that the winners are not chosen for the
rows or the seeds on which they are compared. Needs the extra `optuna`.
"""

import json
import logging
import math
import shutil
import statistics
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.sweep import TuningConfig
from qlora_exp.libraries.optuna import reopened
from qlora_exp.results.tuned import TAG, Tuned
from qlora_exp.sweeps import search
from qlora_exp.sweeps.jobs import UNFINISHED, Job
from qlora_exp.sweeps.rungs import Rung
from qlora_exp.sweeps.sweep import Sweep
from qlora_exp.utils.display import say
from qlora_exp.utils.errors import SweepError
from qlora_exp.utils.files import write_atomically

log = logging.getLogger(__name__)
Values = Mapping[str, Any]
"""Values of the tuned keys."""
_OF_LOSSES = ("after/loss", "after/perplexity")
_WEIGHTS = ("model", "checkpoints")
"""Folders of a trial that hold weights: they are removed, because only its metric is used."""


@dataclass
class Row:
    """A row of the comparison while it is tuned."""

    label: str
    """Its swept keys and values."""
    own: Values
    """The values that its config has; empty if they are not in the ranges."""
    job: Callable[[Values, Rung], Job]
    """Makes the job of a trial."""
    results: list[dict[int, float]] = field(default_factory=list)
    """For each rung the metric of each trial; infinite or -infinite for a trial that failed."""
    seconds: float = 0.0
    """Time that its trials took together."""


def trial_words(config: Config, rung: Rung) -> list[str]:
    """Return the overrides of trials: what they are judged on, and nothing that they are not judged by.

    Args:
        config: config of a final run.
        rung: the trials' rung.
    """
    settings, training = config.tuning, config.training
    metric = settings.metric
    words = ["dataset.evaluate_on=validation", f"seed={settings.seed}", "tracking.log_adapter=false"]
    words += ["tracking.log_full_model=false", rung.length]
    if metric.startswith("after/"):
        words.append("evaluation.before=false")
        words += [] if "lm_eval/" in metric else ["evaluation.lm_eval_tasks=[]"]
        words += [] if "unrelated" in metric else ["unrelated.name=none", "unrelated.path=none"]
    if metric.startswith("after/") and not training.load_best_model_at_end:
        words.append("training.eval_strategy=no")
    if metric in _OF_LOSSES or "lm_eval/" in metric:
        words.append("evaluation.generate_rows=0")
    return words


def tune(
    sweep: Sweep,
    rows: Sequence[Row],
    space: Mapping[str, BaseDistribution],
    steps: Sequence[Rung],
    settings: TuningConfig,
) -> list[Tuned | None]:
    """Tune each row.

    Args:
        sweep: the sweep that runs the trials.
        rows: the rows to tune.
        space: tuned keys and their distributions.
        steps: the rungs.
        settings: `tuning` of the config.

    Returns:
        How each row was tuned, in order; None for a row whose trials all failed, which is logged.

    Raises:
        ConfigError: jobs do not have the metric, the folder has trials of another space, or another process tunes
            there.
        SweepError: trials did not finish.
    """
    direction = settings.direction or search.direction(settings.metric, "tuning.direction")
    sign = -1 if direction == "maximize" else 1
    with search.alone(sweep.folder):
        storage = search.storage(sweep.folder)
        studies = [
            optuna.create_study(storage=storage, study_name=row.label, direction=direction, load_if_exists=True)
            for row in rows
        ]
        for study in studies:
            search.check_space(study, space, sweep.folder, {"tuning.direction": direction})
        values = [proposed(row, space, settings, study) for row, study in zip(rows, studies, strict=True)]
        for index, rung in enumerate(steps):
            jobs = [
                {number: row.job(trials[number], rung) for number in _chosen(row, index, rung.trials)}
                for row, trials in zip(rows, values, strict=True)
            ]
            say(f"{rung.length}: {sum(map(len, jobs))} trials for {len(rows)} rows, which keep no weights")
            sweep.run([job for row_jobs in jobs for job in row_jobs.values()])
            for row, row_jobs in zip(rows, jobs, strict=True):
                _add_results(row, {number: sweep.ended(job) for number, job in row_jobs.items()}, settings.metric, sign)
                for job in row_jobs.values():
                    for name in _WEIGHTS:
                        shutil.rmtree(job.folder / name, ignore_errors=True)
        for row, study in zip(rows, studies, strict=True):
            _tell(study, space, row, sign)
    return [_tuned(row, trials, steps, settings, sign) for row, trials in zip(rows, values, strict=True)]


def proposed(
    row: Row, space: Mapping[str, BaseDistribution], settings: TuningConfig, study: optuna.Study | None = None
) -> list[Values]:
    """Return the values of all trials of a row, in order: those that `study` has already, and new ones."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = study or optuna.create_study()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna says it of this sampler since 2022
        independent = optuna.samplers.RandomSampler(settings.seed)
        study.sampler = optuna.samplers.QMCSampler(
            seed=settings.seed, scramble=True, independent_sampler=independent, warn_independent_sampling=False
        )
    if row.own and not study.trials:
        study.enqueue_trial(dict(row.own))
    for _ in range(len(_whole(study, space)), settings.n_trials):
        study.ask(dict(space))
    return [trial.params for trial in _whole(study, space)[: settings.n_trials]]


def _whole(study: optuna.Study, space: Collection[str]) -> list[FrozenTrial]:
    """Return the trials that have all values; a process that was killed may have left one without."""
    return [trial for trial in study.trials if trial.params.keys() == {*space}]


def _chosen(row: Row, index: int, count: int) -> list[int]:
    """Return the numbers of the trials that take part in a rung: those that were best in the rung before it."""
    if index == 0:
        return list(range(count))
    before = row.results[index - 1]
    return sorted(number for number in sorted(before, key=before.__getitem__)[:count] if math.isfinite(before[number]))


def _add_results(row: Row, endings: Mapping[int, Mapping[str, Any]], metric: str, sign: int) -> None:
    """Add the metric of each trial such that less is better; infinity for a trial that failed."""
    if waiting := [ending for ending in endings.values() if ending["outcome"] in UNFINISHED]:
        raise SweepError(f"{row.label}: {len(waiting)} trials did not finish: the same command resumes them")
    measured = {
        number: sign * search.values(ending["metrics"], [metric], "tuning.metric")[0]
        for number, ending in endings.items()
        if ending["outcome"] == "ok" and not search.failed_metrics([ending], [metric])
    }
    results = {number: measured.get(number, math.inf) for number in endings}
    row.results.append({number: value if math.isfinite(value) else math.inf for number, value in results.items()})
    row.seconds += sum(ending.get("seconds", 0.0) for ending in endings.values())
    if endings and all(map(math.isinf, row.results[-1].values())):
        missing = f"{metric} is not measured"
        reasons = dict.fromkeys(
            missing if ending["outcome"] == "ok" else str(ending.get("failure") or ending["outcome"])
            for ending in endings.values()
        )
        log.error("%s: all %d trials failed, so it is not tuned: %s", row.label, len(endings), "; ".join(reasons))


def _tell(study: optuna.Study, space: Collection[str], row: Row, sign: int) -> None:
    """Write the results to Optuna's study; a trial that did not reach the last rung is pruned."""
    for number, trial in enumerate(_whole(study, space)):
        values = [results[number] for results in row.results if number in results]
        if trial.state.is_finished() or not values:
            continue
        if not math.isfinite(values[-1]):
            study.tell(trial.number, state=TrialState.FAIL)
            continue
        open_trial = reopened(study, trial.number)
        for step, value in enumerate(values):
            open_trial.report(sign * value, step)
        if number in row.results[-1]:
            study.tell(trial.number, sign * values[-1])
        else:
            study.tell(trial.number, state=TrialState.PRUNED)


def _tuned(
    row: Row, trials: Sequence[Values], steps: Sequence[Rung], settings: TuningConfig, sign: int
) -> Tuned | None:
    first, last = row.results[0], row.results[-1]
    best = min(last, key=last.__getitem__, default=0)
    if math.isinf(last.get(best, math.inf)):
        return None
    return Tuned(
        values=dict(trials[best]),
        budget=[f"{rung.trials} x {rung.length}" for rung in steps],
        metric=settings.metric,
        best=sign * last[best],
        first_best=sign * min(first.values()),
        first_median=sign * statistics.median(first.values()),
        first_own=sign * first[0] if row.own == trials[0] else math.nan,
        failed=sum(map(math.isinf, first.values())),
        minutes=row.seconds / 60,
        at_edge=[key for key in trials[best] if _is_edge(trials[best][key], {trial[key] for trial in trials})],
    )


def _is_edge(value: Any, tried: set[Any]) -> bool:
    """Return whether a number is the smallest or the largest of those tried, if these are more than an alternative."""
    numbers = [each for each in tried if isinstance(each, int | float) and not isinstance(each, bool)]
    return len(numbers) > 2 and value in (min(numbers), max(numbers))


def tags(tuned: Tuned) -> dict[str, str]:
    """Return the tag by which a final run says how its row was tuned."""
    return {TAG: tuned.model_dump_json()}


def write(tuned: Mapping[str, Tuned], folder: Path) -> None:
    """Write how each row was tuned to `tuning.json` in the sweep's folder."""
    text = json.dumps({label: each.model_dump(mode="json") for label, each in tuned.items()}, indent=1)
    write_atomically(folder / "tuning.json", text)
