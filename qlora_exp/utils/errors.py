"""What a user can mend: every such error is one of these, and is shown without a traceback."""

import difflib
import operator
import re
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


class DivergedError(Exception):
    """The loss or the gradient is not a number any more."""


def first_line(error: BaseException, most: int = 300) -> str:
    """Give the first line of an error's text, at most `most` characters of it; its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def last_line(error: BaseException) -> str:
    """Give the last line of an error's text, which says what went wrong if all before it is a traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def type_and_first_line(error: BaseException, most: int = 300) -> str:
    """Name an error's type before the first line of its text, if it has any."""
    name, line = type(error).__name__, first_line(error, most)
    return name if line == name else f"{name}: {line}"


# Names that other tools and papers use, with the libraries' own.
_ALIASES = {
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_target": "target_modules",
    "lr": "learning_rate",
    "scheduler": "lr_scheduler_type",
    "wd": "weight_decay",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "bs": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "base_model": "model_name_or_path",
    "name": "model_name_or_path",
}
_MOST_HINTS = 3
_WHOLE_WORD = 3
"""Letters that a word needs to be completed: shorter ones begin or end too many names."""
_ALIKE, _ALIKE_ELSEWHERE = 0.6, 0.8
"""Least similarity (difflib's ratio) of a name in the word's own section, and in another."""
_MUCH_LESS_ALIKE = 0.05
"""A name that much less similar than the best would only distract."""


def nearest(word: str, names: Iterable[str]) -> list[str]:
    """List up to three of `names` that `word` may stand for, the likeliest first; empty if none is near.

    Kinds of likeness, strongest first: an alias; the same but for case, separators or section; two letters exchanged;
    the same letters in another order; a name that begins or ends with the word; a similar spelling. Only names of the
    strongest kind that occurs are listed. Names of the word's own section (`training.` of `training.lr`) go first, but
    a similar spelling there only after a stronger kind elsewhere.
    """
    section, _, leaf = word.rpartition(".")
    spelled = _spelled(leaf)
    alias = _ALIASES.get("_".join(re.split(r"[\W_]+", leaf.casefold())))
    matcher = difflib.SequenceMatcher(b=spelled)
    hints: list[tuple[tuple[bool, bool, int], float, str]] = []
    for name in dict.fromkeys(names):
        own_section, _, own_leaf = name.rpartition(".")
        own, foreign = _spelled(own_leaf), own_section != section
        matcher.set_seq1(own)
        same_letters = sorted(own) == sorted(spelled)
        kinds = (
            own_leaf == alias,
            own == spelled,
            same_letters and sum(map(operator.ne, own_leaf, leaf)) == 2,
            same_letters,
            len(spelled) >= _WHOLE_WORD and (own.startswith(spelled) or own.endswith(spelled)),
            matcher.quick_ratio() >= _ALIKE and matcher.ratio() >= (_ALIKE_ELSEWHERE if foreign else _ALIKE),
        )
        if any(kinds) and name != word:
            kind = kinds.index(True)
            hints.append(((kind == len(kinds) - 1, foreign, kind), matcher.ratio(), name))
    hints.sort(key=lambda hint: (hint[0], -hint[1]))
    strongest = [(alike, name) for kind, alike, name in hints if kind == hints[0][0]]
    if hints and hints[0][0][0]:  # similar spellings only
        strongest = [hint for hint in strongest if hint[0] >= strongest[0][0] - _MUCH_LESS_ALIKE]
    return [name for _, name in strongest[:_MOST_HINTS]]


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """End a sentence about an unknown `word`: with a hint at the nearest of `names`, or just with a full stop."""
    hints = [f"'{name}'" for name in nearest(word, names)]
    if not hints:
        return "."
    return f"; did you mean {' or '.join([*filter(None, [', '.join(hints[:-1])]), hints[-1]])}?"


def _spelled(name: str) -> str:
    """The letters and digits of a name in lower case: what two spellings of it share."""
    return re.sub(r"[\W_]+", "", name.casefold())
