"""Wrap accelerate's private parts. Checked on accelerate 1.15.0."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import data_loader, state

from qlora_exp.libraries.patching import patched


class _EvenShares(data_loader.BatchSamplerShard):
    """Share of one process in the batches of all, where each row comes once in an epoch.

    The rows that are left at the end of an epoch are spread over all processes. A process for which none is left gets a
    row of another, which must not count (`is_blank`). Accelerate would fill up with rows from the beginning.
    """

    def __iter__(self) -> Iterator[list[int]]:
        together: list[list[int]] = []
        for batch in self.batch_sampler:
            together.append(batch)
            if len(together) == self.num_processes and len(batch) == self.batch_size:
                yield together[self.process_index]
                together = []
        if rows := [row for batch in together for row in batch]:
            yield rows[_share(len(rows), self.process_index, self.num_processes)] or rows[:1]


def _share(rows: int, process: int, processes: int) -> slice:
    """Return the rows of a process, as even as possible, in order."""
    size, more = divmod(rows, processes)
    begin = process * size + min(process, more)
    return slice(begin, begin + size + (process < more))


@contextmanager
def even_shares() -> Iterator[None]:
    """Let data loaders that accelerate prepares within the context give each row once in an epoch.

    Replaces `accelerate.data_loader.BatchSamplerShard`: there is no public hook for how batches are shared.
    """
    with patched(data_loader, BatchSamplerShard=_EvenShares):
        yield


def is_blank(accelerator: Any, rows: int, batch_size: int) -> bool:
    """Return whether the batch that was loaded last is a row of another process, because none was left for this one.

    Args:
        accelerator: `Accelerator`, which knows the processes, and whether an epoch ends.
        rows: number of rows in an epoch.
        batch_size: rows in a batch of one process.
    """
    left = rows % (batch_size * accelerator.num_processes)
    return bool(accelerator.gradient_state.end_of_dataloader) and 0 < left <= accelerator.process_index


_BORGS = (state.PartialState, state.AcceleratorState, state.GradientState)
"""Classes whose instances all have the same attributes."""


def shared_states() -> list[dict[str, Any]]:
    """Return what accelerate keeps for the whole process (`_shared_state` of its classes)."""
    return [dict(each._shared_state) for each in _BORGS]


def set_shared_states(states: list[dict[str, Any]]) -> None:
    """Put back what `shared_states` returned."""
    for each, values in zip(_BORGS, states, strict=True):
        each._shared_state.clear()
        each._shared_state.update(values)
