"""How a process was started decides its place in a run, or is refused."""

import os
import subprocess

import pytest

from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.environment.ranks import Ranks, is_launched, ranks, take_place
from qlora_exp.utils.errors import ConfigError

DDP = DistributedConfig(engine="ddp")
TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "0 of 2 .* distributed=ddp"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "1 of 2: refused, for"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "process 0 of 1"),
        ({"LOCAL_RANK": "0"}, "process 0 of 1"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, "process 3 of 4"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "process 1 of 2"),
        ({"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
        ({"LOCAL_RANK": "-1"}, None),
    ],
)  # fmt: skip
def test_run_of_one_process_refuses_a_launcher(environment: dict[str, str], says: str | None, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if says is None:
        take_place(DistributedConfig())
    else:
        with pytest.raises(ConfigError, match=says):
            take_place(DistributedConfig())


def test_shared_run_takes_the_place_that_torchrun_gives(monkeypatch):
    assert ranks() == Ranks()
    assert not is_launched()
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    assert is_launched()
    take_place(DDP)
    take_place(DistributedConfig(engine="ddp", num_processes=4))
    assert ranks() == Ranks(rank=3, local_rank=1, size=4, local_size=2)
    with pytest.raises(ConfigError, match="num_processes=2, but the launcher started 4"):
        take_place(DistributedConfig(engine="ddp", num_processes=2))
    with pytest.raises(ConfigError, match="num_machines is for runs that start"):
        take_place(DistributedConfig(engine="ddp", num_machines=2, main_process_ip="a", main_process_port=1))


def test_shared_run_takes_the_place_that_srun_gives(monkeypatch):
    for key, value in SRUN.items():
        monkeypatch.setenv(key, value)
    for name in (*TORCHRUN, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is set now is undone
        monkeypatch.delenv(name)
    asked = []
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda words, **_: asked.append(words) or subprocess.CompletedProcess(words, 0, "node1\nnode2\n"),
    )
    assert is_launched()
    take_place(DDP)
    assert asked == [["scontrol", "show", "hostnames", "node[1-2]"]]
    assert ranks() == Ranks(rank=3, local_rank=1, size=4, local_size=2)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node1", "20700")


@pytest.mark.parametrize("own", [{"SLURM_GPUS_PER_TASK": "1"}, {"SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=1"}])
def test_process_of_srun_that_sees_its_own_gpu_only_takes_that(own, monkeypatch):
    for key, value in {**SRUN, **own, "MASTER_ADDR": "node1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    for name in TORCHRUN:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 0, "node1\nnode2\n"))
    take_place(DDP)
    assert ranks() == Ranks(rank=3, local_rank=0, size=4, local_size=2)
    assert not ranks().is_first_of_machine  # two of them would count the energy of the machine twice
    monkeypatch.setenv("SLURM_LOCALID", "0")
    assert ranks().is_first_of_machine


def test_mpirun_cannot_share_a_run(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun or srun can"):
        take_place(DDP)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_machines": 2}, "need main_process_ip and main_process_port"),
        ({"machine_rank": 1}, "must be below num_machines=1"),
        ({"num_machines": 2, "main_process_ip": "a", "main_process_port": 9, "num_processes": 3}, "a multiple of"),
    ],
)  # fmt: skip
def test_machines_that_do_not_fit_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        DistributedConfig(engine="ddp", **values)
