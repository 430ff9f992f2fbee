"""Start the processes of a run that is shared by several, with torch's elastic launcher, and end them as one.

This process only waits: rank 0, which it starts too, tracks the run. Every process has the libraries from the start,
because multiprocessing's fork server, which forks them, has loaded them (`preload`).
"""

import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.distributed import watch
from qlora_exp.environment import ranks
from qlora_exp.environment.device import visible_gpus
from qlora_exp.recipe.result import RunResult
from qlora_exp.utils.errors import ConfigError, RankError, TimeLimitError, UserError, type_and_first_line
from qlora_exp.utils.processes.signals import GRACE_SECONDS, OUT_OF_TIME
from qlora_exp.utils.processes.workers import end_with_parent, write_into
from qlora_exp.utils.quiet import quiet

RANKS_FOLDER = "ranks"
"""Folder in the output folder with the output and the logs of the processes but the main one, named by their rank."""


def with_processes(config: Config) -> Config:
    """Return the config with the number of processes that `distributed.num_processes=auto` means here.

    Raises:
        ConfigError: there are no GPUs to count.
    """
    shared = config.distributed
    if shared.engine == "none" or shared.num_processes != "auto":
        return config
    count = ranks.ranks().size
    if not ranks.is_launched():
        count = 0 if config.device in ("cpu", "mps") else len(visible_gpus()) * shared.num_machines
    if not count:
        raise ConfigError("distributed.num_processes=auto counts GPUs, and there are none here: set it to a number")
    return config.model_copy(update={"distributed": shared.model_copy(update={"num_processes": count})})


def fork_server() -> Any:
    """Start loading the libraries in the fork server, without waiting; return its multiprocessing context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qlora_exp.recipe.preload"])
    forkserver.ensure_running()
    return context


_OF_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torch's launcher sets in each process, which those of this process must not replace."""


@dataclass(frozen=True)
class _Request:
    """What a process of a run gets."""

    run: Callable[..., RunResult]
    """`finetune.run`."""
    config: Config
    arguments: Mapping[str, Any]
    """Further arguments of `run`."""
    environment: Mapping[str, str]
    working_folder: str
    verbosity: int
    """Level of the root logger."""
    scratch: Path
    """Folder for the errors of the processes, by rank."""
    package: str = __file__
    """Where this module was loaded from."""


def launch(run: Callable[..., RunResult], config: Config, **arguments: Any) -> RunResult:
    """Start the processes of this machine, and wait for them.

    Args:
        run: `finetune.run`, which each process calls.
        config: its config.
        arguments: its other arguments.

    Returns:
        The result; without metrics on other machines than that of the main process.

    Raises:
        RankError: a process failed, died or hung.
        Exception: whatever the main process raised.
    """
    _check_gpus(config)
    if not _is_fork():
        fork_server()  # it loads the libraries while this process loads the launcher
    with tempfile.TemporaryDirectory(prefix="qlora_exp_ranks_") as scratch:
        level = logging.getLogger().level
        request = _Request(run, config, arguments, dict(os.environ), os.getcwd(), level, Path(scratch))
        results = _run_all(request)
    return results[0] if 0 in results else RunResult(None, arguments["output_dir"], {})


def _check_gpus(config: Config) -> None:
    """Check that each process of this machine has a GPU, if there are any; and that there are any to offload from."""
    shared, gpus = config.distributed, len(visible_gpus())
    if shared.cpu_offload and not gpus:
        raise ConfigError("distributed.cpu_offload=true needs GPUs, and none is visible here: use false")
    processes = int(shared.num_processes) // shared.num_machines
    if config.device in ("auto", "cuda") and 0 < gpus < processes:
        raise ConfigError(
            f"distributed.num_processes={shared.num_processes}: {processes} processes here need a GPU each, and "
            f"{gpus} are visible; start fewer, or use device=cpu"
        )


def _is_fork() -> bool:
    """Return whether this process was forked with the libraries, as a sweep's job: then it can be forked again."""
    return multiprocessing.parent_process() is not None and "torch" in sys.modules


def settings(shared: DistributedConfig, scratch: Path) -> Any:
    """Return the settings of torch's elastic launcher: which processes it starts, and how they find each other.

    Args:
        shared: section `distributed`, with a number of processes.
        scratch: folder for the launcher's files.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    assert isinstance(shared.num_processes, int)
    alone = shared.num_machines == 1
    grace = {"shutdown_timeout": int(GRACE_SECONDS)}
    known = {field.name for field in fields(LaunchConfig)}  # torch 2.11 has none: it waits for its own 30 seconds
    return LaunchConfig(
        min_nodes=shared.num_machines,
        max_nodes=shared.num_machines,
        nproc_per_node=shared.num_processes // shared.num_machines,
        run_id=ranks.OWN_LAUNCH,
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint=f"{'localhost' if alone else shared.main_process_ip}:{shared.main_process_port or 0}",
        rdzv_configs={"timeout": shared.ddp_timeout} | ({} if alone else {"rank": shared.machine_rank}),
        local_addr="localhost" if alone else None,
        max_restarts=0,
        start_method="fork" if _is_fork() else "forkserver",
        logs_specs=DefaultLogsSpecs(str(scratch / "torch")),
        signals_to_handle=f"SIGTERM,{OUT_OF_TIME.name}",
        **{name: seconds for name, seconds in grace.items() if name in known},
    )


def _run_all(request: _Request) -> dict[int, Any]:
    """Run the processes of this machine with torch's elastic launcher; return what they return, by rank."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what failed is said below
    start = elastic_launch(settings(request.config.distributed, request.scratch), _main)
    try:
        with _signals_forwarded():
            return start(request)
    except SignalException as stopped:
        raise (TimeLimitError("the time limit of the job is over") if stopped.sigval == OUT_OF_TIME
               else KeyboardInterrupt) from None  # fmt: skip
    except ChildFailedError as failed:
        raise _first_failure(request, failed.failures) from None


@contextmanager
def _signals_forwarded() -> Iterator[None]:
    """Let torch's launcher pass SIGTERM on to the processes, and Ctrl-C as SIGTERM; restore the handlers after it."""
    numbers = (signal.SIGTERM, signal.SIGINT, OUT_OF_TIME)
    before = {number: signal.getsignal(number) for number in numbers}

    def interrupt(*_: Any) -> None:
        if signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]:  # the launcher has not started the processes yet
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_failure(request: _Request, failures: Mapping[int, Any]) -> BaseException:
    """Return why the processes failed, and record it if the main process could not.

    What a user can correct is most often the same in all processes, of which any may notice it first: that error is
    returned as it is.
    """
    from qlora_exp.tracking import lifecycle

    known = {int(file.stem): pickle.loads(file.read_bytes()) for file in request.scratch.glob("*.error")}
    if 0 in known and not isinstance(known[0], KeyboardInterrupt):  # it has recorded it, and knows who failed first
        cause = known.get(known[0].rank) if isinstance(known[0], RankError) else None
        return cause if isinstance(cause, UserError) else known[0]
    own = {rank: error for rank, error in sorted(known.items()) if not isinstance(error, KeyboardInterrupt)}
    silent = {int(file.stem): file.read_text("utf-8") for file in request.scratch.glob("*.silent")}
    killed = {rank: silent.get(rank, f"its process {failure.pid} ended with {_code(failure.exitcode)}")
              for rank, failure in sorted(failures.items()) if rank not in known}  # fmt: skip
    first: BaseException | None = None
    if killed:
        rank, why = min(killed.items(), key=lambda each: each[0] not in silent)
        error = RankError(rank, why, "error")
    elif own:
        rank, first = next(iter(own.items()))
        error = first if isinstance(first, RankError) else RankError(rank, type_and_first_line(first), "error")
    else:  # somebody interrupted processes, but not this one
        error = RankError(min(known, key=lambda rank: (rank == 0, rank)), "it was interrupted", "killed")
    if request.config.distributed.machine_rank == 0:  # elsewhere the processes of that machine do it
        lifecycle.record_dead_main(request.config, request.arguments["output_dir"], request.arguments["tags"], error)
    return first if isinstance(first, UserError) else error


def _code(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _main(request: _Request) -> RunResult:
    """Run one process of a run; torch's launcher calls it in the process."""
    # The fork server's variables are those of when it started.
    os.environ.update({name: value for name, value in request.environment.items() if name not in _OF_LAUNCHER})
    os.chdir(request.working_folder)
    place = ranks.ranks()
    watch.reasons = request.scratch
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher passes it on as SIGTERM
    end_with_parent()
    gc.enable()
    if not place.is_main:
        write_into(request.arguments["output_dir"] / RANKS_FOLDER / f"{place.rank}.log")
    if not logging.getLogger().handlers:
        logging.basicConfig(stream=sys.stdout, level=request.verbosity)
    quiet()
    try:
        _check_code(request.package)
        return request.run(request.config, **request.arguments)
    except BaseException as error:  # whatever it is, the parent process raises it
        file = request.scratch / f"{place.rank}.error"
        file.with_suffix(".part").write_bytes(_pickled(error))
        file.with_suffix(".part").rename(file)
        sys.exit(1)


def _check_code(package: str) -> None:
    """Check that this process runs the code of its parent: the fork server does not have the parent's `sys.path`."""
    if package != __file__:
        raise ConfigError(
            f"this command runs {package}, and its processes would run {__file__}: install the checkout "
            "(pip install --editable .), or set PYTHONPATH to it"
        )


def _pickled(error: BaseException) -> bytes:
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:  # an error with arguments of its own: keep what it says
        content = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return content
