"""Say which of the processes of a run this one is, from what torchrun, `accelerate launch` or srun set.

Imports no slow packages: a wrong start is refused within a second.
"""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.utils.errors import ConfigError

OWN_LAUNCH = "qlora_exp"
"""Run id that torch's launcher gets if this package uses it to start the processes of a run."""
_OTHERS = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}
"""Variables of launchers that a run cannot join: Open MPI, MPICH, MVAPICH. Number of processes: rank of this one."""


@dataclass(frozen=True)
class Ranks:
    """Place of this process among the processes of its run."""

    rank: int = 0
    local_rank: int = 0
    """Index of its GPU among those that it sees: its rank on this machine, but 0 if it sees its own GPU only."""
    size: int = 1
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process tracks the run and writes its files."""
        return self.rank == 0

    @property
    def is_first_of_machine(self) -> bool:
        """Whether this process measures what its machine does as a whole."""
        return self.local_rank == 0 and os.environ.get("SLURM_LOCALID", "0") == "0"


def ranks() -> Ranks:
    """Return the place of this process; that of a single process if no launcher started it."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    if not all(os.environ.get(name, "").isdigit() for name in names):
        return Ranks()
    return Ranks(*(int(os.environ[name]) for name in names))


def hides_bars() -> bool | None:
    """Return the `disable` of tqdm's bars here: only the main process shows them, and none without a terminal."""
    return None if ranks().is_main else True


def is_launched() -> bool:
    """Check whether a launcher started this process as one of a run, perhaps the only one."""
    return os.environ.get("LOCAL_RANK", "-1") != "-1" or _of_srun(os.environ) is not None


def take_place(config: DistributedConfig) -> None:
    """Check how this process was started; of srun's variables, make those that torch reads.

    Raises:
        ConfigError: a launcher started several processes, and the config does not share the run, or differs from it.
    """
    for size, rank in _OTHERS.items():
        if int(os.environ.get(size) or 1) > 1:
            _refuse(os.environ[size], os.environ.get(rank, "0"), "torchrun or srun can start several processes")
    if (srun := _of_srun(os.environ)) is not None and "WORLD_SIZE" not in os.environ:
        if config.engine == "none":
            _refuse(srun["WORLD_SIZE"], srun["RANK"], _ADVICE)
        os.environ.update(srun | _meeting_point(os.environ))
    if os.environ.get("LOCAL_RANK", "-1") == "-1":
        return
    place = ranks()
    if config.engine == "none":
        _refuse(str(place.size), str(place.rank), _ADVICE)
    if config.num_processes not in ("auto", place.size):
        raise ConfigError(
            f"distributed.num_processes={config.num_processes}, but the launcher started {place.size} processes: "
            "leave it out, or start as many"
        )
    if config.num_machines > 1 and os.environ.get("TORCHELASTIC_RUN_ID") != OWN_LAUNCH:
        raise ConfigError(
            "distributed.num_machines is for runs that start their processes themselves; here a launcher started them"
        )


_ADVICE = (
    "choose distributed=ddp or fsdp to share the run, or start it without a launcher. A sweep with sweep.n_jobs=NUMBER "
    "uses one GPU for each job"
)


def _refuse(size: str, rank: str, advice: str) -> None:
    if rank != "0":
        raise ConfigError(f"process {rank} of {size}: refused, for the reason that process 0 gives")
    raise ConfigError(
        f"this is process 0 of {size} that a launcher started (torchrun, accelerate launch, srun, mpirun), and each "
        f"would train the same run: {advice}"
    )


def _of_srun(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return torch's variables for a process of an srun step with several tasks; None if it is none."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if not tasks.isdigit() or int(tasks) < 2 or "SLURM_PROCID" not in environment:
        return None
    # With --gpus-per-task a process sees its own GPU only, as the first one.
    own_gpu = "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
    on_this_machine = environment.get("SLURM_STEP_TASKS_PER_NODE", tasks).split("(")[0].split(",")[0]
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": "0" if own_gpu else environment.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": on_this_machine,
    }


def _meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the address and port where the processes of an srun step meet: its first machine, a port of its number."""
    words = ["scontrol", "show", "hostnames", environment.get("SLURM_STEP_NODELIST", "")]
    try:
        hosts = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"srun: cannot list the machines of this step ({error}); set MASTER_ADDR, or use torchrun"
        ) from error
    number = int(environment.get("SLURM_JOB_ID", "0")) * 100 + int(environment.get("SLURM_STEP_ID", "0"))
    port = str(20000 + number % 30000)
    return {
        "MASTER_ADDR": environment.get("MASTER_ADDR", hosts[0]),
        "MASTER_PORT": environment.get("MASTER_PORT", port),
    }
