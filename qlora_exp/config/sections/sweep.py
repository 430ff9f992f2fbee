"""The sections `sweep` and `search`: how several jobs run."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from qlora_exp.config.sections.base import Section


class SweepConfig(Section):
    """How a sweep (`-m`) goes about its jobs. Changes no job's result."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None = None
    """Of its folder and its MLflow run; null: made of the swept keys. The same name again goes on with that sweep."""
    n_jobs: PositiveInt = 1
    """Jobs at once on this machine; they share the cores."""
    timeout_minutes: Annotated[float, Field(gt=0)] | None = None
    """Of each job."""
    fail_fast: bool = False
    """Start no further job once one has failed."""
    rerun: Literal["none", "failed", "all"] = "none"
    """Which ended jobs to run again, from the start. Those that were cut off always go on."""
    dry_run: bool = False
    """List the jobs and what would happen to each; run nothing."""
    unfit: Literal["run", "skip", "refuse"] = "run"
    """What becomes of jobs that are planned not to fit their device; refuse runs no job if there is one."""
    vram: Annotated[float, Field(gt=0)] | None = None
    """GiB of the GPU that jobs will have, for `unfit`; null: of the device that is here."""


class SearchConfig(Section):
    """How Optuna searches (`hydra/sweeper=optuna`). Changes no job's result."""

    n_trials: PositiveInt = 20
    """Trials of the whole search; a search that was cut off goes on to this number."""
    metrics: Annotated[list[str], Field(min_length=1)] = ["after/loss"]
    """What is optimized, by the names that runs log; several give a Pareto front."""
    directions: list[Literal["minimize", "maximize"]] | None = None
    """One for each metric; null minimizes losses, seconds and memory, and maximizes scores, except those of lm-eval,
    for which it must be given."""
    sampler: Literal["tpe", "random"] = "tpe"
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the sampler."""
    prune: bool = False
    """Stop a job whose held-out loss during training is worse than the median of earlier trials."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.directions and len(self.directions) != len(self.metrics):
            raise ValueError("directions: give one for each of metrics, or null")
        if self.prune and (self.metrics != ["after/loss"] or self.directions == ["maximize"]):
            raise ValueError("prune judges by the held-out loss: it needs metrics=[after/loss], minimized")
        return self
