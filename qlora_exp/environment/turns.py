"""Run several jobs in one process by turns, so that they can share what they do not change: each as if it were alone.

Every job has a thread; only the thread whose turn it is runs. What the libraries keep for the whole process (random
states, log handlers, accelerate's states, the output) is kept for each job, and exchanged when the turn passes on.
"""

import faulthandler
import gc
import logging
import math
import random
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_exp.environment.memory import share_freed_memory
from qlora_exp.utils.errors import TimeLimitError
from qlora_exp.utils.processes.signals import GRACE_SECONDS

_place = threading.local()
"""In a job's thread: `turns`, and the job's `number`."""


@dataclass
class _Job:
    call: Callable[[], object]
    output: Path
    kept: Any = None
    """State of the process as this job left it; None before its first turn."""
    error: BaseException | None = None
    raised: BaseException | None = None
    """Exception to raise in the job at its next turn."""
    waited: float = 0.0
    """Seconds in which other jobs had their turns."""
    ends: float = math.inf
    """Time by `seconds` at which the job's time limit is over."""
    note: Path | None = None
    """File that is created then."""


class Turns:
    """Jobs of one process that take turns."""

    def __init__(
        self,
        calls: Sequence[Callable[[], object]],
        outputs: Sequence[Path],
        rows_together: bool = False,
        at_once: int | None = None,
        more: Callable[[], Sequence[tuple[Callable[[], object], Path]]] = lambda: (),
    ) -> None:
        """Create the jobs.

        Args:
            calls: what each job does.
            outputs: the file that gets each job's output.
            rows_together: whether the jobs' rows go through the base in one pass, where they can.
            at_once: number of jobs that take turns; as one ends, the next begins. None: all.
            more: called as a job ends and all others have begun; returns what further jobs do, with their output files.
        """
        self.rows_together = rows_together
        self._jobs = [_Job(call, output) for call, output in zip(calls, outputs, strict=True)]
        self.at_once = min(at_once or len(self._jobs), len(self._jobs))
        """Number of jobs that take turns, at most."""
        self._waiting = deque(range(len(self._jobs)))
        """Jobs that have not begun."""
        self._more = more
        self._interrupted = False
        self._running: list[int] = []
        """Jobs that have begun and not ended, in the order of their turns; the first has its turn."""
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._begin: Any = None
        self._shared: dict[Hashable, Any] = {}

    @property
    def running(self) -> Sequence[int]:
        """Numbers of the jobs that have begun and not ended."""
        return tuple(sorted(self._running))

    def run(self) -> list[BaseException | None]:
        """Run all jobs to their ends; return the exception that each ended with.

        An exception in this thread (Ctrl-C, SIGTERM) is raised in each job at its next turn.
        """
        share_freed_memory()
        self._begin = _state()
        with self._changed:  # the first has its turn once all have begun
            for _ in range(self.at_once):
                self._begin_next()
        for thread in self._threads:  # an ended job has added the thread of the next
            while thread.is_alive():
                try:
                    thread.join()
                except BaseException as error:  # Ctrl-C or SIGTERM: the jobs record how they end
                    self._interrupt(error)
        _restore(self._begin)
        return [job.error for job in self._jobs]

    def _begin_next(self) -> None:
        """Let the next job take turns, if there is one."""
        with self._changed:
            if self._waiting:
                self._running.append(self._waiting.popleft())
                self._threads.append(threading.Thread(target=self._run, args=(self._running[-1],)))
                self._threads[-1].start()

    def _interrupt(self, error: BaseException) -> None:
        """Raise an exception in each job at its next turn, and begin no other."""
        with self._changed:
            self._waiting.clear()
            self._interrupted, self._more = True, lambda: ()
            for number in self._running:
                job = self._jobs[number]
                job.raised = job.raised or type(error)(*error.args)

    def _run(self, number: int) -> None:
        _place.turns, _place.number = self, number
        job = self._jobs[number]
        self._await(number)
        try:
            job.output.parent.mkdir(parents=True, exist_ok=True)
            with job.output.open("a", encoding="utf-8", buffering=1) as output:
                sys.stdout = sys.stderr = output
                self._check(job)
                job.call()
        except BaseException as error:  # it must not reach the other jobs; the caller of `run` gets it
            job.error = error
            if isinstance(error, KeyboardInterrupt | SystemExit):  # a signal is for all
                self._interrupt(KeyboardInterrupt())
            traceback.clear_frames(error.__traceback__)  # they hold the model
        faulthandler.cancel_dump_traceback_later()
        job.kept = None
        try:
            self._fill_places()
        except Exception as error:  # what this process returns says so; the other jobs go on
            job.error = job.error or error
        finally:
            with self._changed:
                self._running.remove(number)
                self._changed.notify_all()

    def _fill_places(self) -> None:
        """Let jobs that have not begun take the place of the one that has ended, and other free ones."""
        while len(self._running) <= self.at_once:
            if not self._waiting:
                _restore(self._begin)  # what is asked must not write into the ended job's output
                more = self._more()
                for call, output in () if self._interrupted else more:
                    self._waiting.append(len(self._jobs))
                    self._jobs.append(_Job(call, output))
            if not self._waiting:
                break
            gc.collect()  # the next job needs the memory
            self._begin_next()

    def _await(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._running[0] == number)
        _restore(self._jobs[number].kept or self._begin)

    def pass_on(self, number: int) -> None:
        """Let the other jobs have their turns, and return when it is this job's again."""
        job = self._jobs[number]
        faulthandler.cancel_dump_traceback_later()
        if len(self._running) > 1:
            job.kept, begin = _state(), time.perf_counter()
            with self._changed:
                self._running.append(self._running.pop(0))
                self._changed.notify_all()
            self._await(number)
            job.waited += time.perf_counter() - begin
        self._check(job)

    def _check(self, job: _Job) -> None:
        """Raise what was asked to be raised in the job, or that its time is over; else start its turn's time limit."""
        if job.raised is not None:
            error, job.raised = job.raised, None
            raise error
        left = job.ends - (time.perf_counter() - job.waited)
        if left <= 0 and job.note is not None:
            job.ends = math.inf
            job.note.touch()
            raise TimeLimitError("the time limit of the job is over")
        self._guard(left)

    def keep(self, name: Hashable, make: Callable[[], Any] | None = None) -> Any:
        """Return what the jobs share under a name; the first job that asks makes it."""
        if name not in self._shared:
            assert make is not None
            self._shared[name] = make()
        return self._shared[name]

    def share(self, seconds: float, shares: Mapping[int, float]) -> None:
        """Count time that this job's turn has just taken as that of several jobs, by their shares."""
        for number, share in shares.items():
            self._jobs[number].waited -= seconds * share
        self._jobs[self._running[0]].waited += seconds

    def limit(self, number: int, limit: float, note: Path | None) -> None:
        """Let a job's turns take so many seconds from now on; then create the file `note`."""
        job = self._jobs[number]
        job.ends, job.note = time.perf_counter() - job.waited + limit, note
        self._guard(limit)

    def _guard(self, left: float) -> None:
        """Kill this process if a turn does not end: the other jobs wait for it."""
        faulthandler.cancel_dump_traceback_later()
        if left < math.inf:
            faulthandler.dump_traceback_later(left + GRACE_SECONDS, exit=True)

    def waited(self, number: int) -> float:
        """Return the seconds in which a job waited for its turns."""
        return self._jobs[number].waited


def current() -> Turns | None:
    """Return the jobs that this one takes turns with; None outside."""
    return getattr(_place, "turns", None)


def number() -> int:
    """Return the number of this job."""
    return int(_place.number)


def pass_on() -> None:
    """Let the other jobs have their turns; do nothing outside."""
    if (turns := current()) is not None:
        turns.pass_on(number())


def seconds() -> float:
    """Return a clock that stands while other jobs have their turns."""
    waited = 0.0 if (turns := current()) is None else turns.waited(number())
    return time.perf_counter() - waited


@contextmanager
def time_limit(limit: float | None, note: Path) -> Iterator[None]:
    """Raise TimeLimitError at the job's first turn after its turns took `limit` seconds inside.

    If a turn lasts `GRACE_SECONDS` longer, all jobs are killed.

    Args:
        limit: time limit in seconds; None: no limit.
        note: file that is created at the time limit.
    """
    note.unlink(missing_ok=True)
    turns = current()
    assert turns is not None
    if limit is not None:
        turns.limit(number(), limit, note)
    try:
        yield
    finally:
        turns.limit(number(), math.inf, None)


def _state() -> Any:
    """Return what the libraries keep for the whole process."""
    import numpy as np
    import torch

    from qlora_exp.libraries import accelerate

    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    root = logging.getLogger()
    return (
        (random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda),
        (sys.stdout, sys.stderr),
        (root.handlers[:], root.level),
        accelerate.shared_states(),
        _precision(),
    )


def _precision() -> str | None:
    """Return how torch multiplies float32 matrices; None if that was set by torch's newer settings."""
    import torch

    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _restore(state: Any) -> None:
    import numpy as np
    import torch

    from qlora_exp.libraries import accelerate

    (python, numpy, cpu, cuda), (sys.stdout, sys.stderr), (handlers, level), states, precision = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    root = logging.getLogger()
    root.handlers[:] = handlers
    root.setLevel(level)
    accelerate.set_shared_states(states)
    if precision not in (None, _precision()):
        torch.set_float32_matmul_precision(precision)
