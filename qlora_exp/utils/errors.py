"""What a user can mend: every such error is one of these, and is shown without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake or a missing thing outside the program; the message says what, where and what to do."""


class ConfigError(UserError):
    """A config that cannot be run."""


class DataError(UserError):
    """A dataset that cannot be read, or that a run would learn nothing from."""


class ModelError(UserError):
    """A base model that cannot be found, fetched or loaded."""


class CacheError(UserError):
    """A cache that cannot be written."""


class TrackingError(UserError):
    """An MLflow store that cannot be reached or written."""


class JournalError(UserError):
    """A file of an output folder that cannot be read, or a folder that is not the run's any more."""


class SweepError(UserError):
    """Some jobs of a sweep did not end well; each has its own reason."""


class PrunedError(Exception):
    """A search has seen enough of a job that does worse than others did at that step."""


class TimeLimitError(BaseException):
    """A job took longer than it was given; no handler of `Exception`, wherever it strikes, may swallow that."""


# What people type for what the libraries call otherwise.
_ALIASES = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "max_seq_length": "max_length",
}


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The nearest spelling among `known`, if any is near; dotted keys are compared by their last part."""
    leaves = {name.rpartition(".")[2]: name for name in known}
    leaf = word.rpartition(".")[2]
    if _ALIASES.get(leaf) in leaves:
        return leaves[_ALIASES[leaf]]
    near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=cutoff)
    return leaves[near[0]] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown `word`: a hint with the nearest spelling, or just its full stop."""
    near = nearest(word, known)
    return f"; did you mean '{near}'?" if near else "."


class DivergedError(Exception):
    """The loss or the gradient is not a number any more."""
