"""Sections `sweep`, `search` and `tuning`: how several jobs run."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from qlora_exp.config.sections.base import Section


class SweepConfig(Section):
    """How a sweep (`-m`) runs its jobs. Changes no job's result."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None = None
    """Name of the sweep's folder and MLflow run. null: derived from the swept keys. Reusing a name
    resumes that sweep."""
    n_jobs: PositiveInt = 1
    """Number of jobs that run at the same time on this machine. They share its cores."""
    fuse: Literal["off", "auto"] | Annotated[int, Field(ge=2)] = "off"
    """Train jobs that have the same base model in one process, which loads it once: so many at most, or as many as
    fit the device (auto). Each job's result is what it would be alone."""
    fused_rows: bool = False
    """Put the rows of jobs that are trained together through the base in one pass, instead of a step of each in turn.
    Sums may be rounded differently."""
    timeout_minutes: Annotated[float, Field(gt=0)] | None = None
    """Time limit of each job. null: none."""
    fail_fast: bool = False
    """Start no more jobs once a job has failed."""
    rerun: Literal["none", "failed", "all"] = "none"
    """Which finished jobs to run again from the start: none, failed ones, or all. Interrupted jobs always resume."""
    dry_run: bool = False
    """List the jobs and what would happen to each, but run nothing."""
    unfit: Literal["run", "skip", "refuse"] = "run"
    """What to do with jobs whose predicted memory exceeds the device: run them, skip them, or refuse the sweep."""
    vram: Annotated[float, Field(gt=0)] | None = None
    """GPU memory in GiB that `unfit` compares with. null: the memory of this machine's device."""


class SearchConfig(Section):
    """How Optuna searches (`hydra/sweeper=optuna`). Changes no job's result."""

    n_trials: PositiveInt = 20
    """Number of trials in total. An interrupted search resumes and continues up to this number."""
    metrics: Annotated[list[str], Field(min_length=1)] = ["after/loss"]
    """Metrics to optimize, by the names under which runs log them. Several metrics give a Pareto front."""
    directions: list[Literal["minimize", "maximize"]] | None = None
    """One direction per metric. null: minimize losses, seconds and memory, maximize scores. Scores of lm-eval always
    need a direction here."""
    sampler: Literal["tpe", "random"] = "tpe"
    """tpe: Tree-structured Parzen Estimator; random: random values."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of the sampler."""
    prune: bool = False
    """Stop jobs whose held-out loss during training is bad beside other trials'."""
    pruner: Literal["median", "halving"] = "median"
    """What `prune` compares with. median: the median of the trials that have ended; needs three of them. halving: all
    trials that have come as far, those that still train too: a third of them goes on at the first evaluation, and
    again at steps 3, 9, .. times as late."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.directions and len(self.directions) != len(self.metrics):
            raise ValueError("directions: give one direction per metric, or null")
        if self.prune and (self.metrics != ["after/loss"] or self.directions == ["maximize"]):
            raise ValueError("prune compares the held-out loss: it needs metrics=[after/loss], minimized")
        return self


class TuningConfig(Section):
    """How each row of a comparison is tuned before it is trained (`hydra/sweeper=tuned`). Changes no job's result."""

    tuned_keys: Annotated[list[str], Field(min_length=1)] = ["training.learning_rate"]
    """Swept keys that are tuned for each row. The other swept keys, apart from `seed`, make the rows."""
    n_trials: PositiveInt = 9
    """Number of trials of each row. The first takes the row's own values, if they are in the range."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Successive halving: one of so many trials goes on to a run that is so many times as long."""
    metric: str = "after/loss"
    """Metric by which trials are judged, by the name under which runs log it; measured on the validation rows."""
    direction: Literal["minimize", "maximize"] | None = None
    """null: minimize losses, seconds and memory, maximize scores. Scores of lm-eval always need a direction here."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of the tried values, and `seed` of the trials; it must not be a seed of the final runs."""
