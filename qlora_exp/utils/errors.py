"""Errors that a user can fix, shown without a traceback, and hints at the correct name."""

import difflib
import operator
import re
from collections.abc import Iterable
from functools import lru_cache

from qlora_exp.utils.secrets import redact


class UserError(Exception):
    """A mistake or missing thing outside the program. The message says what is wrong, where, and what to do."""


class ConfigError(UserError):
    """A config that cannot be run."""


class DataError(UserError):
    """A dataset that cannot be read, or that has nothing to train on."""


class ModelError(UserError):
    """A base model that cannot be found, fetched or loaded."""


class CacheError(UserError):
    """A cache that cannot be written to."""


class TrackingError(UserError):
    """An MLflow store that cannot be reached or written to."""


class NoRunsError(TrackingError):
    """An MLflow store that does not exist yet, or that another process is creating."""


class DeletedError(TrackingError):
    """A run, or its experiment, that was deleted in MLflow and can be restored there."""


class JournalError(UserError):
    """A file in an output folder that cannot be read, or an output folder that no longer belongs to the run."""


class SweepError(UserError):
    """Some jobs of a sweep failed; each job records its own reason."""


class PrunedError(Exception):
    """A search stopped a job that did worse than other trials at the same step."""


class TimeLimitError(BaseException):
    """A job exceeded its time limit. A `BaseException`, so that no `except Exception` anywhere can swallow it."""


class RankError(UserError):
    """Another process of the run failed, and so the run ends as a whole."""

    def __init__(self, rank: int, why: str, outcome: str, report: str = "") -> None:
        """Keep what is known: `outcome` is that of the run, `report` the other process's traceback."""
        super().__init__(f"rank {rank}: {why}")
        self.rank, self.why, self.outcome, self.report = rank, why, outcome, report

    def __reduce__(self) -> tuple[type["RankError"], tuple[int, str, str, str]]:
        """Pickle all arguments: `Exception` keeps only the message."""
        return RankError, (self.rank, self.why, self.outcome, self.report)


class MemoryExhaustedError(UserError):
    """Memory ran out. The message says with which settings it would not."""


class DivergedError(Exception):
    """The loss or the gradient is no longer a finite number."""


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
_ONEDNN_OUT_OF_MEMORY = ("could not create a primitive", "could not create a memory object")
"""All that torch says if oneDNN finds no memory; what oneDNN cannot compute ends in `primitive descriptor`."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on the device or on the host; torch raises a RuntimeError for both."""
    text = str(error).lower()
    return isinstance(error, MemoryError | MemoryExhaustedError) or (
        isinstance(error, RuntimeError)
        and (any(words in text for words in _OUT_OF_MEMORY) or text.strip() in _ONEDNN_OUT_OF_MEMORY)
    )


def first_line(error: BaseException, most: int | None = None) -> str:
    """Return the first line of an error's text without secrets, or its type if it has no text.

    The line is cut to `most` characters, by default to 300 if it is not a message of this package. What caused the
    error, which `requests` writes at the end, is kept. The advice that SQLAlchemy writes first is left out.
    """
    lines = (redact(str(error)).strip() or type(error).__name__).splitlines()
    line = next((text for text in lines if not text.startswith("(raised as a result of")), lines[0])
    if most is None and isinstance(error, UserError):
        return line
    most = most or 300
    if len(line) > most and (cause := line.find("Caused by ")) >= 0:
        line = f"{line[: most // 3]} ... ({line[cause:]}"
    return line[:most]


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text without secrets: it says what went wrong if a traceback precedes it."""
    return (redact(str(error)).strip() or type(error).__name__).splitlines()[-1]


def type_and_first_line(error: BaseException, most: int | None = None) -> str:
    """Return an error's type and the first line of its text, or the type alone if it has no text."""
    name, line = type(error).__name__, first_line(error, most)
    return name if line == name else f"{name}: {line}"


# Names in other tools and papers -> the libraries' own names.
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
    "torch_dtype": "dtype",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "base_model": "model_name_or_path",
    "name": "model_name_or_path",
}
_MOST_HINTS = 3
_SHORTEST_PART = 3
"""Fewest letters of a word that may begin or end a name: shorter words match too many names."""
_SIMILAR, _SIMILAR_ELSEWHERE = 0.6, 0.8
"""Least similarity (difflib's ratio) of a name in the word's own section, and in another."""
_MUCH_LESS_SIMILAR = 0.05
"""A name that is less similar than the best by more than this is not listed: it would only distract."""


def nearest(word: str, names: Iterable[str]) -> list[str]:
    """List up to three of `names` that `word` may mean, the most likely first; empty if none is similar.

    Kinds of similarity, strongest first: an alias; the same except for case, separators or section; two letters
    exchanged; the same letters in another order; a name that begins or ends with the word; a similar spelling. Only
    names of the strongest kind that occurs are listed. Names in the word's own section (`training.` of `training.lr`)
    come first, but a similar spelling there comes after a stronger kind elsewhere.
    """
    section, _, leaf = word.rpartition(".")
    spelled = _spelled(leaf)
    letters = sorted(spelled)
    alias = _ALIASES.get("_".join(re.split(r"[\W_]+", leaf.casefold())))
    matcher = difflib.SequenceMatcher(b=spelled)
    hints: list[tuple[tuple[bool, bool, int], float, str]] = []
    for name in dict.fromkeys(names):
        own_section, _, own_leaf = name.rpartition(".")
        own, foreign = _spelled(own_leaf), own_section != section
        matcher.set_seq1(own)
        least = _SIMILAR_ELSEWHERE if foreign else _SIMILAR
        same_letters = len(own) == len(spelled) and sorted(own) == letters
        kinds = (
            own_leaf == alias,
            own == spelled,
            same_letters and sum(map(operator.ne, own_leaf, leaf)) == 2,
            same_letters,
            len(spelled) >= _SHORTEST_PART and (own.startswith(spelled) or own.endswith(spelled)),
            matcher.real_quick_ratio() >= least and matcher.quick_ratio() >= least and matcher.ratio() >= least,
        )
        if any(kinds) and name != word:
            kind = kinds.index(True)
            hints.append(((kind == len(kinds) - 1, foreign, kind), matcher.ratio(), name))
    hints.sort(key=lambda hint: (hint[0], -hint[1]))
    strongest = [(similarity, name) for kind, similarity, name in hints if kind == hints[0][0]]
    if hints and hints[0][0][0]:  # similar spellings only
        strongest = [hint for hint in strongest if hint[0] >= strongest[0][0] - _MUCH_LESS_SIMILAR]
    return [name for _, name in strongest[:_MOST_HINTS]]


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown `word`: a hint at the most similar `names`, or a full stop."""
    hints = [f"'{name}'" for name in nearest(word, names)]
    if not hints:
        return "."
    return f"; did you mean {' or '.join([*filter(None, [', '.join(hints[:-1])]), hints[-1]])}?"


@lru_cache(1024)
def _spelled(name: str) -> str:
    """Return the letters and digits of a name in lower case, which its different spellings share."""
    return re.sub(r"[\W_]+", "", name.casefold())
