"""Ask the search that a job belongs to whether the job should continue."""

from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from qlora_exp.libraries.optuna import reopened
from qlora_exp.utils.errors import PrunedError


def judge(trial_address: Mapping[str, Any]) -> Callable[[float, int], None]:
    """Return the function that a job calls with each held-out loss and its step.

    The function raises PrunedError once the loss is worse than the median of earlier trials at that step.

    Args:
        trial_address: `file` with the search's Optuna study, and number of the job's `trial`.
    """
    storage = JournalStorage(JournalFileBackend(trial_address["file"]))
    name = optuna.get_all_study_names(storage)[0]
    study = optuna.load_study(study_name=name, storage=storage, pruner=optuna.pruners.MedianPruner(n_startup_trials=3))
    trial = reopened(study, trial_address["trial"])

    def report(loss: float, step: int) -> None:
        trial.report(loss, step)
        if trial.should_prune():
            raise PrunedError(f"held-out loss {loss:.4f} at step {step} is worse than the median of earlier trials")

    return report
