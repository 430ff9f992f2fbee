import optuna
import pytest

from qlora_exp.sweeps import search
from qlora_exp.training.pruning import judge
from qlora_exp.utils.errors import PrunedError


def test_job_worse_than_earlier_trials_is_pruned(tmp_path):
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / search.STUDY_FILE))
    )
    study = optuna.create_study(storage=storage, study_name="after/loss")
    for _ in range(4):
        trial = study.ask()
        for step in (1, 2):
            trial.report(1.0, step)
        study.tell(trial, 1.0)
    good, bad = (judge({"file": str(tmp_path / search.STUDY_FILE), "trial": study.ask().number}) for _ in range(2))
    good(0.9, 1)
    good(0.8, 2)
    with pytest.raises(PrunedError, match="at step 1 is worse"):
        bad(1.1, 1)
