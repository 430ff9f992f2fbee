"""Jobs on a Ray cluster, the one that runs or one on this machine, each in a worker of its own.

All nodes must see the sweep's folder and have this package installed. Needs the extra `ray`. Knows nothing of what a
job does.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone unless the user asks for it

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from qlora_exp.sweeps.jobs import Ending
from qlora_exp.sweeps.launchers.local import OUTPUT_FILE, Task, write_into
from qlora_exp.utils.errors import ConfigError, first_line
from qlora_exp.utils.signals import GRACE_SECONDS, heeded


def run_all(
    tasks: Sequence[Task],
    n_jobs: int,
    init: Mapping[str, Any],
    remote: Mapping[str, Any],
    died: Callable[[], object] = lambda: None,
) -> list[Ending | None]:
    """Call every task where Ray finds room for it; what one does to its process does not touch the others.

    Args:
        tasks: in order.
        n_jobs: at once on each node; each gets that share of the largest node's cores, and a GPU where there are any.
        init: for `ray.init`.
        remote: for `ray.remote`; null is what follows from `n_jobs`.
        died: called when a process has died.

    Returns:
        For each task how its process ended, None if it returned.

    Raises:
        ConfigError: this machine does not have what a job asks for; of a cluster that runs it is waited for.
    """
    ray.init(**{"include_dashboard": False, "log_to_driver": False, "logging_level": logging.WARNING} | dict(init))
    try:
        # Ray would run a killed job three times more, and reuse a worker with all that a job left in its memory.
        options = _wanted(n_jobs, remote, init.get("address") or os.environ.get("RAY_ADDRESS"))
        options |= {"max_retries": 0, "max_calls": 1}
        call = ray.remote(**options)(_call)
        with heeded():  # ray.init has put its own handler there
            begun = [call.remote(task.call, task.folder / OUTPUT_FILE, Path.cwd()) for task in tasks]
            endings: dict[Any, Ending | None] = {}
            try:
                while len(endings) < len(begun):
                    done, _ = ray.wait([one for one in begun if one not in endings])
                    endings |= {one: _ending(one) for one in done}
                    if any(endings[one] for one in done):
                        died()
                return [endings[one] for one in begun]
            except BaseException:  # Ctrl-C, SIGTERM: the jobs write down that they were killed
                for one in begun:
                    ray.cancel(one)
                ray.wait(begun, num_returns=len(begun), timeout=GRACE_SECONDS)
                raise
    finally:
        ray.shutdown()


def _wanted(n_jobs: int, remote: Mapping[str, Any], cluster: str | None) -> dict[str, Any]:
    """What `ray.remote` takes for one of `n_jobs` on a node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores, gpus = (max(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    share = {"num_cpus": max(1, int(cores) // n_jobs), "num_gpus": int(gpus > 0)}
    wanted = share | {key: value for key, value in remote.items() if value is not None}
    if not cluster and (wanted["num_cpus"] > cores or wanted["num_gpus"] > gpus):  # Ray would wait for ever
        raise ConfigError(
            f"hydra.launcher.remote: a job asks for {wanted['num_cpus']} CPUs and {wanted['num_gpus']} GPUs; "
            f"this machine has {cores:.0f} and {gpus:.0f}"
        )
    return wanted


def _call(pickled: bytes, output: Path, folder: Path) -> None:
    """In the job's process."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch; Ray itself sets OMP_NUM_THREADS
    import cloudpickle

    write_into(output)
    os.chdir(folder)
    cloudpickle.loads(pickled)()


def _ending(begun: Any) -> Ending | None:
    try:
        ray.get(begun)
    except OutOfMemoryError as error:
        return Ending("oom", first_line(error))
    except RayTaskError as error:
        return Ending("error", f"{type(error.cause).__name__}: {error.cause}")
    except RayError as error:
        return Ending("killed", f"the process died: {type(error).__name__}")
    return None
