"""Run jobs on a Ray cluster (a running one, or one started on this machine), each in a worker of its own.

All nodes must see the sweep's folder and have this package installed. Needs the extra `ray`. This module is
independent of what a job does.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics unless the user asks for it

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from qlora_exp.sweeps.jobs import Ending
from qlora_exp.sweeps.launchers.local import OUTPUT_FILE, Task
from qlora_exp.utils.errors import ConfigError, first_line
from qlora_exp.utils.processes.signals import GRACE_SECONDS, handle_signals
from qlora_exp.utils.processes.workers import write_into


def run_all(
    tasks: Sequence[Task],
    n_jobs: int,
    init: Mapping[str, Any],
    remote: Mapping[str, Any],
    died: Callable[[], object] = lambda: None,
) -> list[Ending | None]:
    """Call every task on a node that has room for it, each in its own process, so that tasks cannot affect each other.

    Args:
        tasks: tasks in order.
        n_jobs: number of tasks at once on each node. Each task gets this share of the largest node's cores, and one
            GPU for each of its processes, if there are any.
        init: arguments of `ray.init`.
        remote: arguments of `ray.remote`; those that are null follow from `n_jobs`.
        died: called when a process has died.

    Returns:
        For each task how its process died; None if it returned.

    Raises:
        ConfigError: a job requests more than this machine has. (On a running cluster, jobs wait for resources instead.)
    """
    ray.init(**{"include_dashboard": False, "log_to_driver": False, "logging_level": logging.WARNING} | dict(init))
    try:
        # By default, Ray runs a killed job three more times, and reuses a worker with what a job left in its memory.
        options = _resources(n_jobs, remote, init.get("address") or os.environ.get("RAY_ADDRESS"))
        options |= {"max_retries": 0, "max_calls": 1}
        call = ray.remote(**options)(_call)
        with handle_signals():  # ray.init has installed its own signal handler
            object_refs = [
                call.options(num_gpus=options["num_gpus"] * task.processes).remote(
                    task.call, task.folder / OUTPUT_FILE, Path.cwd()
                )
                for task in tasks
            ]
            endings: dict[Any, Ending | None] = {}
            try:
                while len(endings) < len(object_refs):
                    done, _ = ray.wait([ref for ref in object_refs if ref not in endings])
                    endings |= {ref: _ending(ref) for ref in done}
                    if any(endings[ref] for ref in done):
                        died()
                return [endings[ref] for ref in object_refs]
            except BaseException:  # on Ctrl-C or SIGTERM, give the jobs time to record that they were killed
                for ref in object_refs:
                    ray.cancel(ref)
                ray.wait(object_refs, num_returns=len(object_refs), timeout=GRACE_SECONDS)
                raise
    finally:
        ray.shutdown()


def _resources(n_jobs: int, remote: Mapping[str, Any], cluster: str | None) -> dict[str, Any]:
    """Return the arguments of `ray.remote` for one of `n_jobs` tasks on a node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores, gpus = (max(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    share = {"num_cpus": max(1, int(cores) // n_jobs), "num_gpus": int(gpus > 0)}
    requested = share | {key: value for key, value in remote.items() if value is not None}
    # Without this check Ray would wait forever.
    if not cluster and (requested["num_cpus"] > cores or requested["num_gpus"] > gpus):
        raise ConfigError(
            f"hydra.launcher.remote: a job requests {requested['num_cpus']} CPUs and {requested['num_gpus']} GPUs; "
            f"this machine has {cores:.0f} and {gpus:.0f}"
        )
    return requested


def _call(pickled: bytes, output: Path, folder: Path) -> None:
    """Call the task; runs in the job's process."""
    # Must be set before torch is imported; Ray itself sets OMP_NUM_THREADS.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import cloudpickle

    write_into(output)
    os.chdir(folder)
    cloudpickle.loads(pickled)()


def _ending(object_ref: Any) -> Ending | None:
    try:
        ray.get(object_ref)
    except OutOfMemoryError as error:
        return Ending("oom", first_line(error))
    except RayTaskError as error:
        return Ending("error", f"{type(error.cause).__name__}: {error.cause}")
    except RayError as error:
        return Ending("killed", f"the process died: {type(error).__name__}")
    return None
