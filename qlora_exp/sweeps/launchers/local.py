"""Jobs in processes of their own, forked from one that has loaded the libraries: fresh memory without the imports.

The process they are forked from (multiprocessing's fork server) only imports `preload`. Knows nothing of what jobs do.
"""

import gc
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, cast

from qlora_exp.sweeps.jobs import Ending
from qlora_exp.utils.signals import GRACE_SECONDS

ORPHAN_SECONDS = 10.0
"""What a job gets to write down how it ended, when its sweep was killed."""
_NOBODY_KNOWS = 255  # what multiprocessing says of a process whose fork server is gone
OUTPUT_FILE = "output.log"
log = logging.getLogger(__name__)
_PRELOAD = ["qlora_exp.sweeps.launchers.preload"]


@dataclass(frozen=True)
class Task:
    """Something to call in a process of its own."""

    call: bytes
    """A pickled function without arguments (cloudpickle's)."""
    folder: Path


@dataclass
class _Running:
    process: ForkServerProcess
    index: int
    slot: int


def run_all(
    tasks: Sequence[Task],
    n_jobs: int = 1,
    stopped: Callable[[], bool] = lambda: False,
    died: Callable[[], object] = lambda: None,
) -> list[Ending | None]:
    """Call every task, at most `n_jobs` at a time; what one does to its process does not touch the others.

    Args:
        tasks: in order.
        n_jobs: at once. With more than one, each writes its output into `output.log` of its folder, and sees one GPU.
        stopped: asked before each start; true starts no more.
        died: called when a process has died.

    Returns:
        For each task how its process ended, None if it returned or was not started.
    """
    context, gpus = warm(n_jobs), visible_gpus()
    endings: list[Ending | None] = [None] * len(tasks)
    waiting = deque(range(len(tasks)))
    running: dict[int, _Running] = {}
    oom_kills = _oom_kills()
    try:
        while waiting or running:
            while waiting and len(running) < n_jobs and not stopped():
                index = waiting.popleft()
                output = tasks[index].folder / OUTPUT_FILE if n_jobs > 1 else None
                slot = min(set(range(n_jobs)) - {one.slot for one in running.values()})
                gpu = gpus[slot % len(gpus)] if n_jobs > 1 and gpus else None
                log.info("job %d of %d: %s", index + 1, len(tasks), output or tasks[index].folder.name)
                process = context.Process(target=_call, args=(tasks[index].call, output, gpu))
                process.start()
                running[process.sentinel] = _Running(process, index, slot)
            if not running:
                break
            for sentinel in wait(list(running)):
                done = running.pop(cast(int, sentinel))
                done.process.join()
                ending = endings[done.index] = _ending(done.process.exitcode, oom_kills)
                if n_jobs > 1:
                    log.info("job %d of %d has ended", done.index + 1, len(tasks))
                if ending:
                    oom_kills += ending.outcome == "oom"  # the kernel kills one process at a time
                    died()
    finally:  # Ctrl-C, SIGTERM: the jobs write down that they were killed
        _end(list(running.values()))
    return endings


def _end(running: Sequence[_Running]) -> None:
    for one in running:
        one.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for one in running:
        one.process.join(max(0.0, deadline - time.monotonic()))
        if one.process.exitcode is None:
            one.process.kill()
            one.process.join()


def _ending(code: int | None, oom_kills: int) -> Ending | None:
    if not code:
        return None
    if code == -signal.SIGKILL and _oom_kills() > oom_kills:
        return Ending("oom", "the kernel killed the process for want of memory")
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    killed = code in (-signal.SIGKILL, -signal.SIGTERM, _NOBODY_KNOWS)
    return Ending("killed" if killed else "error", f"the process died: {name}")


def _oom_kills() -> int:
    """Processes that the kernel has killed for want of memory since it started; 0 where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def warm(n_jobs: int) -> Any:
    """Start loading the libraries in the fork server, without waiting; the context whose processes it forks."""
    if n_jobs > 1:  # inherited by the fork server, in which OpenMP reads them
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_jobs)))
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    forkserver.ensure_running()
    return context


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by what names them in `CUDA_VISIBLE_DEVICES`; found without touching one."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def _call(pickled: bytes, output: Path | None, gpu: str | None) -> None:
    """In the job's process."""
    import cloudpickle

    gc.freeze()  # what the imports made is shared with the fork server and never garbage: not to be looked at again
    gc.enable()
    if gpu is not None:  # before CUDA begins
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if output is not None:
        write_into(output)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()
    cloudpickle.loads(pickled)()


def write_into(output: Path) -> None:
    """From now on this process, and what it starts, prints into `output`, after what is there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _follow(sentinel: int) -> None:
    """A job does not outlive its sweep, even one that was killed: a second one would run beside it."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
