"""Section `distributed`: how one run is shared by several processes, each with a device of its own."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from qlora_exp.config.sections.base import NonNegative, Section


class DistributedConfig(Section):
    """How one run is shared by several processes. Names are those of `accelerate launch`.

    `qlora-exp train` starts the processes of its machine itself, unless torchrun, `accelerate launch` or srun did.
    """

    name: str = "none"
    """Label of the engine in tables."""
    engine: Literal["none", "ddp", "fsdp", "deepspeed_zero3"] = "none"
    """none: one process. ddp: torch's DistributedDataParallel, where each process has a whole copy of the model. fsdp:
    torch's FSDP2 (`fully_shard`), where each process keeps a part of the model, its gradients and optimizer states.
    deepspeed_zero3: the same with DeepSpeed's ZeRO-3."""
    num_processes: Literal["auto"] | PositiveInt = "auto"
    """Number of processes on all machines together, one for each device. The batch of one optimizer step is as many
    times per_device_train_batch_size * gradient_accumulation_steps. auto: as many as torchrun or srun started, else
    the number of visible GPUs."""
    num_machines: PositiveInt = 1
    """Number of machines. Start the same command on each, with another machine_rank."""
    machine_rank: NonNegative = 0
    """Number of this machine, from 0. Machine 0 tracks the run."""
    main_process_ip: str | None = None
    """Address of machine 0. null: this machine."""
    main_process_port: Annotated[int, Field(ge=1, lt=65536)] | None = None
    """A free port of machine 0. null: chosen on a single machine."""
    ddp_timeout: PositiveInt = 1800
    """Seconds that a process waits for the others before the run fails."""
    cpu_offload: bool = False
    """fsdp, deepspeed_zero3: keep parameters and optimizer states in the CPU's memory while they are not used. Slow,
    and for GPUs."""

    @property
    def shards(self) -> bool:
        """Whether each process has only a part of the model."""
        return self.engine in ("fsdp", "deepspeed_zero3")

    @model_validator(mode="after")
    def _check(self) -> Self:
        several = self.num_machines > 1
        if several and (self.main_process_ip is None or self.main_process_port is None):
            raise ValueError("several machines need main_process_ip and main_process_port, the same on each")
        if self.machine_rank >= self.num_machines:
            raise ValueError(f"machine_rank must be below num_machines={self.num_machines}")
        if isinstance(self.num_processes, int) and self.num_processes % self.num_machines:
            raise ValueError(f"num_processes must be a multiple of num_machines={self.num_machines}")
        return self
