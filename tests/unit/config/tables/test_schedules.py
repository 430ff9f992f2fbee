"""Schedules are those of transformers, with their settings; a setting that a schedule lacks is refused."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from helpers.planning import CPU

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.training import TrainingConfig
from qlora_exp.config.tables import schedules
from qlora_exp.environment.device import resolve
from qlora_exp.utils.errors import ConfigError

STEPS, WARMUP = 20, 4
GIVEN: dict[str, list[dict[str, Any]]] = {
    "cosine": [{}, {"num_cycles": 1.5}],
    "cosine_with_restarts": [{}, {"num_cycles": 3}],
    "cosine_with_min_lr": [{"min_lr": 2e-5}, {"min_lr_rate": 0.1, "num_cycles": 1.0}],
    "cosine_warmup_with_min_lr": [{"min_lr": 2e-5}, {"min_lr_rate": 0.1, "warmup_lr_rate": 0.3}],
    "polynomial": [{}, {"lr_end": 1e-5, "power": 2}],
    "inverse_sqrt": [{}, {"timescale": 9}],
    "warmup_stable_decay": [
        {"num_decay_steps": 6, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
        {"num_decay_steps": 6, "num_stable_steps": 10, "warmup_type": "cosine"},
    ],
}


def test_schedules_have_the_settings_of_transformers_functions():
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    assert {*SchedulerType} == TYPE_TO_SCHEDULER_FUNCTION.keys()
    functions = {kind.value: function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    theirs = {name: function for name, function in functions.items() if name not in schedules.FOLLOW_A_METRIC}
    assert len(theirs) == len(functions) - len(schedules.FOLLOW_A_METRIC)
    not_settings = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert schedules.SETTINGS.keys() == theirs.keys()
    assert {*get_args(TrainingConfig.model_fields["lr_scheduler_type"].annotation)} == schedules.SETTINGS.keys()
    for name, function in theirs.items():
        assert schedules.SETTINGS[name].keys() == inspect.signature(function).parameters.keys() - not_settings, name


@pytest.mark.parametrize("schedule", schedules.SETTINGS)
def test_learning_rates_are_those_of_transformers_function(schedule: str):
    from transformers import Trainer
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    from qlora_exp.training.arguments import arguments

    function = TYPE_TO_SCHEDULER_FUNCTION[schedule]

    def rates(make: Any) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
        scheduler, found = make(optimizer), []
        for _ in range(STEPS):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    curves = []
    for kwargs in GIVEN.get(schedule, [{}]):
        warmup = [] if schedule == "constant" else [f"training.warmup_steps={WARMUP}"]
        words = [f"training.max_steps={STEPS}", f"training.lr_scheduler_type={schedule}", *warmup]
        config = compose([*words, *(f"training.lr_scheduler_kwargs.{key}={value}" for key, value in kwargs.items())])
        args = arguments(config, resolve(config, CPU), Path("out"))
        fixed = {"num_warmup_steps": WARMUP, "num_training_steps": STEPS}
        fixed = {key: value for key, value in fixed.items() if key in inspect.signature(function).parameters}

        def ours(optimizer: Any, args: Any = args) -> Any:
            return Trainer.create_scheduler(SimpleNamespace(args=args, lr_scheduler=None), STEPS, optimizer)

        curves.append(rates(ours))
        assert curves[-1] == rates(lambda optimizer, given={**fixed, **kwargs}: function(optimizer, **given))
    assert len(curves) == 1 or curves[0] != curves[1]


def test_a_run_follows_the_schedule_and_its_settings(run_quick):
    from qlora_exp.tracking.journal import metrics

    words = ["training.lr_scheduler_type=cosine_with_restarts", "training.lr_scheduler_kwargs.num_cycles=2"]
    result = run_quick(
        *words, "training.max_steps=4", "training.warmup_steps=0", "training.learning_rate=1.0", "evaluation=loss_only"
    )
    curve = [line["train/learning_rate"] for line in metrics(result.output_dir) if "train/learning_rate" in line]
    assert curve == pytest.approx([1.0, 0.5, 1.0, 0.5])


@pytest.mark.parametrize(
    ("schedule", "kwargs", "message"),
    [
        ("linear", "num_cycles: 2", "has no such setting. Its settings: none"),
        ("cosine_with_restarts", "num_cycle: 2", "did you mean 'num_cycles'?"),
        ("cosine_with_restarts", "num_cycles: 2.5", "valid integer"),
        ("cosine_with_restarts", "num_cycles: true", "valid integer"),
        ("cosine_with_min_lr", "", "needs one of lr_scheduler_kwargs.min_lr and .min_lr_rate"),
        ("cosine_with_min_lr", "min_lr: 1e-5, min_lr_rate: 0.1", "needs one of"),
        ("cosine_with_min_lr", "min_lr: 1", "must be below learning_rate=0.0002"),
        ("cosine_with_min_lr", "min_lr_rate: 2", "less than or equal to 1"),
        ("cosine_warmup_with_min_lr", "min_lr: 0, warmup_lr_rate: 0.1", "warmup_steps=0: there is none"),
        ("polynomial", "lr_end: 1", "must be below learning_rate"),
        ("inverse_sqrt", "timescale: 0", "greater than 0"),
        ("warmup_stable_decay", "", "needs lr_scheduler_kwargs.num_decay_steps and max_steps"),
        ("warmup_stable_decay", "num_decay_steps: 31", "do not make up max_steps=30"),
        ("warmup_stable_decay", "num_decay_steps: 3, num_stable_steps: 3", "do not make up max_steps=30"),
        ("warmup_stable_decay", "num_decay_steps: 3, decay_type: exp", "'linear', 'cosine' or '1-sqrt'"),
        ("warmup_stable_decay", "num_decay_steps: 3, decay_type: linear, num_cycles: 1", "needs decay_type=cosine"),
    ],
)
def test_wrong_setting_of_a_schedule_is_refused(schedule: str, kwargs: str, message: str):
    words = [f"training.lr_scheduler_type={schedule}", f"training.lr_scheduler_kwargs={{{kwargs}}}"]
    with pytest.raises(ConfigError) as error:
        compose([*words, "training.warmup_steps=0"])
    assert message in str(error.value)


@pytest.mark.parametrize("schedule", schedules.FOLLOW_A_METRIC)
def test_schedule_that_follows_a_metric_is_refused_with_the_reason(schedule: str):
    with pytest.raises(ConfigError, match="depend on how often a run evaluates; use cosine_with_min_lr"):
        compose([f"training.lr_scheduler_type={schedule}"])


def test_polynomial_schedule_needs_a_step_to_decay():
    with pytest.raises(ConfigError, match="no step left to decay"):
        compose(["training.lr_scheduler_type=polynomial", "training.max_steps=5", "training.warmup_steps=5"])
