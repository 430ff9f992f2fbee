from contextlib import nullcontext

import optuna
import pytest

from qlora_exp.sweeps import search
from qlora_exp.training.pruning import judge, tell
from qlora_exp.utils.errors import PrunedError


@pytest.fixture
def study(tmp_path):
    return optuna.create_study(storage=search.storage(tmp_path), study_name="after/loss")


@pytest.fixture
def address(tmp_path, study):
    """Give the address of a new trial."""
    file = str(tmp_path / search.STUDY_FILE)
    return lambda pruner="median": {"file": file, "trial": study.ask().number, "pruner": pruner}


def test_job_worse_than_earlier_trials_is_pruned(study, address):
    for _ in range(4):
        trial = study.ask()
        for step in (1, 2):
            trial.report(1.0, step)
        study.tell(trial, 1.0)
    good, bad = (judge(address()) for _ in range(2))
    good(0.9, 1)
    good(0.8, 2)
    with pytest.raises(PrunedError, match="at step 1 is worse"):
        bad(1.1, 1)


def test_a_job_is_compared_with_those_that_have_ended_since_the_search_proposed_it(study, address):
    told = [address() for _ in range(3)]
    late = judge(address())
    late(1.1, 1)  # nothing to compare with
    for each in told:
        judge(each)(1.0, 2)
        tell(each, 1.0)
        tell(each, 2.0)  # a job that is resumed after its end
    tell(address(), float("nan"))
    with pytest.raises(PrunedError, match="median"):
        late(1.1, 2)
    assert [trial.value for trial in study.trials] == [1.0, 1.0, 1.0, None, None]


def test_halving_compares_trials_that_train_at_the_same_time(address):
    jobs = [judge(address("halving")) for _ in range(7)]
    for job in jobs:
        job(2.0, 0)  # before training nothing is compared
    losses = [1.0, 1.5, 0.9, 1.2, 0.95, 1.1, 0.5]
    for number, (job, loss) in enumerate(zip(jobs, losses, strict=True)):
        goes_on = number in (0, 2, 6)  # the best of those that had come as far by then, or among their best third
        with nullcontext() if goes_on else pytest.raises(PrunedError, match="not among the best third"):
            job(loss, 4)
    jobs[0](0.8, 8)
    jobs[2](0.7, 8)  # the next comparison is at three times the first
    jobs[0](0.7, 12)
    with pytest.raises(PrunedError):
        jobs[2](0.8, 12)
