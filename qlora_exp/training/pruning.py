"""Ask the search that a job belongs to whether the job should continue, and tell it the result."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.pruners import MedianPruner, SuccessiveHalvingPruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from qlora_exp.libraries.optuna import reopened
from qlora_exp.utils.errors import PrunedError

_WHY = {
    "median": "worse than the median of earlier trials",
    "halving": "not among the best third of the trials that came as far",
}


def judge(trial_address: Mapping[str, Any]) -> Callable[[float, int], None]:
    """Return the function that a job calls with each held-out loss and its step.

    The function raises PrunedError once the loss is bad beside those of other trials.

    Args:
        trial_address: `file` with the search's Optuna study, number of the job's `trial`, and `search.pruner`.
    """
    study = _study(trial_address)
    pruner, number = trial_address["pruner"], trial_address["trial"]
    trial = reopened(study, number)

    def report(loss: float, step: int) -> None:
        trial.report(loss, step)
        if pruner == "median":
            study.pruner = MedianPruner(n_startup_trials=3)
        else:
            first = min(filter(None, study.trials[number].intermediate_values), default=1)  # not that before training
            study.pruner = SuccessiveHalvingPruner(min_resource=first, reduction_factor=3)
        if trial.should_prune():
            raise PrunedError(f"held-out loss {loss:.4f} at step {step} is {_WHY[pruner]}")

    return report


def tell(trial_address: Mapping[str, Any], loss: float) -> None:
    """Tell the search the result of a trial as soon as it has ended: trials that still train are compared with it.

    Args:
        trial_address: as for `judge`.
        loss: held-out loss after training.
    """
    study, number = _study(trial_address), trial_address["trial"]
    if math.isfinite(loss) and not study.trials[number].state.is_finished():
        study.tell(number, loss)


def _study(trial_address: Mapping[str, Any]) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(trial_address["file"]))
    return optuna.load_study(study_name=optuna.get_all_study_names(storage)[0], storage=storage)
