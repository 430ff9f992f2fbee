"""Read rows in batches, in several processes if there are many, and columns of tokens without Python's lists.

Rows and tokens are files that are mapped into memory, so that processes read them without taking memory.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm

from qlora_exp.environment.ranks import ranks
from qlora_exp.utils.processes.workers import forks, in_order

Result = TypeVar("Result")
Row = dict[str, Any]

BATCH = 500
"""Number of rows that are worked on at once."""
_WORTH_A_PROCESS = 4000
"""Number of rows: with fewer, starting a process takes longer than it saves."""


class Lists(NamedTuple):
    """Consecutive values of a column of lists."""

    values: np.ndarray
    """Values of all lists, one after another."""
    ends: np.ndarray
    """Where each list ends among them."""

    @property
    def starts(self) -> np.ndarray:
        """Where each list starts."""
        return np.concatenate([[0], self.ends[:-1]]).astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Number of values of each list."""
        return self.ends - self.starts

    def rows(self) -> np.ndarray:
        """Return the number of the list that each value is in."""
        return np.repeat(np.arange(len(self.ends)), self.lengths)

    def places(self) -> np.ndarray:
        """Return the place of each value in its list."""
        return np.arange(len(self.values)) - np.repeat(self.starts, self.lengths)


def processes(rows: int) -> int:
    """Return how many processes work on so many rows: more than one only if that saves time."""
    return forks(rows // _WORTH_A_PROCESS, ranks().local_size)


def mapped(
    function: Callable[[list[Row]], Result], rows: Any, description: str, alone: bool = False
) -> Iterator[Result]:
    """Yield what a function makes of each batch of rows, in their order; many rows are shared among processes.

    Args:
        function: gets the rows of a batch as dictionaries.
        rows: a dataset, or a list of rows.
        description: label of the progress bar.
        alone: whether to do it all in this process.

    Raises:
        BrokenProcessPool: a process was killed, such as for its memory.
    """

    def of_batch(start: int) -> Result:
        return function(batch(rows, start, start + BATCH))

    starts = range(0, len(rows), BATCH)
    with tqdm(total=len(rows), desc=description, unit="row", leave=False, disable=None) as bar:
        for start, result in zip(starts, in_order(of_batch, starts, 1 if alone else processes(len(rows))), strict=True):
            yield result
            bar.update(min(BATCH, len(rows) - start))


def batch(rows: Dataset | Sequence[Row], start: int, stop: int) -> list[Row]:
    """Return consecutive rows as dictionaries."""
    if not isinstance(rows, Dataset):
        return list(rows[start:stop])
    columns = rows[start:stop]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def lists(tokens: Dataset, *names: str) -> Iterator[list[Lists]]:
    """Yield some columns of lists of numbers, a batch of rows at a time."""
    for table in tokens.select_columns([*names]).with_format("arrow").iter(batch_size=BATCH):
        yield [_lists(table.column(name).combine_chunks()) for name in names]


def _lists(column: Any) -> Lists:
    if isinstance(column, pa.ChunkedArray):  # an older pyarrow returns it even for one chunk
        column = pa.concat_arrays(column.chunks)
    offsets = column.offsets.to_numpy().astype(np.int64)
    return Lists(column.values.to_numpy()[offsets[0] : offsets[-1]], offsets[1:] - offsets[0])


def lengths(tokens: Dataset) -> np.ndarray:
    """Return the number of tokens of each row."""
    return np.concatenate([np.zeros(0, np.int64), *(ids.lengths for (ids,) in lists(tokens, "input_ids"))])
