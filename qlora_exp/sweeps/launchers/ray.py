"""Run jobs on a Ray cluster (a running one, or one started on this machine), each in a worker of its own.

All nodes must see the sweep's folder and have this package installed. Needs the extra `ray`. This module is
independent of what a job does.
"""

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics unless the user asks for it

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

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
    nodes: int = 1,
    died: Callable[[], object] = lambda: None,
) -> list[Ending | None]:
    """Call every task on a node that has room for it, each in its own process, so that tasks cannot affect each other.

    Args:
        tasks: tasks in order.
        n_jobs: number of tasks at once on each node. Each task gets this share of the largest node's cores, and one
            GPU for each of its processes, if there are any.
        init: arguments of `ray.init`.
        remote: arguments of `ray.remote`; those that are null follow from `n_jobs`.
        nodes: number of nodes that share the processes of each task.
        died: called when a process has died.

    Returns:
        For each task how its process died; None if it returned.

    Raises:
        ConfigError: a job requests more than this machine has (on a running cluster, jobs wait for resources instead),
            or nodes cannot share its processes equally.
    """
    if unequal := [task.processes for task in tasks if task.processes % nodes]:
        raise ConfigError(f"hydra.launcher.nodes={nodes}: {unequal[0]} processes of a job cannot be shared equally")
    ray.init(**{"include_dashboard": False, "log_to_driver": False, "logging_level": logging.WARNING} | dict(init))
    try:
        # By default, Ray runs a killed job three more times, and reuses a worker with what a job left in its memory.
        cluster = init.get("address") or os.environ.get("RAY_ADDRESS")
        options = _resources(n_jobs, remote, cluster) | {"max_retries": 0, "max_calls": 1}
        if nodes > 1 and not cluster:
            raise ConfigError(f"hydra.launcher.nodes={nodes} needs a running cluster: set hydra.launcher.init.address")
        with handle_signals():  # ray.init has installed its own signal handler
            jobs = [_start(task, nodes, options) for task in tasks]
            number_of = {ref: number for number, (refs, _) in enumerate(jobs) for ref in refs}
            endings: dict[int, Ending | None] = {}
            try:
                running = list(number_of)
                while running:
                    (done,), running = ray.wait(running)
                    number, ending = number_of[done], _ending(done)
                    if ending and endings.get(number) is None:
                        died()
                        for ref in jobs[number][0]:  # the other nodes cannot end the run without this one
                            ray.cancel(ref)
                    endings[number] = endings.get(number) or ending
                return [endings[number] for number in range(len(jobs))]
            except BaseException:  # on Ctrl-C or SIGTERM, give the jobs time to record that they were killed
                for ref in number_of:
                    ray.cancel(ref)
                ray.wait(list(number_of), num_returns=len(number_of), timeout=GRACE_SECONDS)
                raise
            finally:
                for _, group in jobs:
                    if group is not None:
                        remove_placement_group(group)
    finally:
        ray.shutdown()


def _start(task: Task, nodes: int, options: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """Start a task; return the references of its results, one for each node, and its placement group if it has one."""
    each = dict(options) | {"num_gpus": options["num_gpus"] * task.processes // nodes}
    call = ray.remote(**each)(_call)
    output, folder = task.folder / OUTPUT_FILE, Path.cwd()
    if nodes == 1:
        return [call.remote(task.call, output, folder)], None
    bundle = {"CPU": each["num_cpus"], "GPU": each["num_gpus"]}
    group = placement_group([{kind: count for kind, count in bundle.items() if count}] * nodes, "STRICT_SPREAD")
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index) for index in range(nodes)]
    meeting = ray.remote(num_cpus=0)(_meeting_point).options(scheduling_strategy=places[0]).remote()
    refs = []
    for index, place in enumerate(places):
        words = [f"distributed.num_machines={nodes}", f"distributed.machine_rank={index}"]
        into = output.with_name(f"{output.stem}.{index}{output.suffix}") if index else output
        refs.append(call.options(scheduling_strategy=place).remote(task.call, into, folder, words, meeting))
    return refs, group


def _meeting_point() -> list[str]:
    """Return the overrides that say where the nodes of a job meet: this one, at a port that is free now."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    ip = ray.util.get_node_ip_address()
    return [f"distributed.main_process_ip={ip}", f"distributed.main_process_port={port}"]


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


def _call(pickled: bytes, output: Path, folder: Path, words: Sequence[str] = (), meeting: Sequence[str] = ()) -> None:
    """Call the task, with further overrides on one of several nodes; runs in the job's process."""
    # Must be set before torch is imported; Ray itself sets OMP_NUM_THREADS.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import cloudpickle

    write_into(output)
    os.chdir(folder)
    cloudpickle.loads(pickled)(*words, *meeting)


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
