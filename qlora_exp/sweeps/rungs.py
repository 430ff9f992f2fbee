"""Divide the trials of a tuned comparison by the length of their runs: successive halving."""

from dataclasses import dataclass

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.sweep import TuningConfig
from qlora_exp.utils.errors import ConfigError


@dataclass(frozen=True)
class Rung:
    """Trials of one length."""

    trials: int
    """Number of trials of each row."""
    length: str
    """Override that sets the length of its runs, such as `training.max_steps=5`."""
    share: float
    """That length as a share of a final run's."""


def rungs(config: Config, settings: TuningConfig) -> list[Rung]:
    """Return the rungs, shortest runs first; the last has runs as long as the final ones.

    Raises:
        ConfigError: the runs have too few steps to be shortened so often.
    """
    training, eta = config.training, settings.reduction_factor
    count = 1
    while eta ** (count + 1) <= settings.n_trials:
        count += 1
    shares = [eta ** (count - 1 - index) for index in range(count)]
    if training.max_steps > 0:
        if training.max_steps < shares[0]:
            raise ConfigError(
                f"training.max_steps={training.max_steps}: too few to try runs of 1/{shares[0]} of them; lower "
                "tuning.n_trials"
            )
        lengths = [f"training.max_steps={round(training.max_steps / share)}" for share in shares]
    else:
        lengths = [f"training.num_train_epochs={training.num_train_epochs / share:.6g}" for share in shares]
    return [Rung(settings.n_trials // eta**index, length, 1 / shares[index]) for index, length in enumerate(lengths)]
