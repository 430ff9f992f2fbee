"""Check the settings of learning rate schedules: the arguments of transformers' functions.

Of the config this module needs only the section `training`. It must not import transformers, which imports torch.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from qlora_exp.config.tables import declared_types

_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Rate = Annotated[float, Field(ge=0)]
_Shape = Literal["linear", "cosine", "1-sqrt"]
_TO_MINIMUM = {"min_lr": _Rate, "min_lr_rate": _Share, "num_cycles": _Positive}

SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"num_cycles": _Positive},
    "cosine_with_restarts": {"num_cycles": PositiveInt},
    "cosine_with_min_lr": _TO_MINIMUM,
    "cosine_warmup_with_min_lr": {**_TO_MINIMUM, "warmup_lr_rate": _Share},
    "polynomial": {"lr_end": _Rate, "power": _Positive},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": PositiveInt},
    "warmup_stable_decay": {
        "num_decay_steps": PositiveInt,
        "num_stable_steps": PositiveInt,
        "warmup_type": _Shape,
        "decay_type": _Shape,
        "min_lr_ratio": _Share,
        "num_cycles": _Positive,
    },
}
"""Settings of each schedule, by transformers' names, and their types."""
FOLLOW_A_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedules of transformers that a run does not take: the learning rate would depend on how often it evaluates."""
_LOWEST = {"min_lr": 0.0, "lr_end": 1e-7}
"""Settings that must be below the learning rate, with transformers' defaults."""


def problems(schedule: str, given: dict[str, Any], learning_rate: float, warmup: float, steps: int) -> Iterator[str]:
    """Yield a message for each problem with the settings of a schedule.

    Args:
        schedule: `lr_scheduler_type`.
        given: `lr_scheduler_kwargs`.
        learning_rate: the learning rate that the schedule is a factor of.
        warmup: `warmup_steps`; below 1 a share of all steps.
        steps: `max_steps`; -1 if the number of steps follows from the number of rows.
    """
    allowed = SETTINGS[schedule]
    if wrong := [*declared_types.problems("lr_scheduler_kwargs", f"lr_scheduler_type={schedule}", allowed, given)]:
        yield from wrong
        return
    if "min_lr" in allowed and len(given.keys() & {"min_lr", "min_lr_rate"}) != 1:
        yield f"lr_scheduler_type={schedule} needs one of lr_scheduler_kwargs.min_lr and .min_lr_rate"
    for name in _LOWEST.keys() & allowed.keys():
        if (lowest := given.get(name, _LOWEST[name])) >= learning_rate:
            yield f"lr_scheduler_kwargs.{name}={lowest} must be below learning_rate={learning_rate}"
    for name in given.keys() & {"warmup_type", "warmup_lr_rate"}:
        if not warmup:
            yield f"lr_scheduler_kwargs.{name} shapes the warmup, but warmup_steps=0: there is none"
    if given.get("decay_type", "cosine") != "cosine" and "num_cycles" in given:
        yield "lr_scheduler_kwargs.num_cycles needs decay_type=cosine"
    rise = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    if schedule == "polynomial" and 0 < steps <= rise:
        yield f"lr_scheduler_type=polynomial has no step left to decay: warmup_steps={warmup:g} of max_steps={steps}"
    if schedule == "warmup_stable_decay":
        yield from _phases(given, rise, steps)


def check_name(schedule: Any) -> Any:
    """Return the name of a schedule.

    Raises:
        ValueError: the schedule follows a metric.
    """
    if schedule in FOLLOW_A_METRIC:
        raise ValueError(
            f"{schedule} follows the held-out loss, so that the learning rate would depend on how often a run "
            "evaluates; use cosine_with_min_lr or warmup_stable_decay"
        )
    return schedule


def _phases(given: dict[str, Any], rise: int, steps: int) -> Iterator[str]:
    """Check that warmup, stable phase and decay make up the run; else transformers uses other rates and only warns."""
    decay, stable = given.get("num_decay_steps"), given.get("num_stable_steps")
    if decay is None or steps <= 0:
        yield "lr_scheduler_type=warmup_stable_decay needs lr_scheduler_kwargs.num_decay_steps and max_steps"
    elif rise + decay > steps or (stable is not None and rise + stable + decay != steps):
        parts = f"{rise} steps of warmup, {'' if stable is None else f'{stable} stable, '}{decay} of decay"
        yield f"lr_scheduler_kwargs: {parts} do not make up max_steps={steps}; without num_stable_steps it is the rest"
