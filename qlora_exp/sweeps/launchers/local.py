"""Run jobs in processes of their own on this machine, each with fresh memory but without the time for imports.

The processes are forked from multiprocessing's fork server, which has loaded the libraries: it only imports `preload`.
This module is independent of what a job does.
"""

import gc
import logging
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, cast

from qlora_exp.environment.device import visible_gpus
from qlora_exp.recipe.launch import fork_server
from qlora_exp.sweeps.jobs import Ending, Place, state
from qlora_exp.utils.processes.signals import GRACE_SECONDS, handle_signals
from qlora_exp.utils.processes.workers import end_with_parent, write_into

_FORK_SERVER_GONE = 255  # exit code that multiprocessing reports if the fork server has died
OUTPUT_FILE = "output.log"
"""File in a job's folder with its output, if several jobs run at once."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A function to call in a process of its own."""

    call: bytes
    """Function without arguments, pickled by cloudpickle."""
    folder: Path
    """Folder of the job."""
    processes: int = 1
    """Number of processes that the job starts on this machine; each takes a GPU, if there are any."""
    place: Place | None = None
    """Group with which the job shares a process."""
    asks: bool = False
    """Whether the function takes a connection, through which its process asks for more tasks."""

    @property
    def output(self) -> Path:
        """File with its output, if several jobs run at once."""
        return self.folder / OUTPUT_FILE


@dataclass
class _Running:
    process: ForkServerProcess
    index: int
    slot: int
    questions: Connection | None
    """Through which the process asks for more tasks."""


def run_all(
    tasks: Sequence[Task],
    n_jobs: int = 1,
    stopped: Callable[[], bool] = lambda: False,
    died: Callable[[], object] = lambda: None,
    more: Callable[[int | None], Sequence[Task]] = lambda index: (),
) -> list[Ending | None]:
    """Call every task, at most `n_jobs` at a time, each in its own process, so that tasks cannot affect each other.

    Args:
        tasks: tasks in order.
        n_jobs: number of tasks at once. With more than one, each writes its output to `output.log` in its folder and
            sees one GPU for each of its processes.
        stopped: called before each start; if it returns true, no further task starts.
        died: called when a process has died.
        more: called for further tasks when all have started: with None, if there is a place for another process; with
            the number of a task whose process has asked, and calls them itself.

    Returns:
        For each task how its process died; None if it returned or was not started. Further tasks that have processes of
        their own come last.
    """
    tasks = [*tasks]
    width = max((task.processes for task in tasks), default=1)
    context, gpus = warm(n_jobs * width), visible_gpus()
    endings: list[Ending | None] = [None] * len(tasks)
    waiting = deque(range(len(tasks)))
    running: dict[int, _Running] = {}
    oom_kills = _oom_kills()
    try:
        while True:
            while len(running) < n_jobs and not stopped():
                if not waiting:
                    waiting.extend(range(len(tasks), len(tasks) + len(added := more(None))))
                    tasks.extend(added)
                    endings.extend([None] * len(added))
                if not waiting:
                    break
                index = waiting.popleft()
                output = tasks[index].output if n_jobs > 1 else None
                slot = min(set(range(n_jobs)) - {job.slot for job in running.values()})
                numbers = range(slot * width, (slot + 1) * width) if n_jobs > 1 and gpus else ()
                own = ",".join(dict.fromkeys(gpus[number % len(gpus)] for number in numbers))
                log.info("job %d of %d: %s", index + 1, len(tasks), output or tasks[index].folder.name)
                environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": own} if own else {})
                ours, theirs = context.Pipe() if tasks[index].asks else (None, None)
                process = context.Process(target=_call, args=(tasks[index].call, output, environment, theirs))
                process.start()
                if theirs is not None:
                    theirs.close()  # so that reading ends with the process
                running[process.sentinel] = _Running(process, index, slot, ours)
            if not running:
                break
            asking = {job.questions: job for job in running.values() if job.questions is not None}
            for ready in wait([*running, *asking]):
                if (job := asking.get(cast(Any, ready))) is not None:
                    _answer(job, (lambda index: []) if stopped() else more)
                    continue
                ended_job = running.pop(cast(int, ready))
                ended_job.process.join()
                ending = endings[ended_job.index] = _ending(ended_job.process.exitcode, oom_kills)
                if n_jobs > 1:
                    log.info("job %d of %d has ended", ended_job.index + 1, len(tasks))
                if ending:
                    oom_kills += ending.outcome == "oom"  # count it: the kernel kills one process at a time
                    died()
    finally:  # on Ctrl-C or SIGTERM, give the jobs time to record that they were killed
        _end(list(running.values()))
    return endings


def _answer(job: _Running, more: Callable[[int], Sequence[Task]]) -> None:
    """Send a process the tasks that it asks for."""
    assert job.questions is not None
    try:
        job.questions.recv()
    except (EOFError, OSError):  # the process has ended
        job.questions.close()
        job.questions = None
        return
    answer = [(task.call, task.output) for task in more(job.index)]
    with suppress(OSError):  # it has ended since: these tasks have not been started
        job.questions.send(answer)


def run_groups(
    tasks: Sequence[Task],
    n_jobs: int = 1,
    stopped: Callable[[], bool] = lambda: False,
    died: Callable[[], object] = lambda: None,
    more: Callable[[Place | None], Sequence[Task]] = lambda place: (),
) -> list[Ending | None]:
    """Call every task as `run_all` does, those of a group in one process, where they take turns.

    If a group's process is killed because memory ran out, its jobs go on with half as many at once. Of one that dies
    otherwise, the jobs that had not begun are as if not started.

    Args:
        tasks: tasks in order.
        n_jobs: as for `run_all`.
        stopped: as for `run_all`.
        died: as for `run_all`.
        more: called for further tasks when a place is free: in a group, or None for a process of its own.

    Returns:
        As `run_all`; the endings of further tasks come last, in the order in which `more` returned them.
    """
    tasks = [*tasks]
    groups: dict[Any, list[int]] = {}
    for index, task in enumerate(tasks):
        groups.setdefault(index if task.place is None else task.place, []).append(index)
    endings: list[Ending | None] = [None] * len(tasks)
    waiting = [(members, place.at_once if (place := tasks[members[0]].place) else 1) for members in groups.values()]

    def added(process: int | None) -> list[Task]:
        """Ask for more, for the process of `waiting` with that number, or for new ones."""
        new = [*more(None if process is None else tasks[waiting[process][0][0]].place)]
        numbers = range(len(tasks), len(tasks) + len(new))
        tasks.extend(new)
        endings.extend([None] * len(new))
        if process is None:
            waiting.extend(([number], 1) for number in numbers)
        else:
            waiting[process][0].extend(numbers)
        return new

    while waiting:
        merged = [_merged([tasks[index] for index in members], at_once) for members, at_once in waiting]
        again: list[tuple[list[int], int]] = []
        for ending, (members, at_once) in zip(run_all(merged, n_jobs, stopped, died, added), waiting, strict=True):
            states = {index: state(tasks[index].folder)[0] for index in members}
            left = [index for index in members if states[index] in ("new", "cut off")]
            if ending is not None and ending.outcome == "oom" and len(members) > 1:
                half = math.ceil(at_once / 2)
                again += [(left, half)] if half > 1 else [([index], 1) for index in left]
            elif len(members) == 1:
                endings[members[0]] = ending
            else:
                begun = [index for index in left if states[index] != "new" or tasks[index].output.exists()]
                for index in begun:
                    endings[index] = ending
        if again:
            log.warning("memory ran out; jobs go on in groups of at most %d", max(at_once for _, at_once in again))
        waiting = again
    return endings


def _merged(members: Sequence[Task], at_once: int) -> Task:
    """Return the task that calls these ones in one process."""
    import cloudpickle

    first = members[0]
    if len(members) == 1:
        return first
    assert first.place is not None
    outputs = [task.output for task in members]
    group = _Group([task.call for task in members], outputs, first.place.rows_together, at_once)
    many = f"{len(members)} jobs in one process" + (f", {at_once} at a time" if at_once < len(members) else "")
    log.info("%s; their output: %s in the folder of each in %s", many, OUTPUT_FILE, first.folder.parent)
    return replace(first, call=cloudpickle.dumps(group), asks=True)


@dataclass(frozen=True)
class _Group:
    """Jobs that share a process."""

    calls: Sequence[bytes]
    outputs: Sequence[Path]
    """File with the output of each job."""
    rows_together: bool
    at_once: int

    def __call__(self, questions: Connection) -> None:
        import cloudpickle

        from qlora_exp.environment.turns import Turns

        def more() -> list[tuple[Callable[[], object], Path]]:
            try:
                questions.send(None)
                return [(cloudpickle.loads(call), output) for call, output in questions.recv()]
            except (EOFError, OSError):  # the sweep is being ended
                return []

        with handle_signals():
            calls = [*map(cloudpickle.loads, self.calls)]
            errors = Turns(calls, self.outputs, self.rows_together, self.at_once, more).run()
        for error in errors:
            if error is not None:
                raise error


def _end(running: Sequence[_Running]) -> None:
    for job in running:
        if job.questions is not None:
            job.questions.close()  # else a job could wait for an answer, and its process could not record its end
        job.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for job in running:
        job.process.join(max(0.0, deadline - time.monotonic()))
        if job.process.exitcode is None:
            job.process.kill()
            job.process.join()


def _ending(code: int | None, oom_kills: int) -> Ending | None:
    if not code:
        return None
    if code == -signal.SIGKILL and _oom_kills() > oom_kills:
        return Ending("oom", "the kernel killed the process because memory ran out")
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    killed = code in (-signal.SIGKILL, -signal.SIGTERM, _FORK_SERVER_GONE)
    return Ending("killed" if killed else "error", f"the process died: {name}")


def _oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory since boot; 0 if it does not report this."""
    try:
        lines = Path("/proc/vmstat").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def warm(n_jobs: int) -> Any:
    """Start loading the libraries in the fork server, without waiting.

    Args:
        n_jobs: number of jobs that will run at once; they share the CPU cores.

    Returns:
        The multiprocessing context whose processes the fork server forks.
    """
    if n_jobs > 1:  # the fork server inherits these variables; OpenMP reads them there
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_jobs)))
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return fork_server()


def _call(pickled: bytes, output: Path | None, environment: dict[str, str], questions: Connection | None) -> None:
    """Call the task; runs in the job's process."""
    import cloudpickle

    gc.enable()  # `preload` turned it off
    os.environ.clear()  # the fork server's is that of when it started, maybe for an earlier sweep
    os.environ.update(environment)
    if output is not None:
        write_into(output)
    end_with_parent()
    call = cloudpickle.loads(pickled)
    _ = call() if questions is None else call(questions)
