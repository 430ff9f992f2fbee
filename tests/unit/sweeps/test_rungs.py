import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.sweep import TuningConfig
from qlora_exp.sweeps.rungs import rungs
from qlora_exp.utils.errors import ConfigError


def config(**training: float) -> Config:
    return Config.model_validate({"training": training})


@given(n_trials=st.integers(1, 200), eta=st.integers(2, 5), steps=st.integers(1, 1000))
def test_rungs_keep_the_best_share_for_runs_that_are_as_many_times_as_long(n_trials: int, eta: int, steps: int):
    settings = TuningConfig(n_trials=n_trials, reduction_factor=eta)
    try:
        found = rungs(config(max_steps=steps), settings)
    except ConfigError:
        assert steps < n_trials / eta
        return
    lengths = [int(rung.length.removeprefix("training.max_steps=")) for rung in found]
    assert (found[0].trials, lengths[-1]) == (n_trials, steps)
    assert found[-1].trials < eta**2
    for index, rung in enumerate(found):
        assert rung.trials == n_trials // eta**index
        assert rung.trials >= min(eta, n_trials)  # the winner is chosen among several, at full length
        assert rung.share == eta ** (index + 1 - len(found))
        assert lengths[index] == max(1, round(steps / eta ** (len(found) - 1 - index)))


def test_epochs_are_shortened_like_steps():
    found = rungs(config(num_train_epochs=3), TuningConfig())
    lengths = [(rung.trials, rung.length) for rung in found]
    assert lengths == [(9, "training.num_train_epochs=1"), (3, "training.num_train_epochs=3")]


def test_too_few_steps_for_short_runs_are_refused():
    with pytest.raises(ConfigError, match=r"max_steps=2: too few .* lower tuning\.n_trials"):
        rungs(config(max_steps=2), TuningConfig())
