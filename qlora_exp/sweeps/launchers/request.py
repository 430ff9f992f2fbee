"""Check what jobs ask of a SLURM cluster, before they are submitted."""

from collections.abc import Mapping
from typing import Any

from qlora_exp.config.schema import Config
from qlora_exp.sweeps.jobs import processes
from qlora_exp.utils.errors import ConfigError

_ASKS = "hydra.launcher.parameters"


def check(config: Config, cluster: str, parameters: Mapping[str, Any]) -> str:
    """Check that SLURM starts one process for a job, or all the processes of its run, and that each has a GPU.

    Args:
        config: config of the job.
        cluster: `slurm`, or `local` for processes on this machine.
        parameters: parameters of submitit.

    Returns:
        A warning; empty if there is none.

    Raises:
        ConfigError: the processes are others, or have too few GPUs.
    """
    nodes, tasks_per_node = (int(parameters.get(name) or 1) for name in ("nodes", "tasks_per_node"))
    started, own = nodes * tasks_per_node, processes(config)
    if started > 1:
        asked = f"{_ASKS}: nodes={nodes} and tasks_per_node={tasks_per_node} start {started} processes"
        if cluster != "slurm":
            raise ConfigError(
                f"{asked} of a job, which only SLURM can do; leave them out, or use hydra.launcher.cluster=slurm"
            )
        if own != started:
            raise ConfigError(
                f"{asked} of a job, and a job here has {own}: set distributed=ddp or fsdp, "
                f"distributed.num_processes={started} and distributed.num_machines=1"
            )
    if config.device == "cpu" or cluster != "slurm":
        return ""
    gpus, on_a_node = parameters.get("gpus_per_node"), own // nodes
    if isinstance(gpus, int) and 0 < gpus < on_a_node:
        raise ConfigError(
            f"{_ASKS}.gpus_per_node={gpus}: a job here has {on_a_node} processes on a node, and each needs a GPU; "
            f"set it to {on_a_node}, or distributed.num_processes={gpus * nodes}"
        )
    wanted = {**parameters, **(parameters.get("slurm_additional_parameters") or {})}
    if not any(value for name, value in wanted.items() if "gpu" in name or "gres" in name or "tres" in name):
        return f"jobs ask SLURM for no GPU and use CPUs, unless the partition gives them one: {_ASKS}.gpus_per_node=1"
    return ""


def described(settings: Mapping[str, Any]) -> str:
    """Return what each job asks for, by the settings of the launcher."""
    parameters = settings["parameters"].items()
    asked = " ".join(f"{name}={value}" for name, value in parameters if value not in (None, {}, ""))
    count = settings["max_num_timeout"]
    again = f"is queued again, at most {count} times" if count else "is not queued again"
    return f"each job asks for {asked}; at its time limit it {again} (hydra.launcher.max_num_timeout)"
