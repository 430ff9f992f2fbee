"""A sweep on a real SLURM cluster: one node on this machine, by `cluster.sh`. Only `nox -s slurm` runs this."""

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from clusters.sweeps import LONG, SHARED, check_job_of_two_processes, command, runs, steps_told

CLUSTER = Path(__file__).parent / "cluster.sh"
SLURM = [
    "hydra/launcher=slurm", "hydra.launcher.parameters.slurm_partition=main",
    "hydra.launcher.parameters.cpus_per_task=1", "hydra.launcher.parameters.mem_gb=4",
    "hydra.launcher.parameters.timeout_min=20",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # the database has a user of its own
        subprocess.run(["bash", str(CLUSTER), "start", folder], check=True, timeout=120)
        os.environ["SLURM_CONF"] = f"{folder}/etc/slurm.conf"
        yield
        subprocess.run(["bash", str(CLUSTER), "stop", folder], check=True, timeout=60)


def test_jobs_end_like_local_jobs(mlflow_uri, tmp_path):
    words = command(mlflow_uri, "slurm", *SLURM, "training.max_length=5,300,400")
    for _ in range(2):
        result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=400)
        assert result.returncode == 1
        assert "1 of 3 jobs did not end well" in result.stderr
    assert result.stdout.count("done in") == 2
    (parent,), children = runs(mlflow_uri, "slurm")
    assert sorted(run.data.tags["outcome"] for run in children) == ["error", "ok", "ok"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"


def job_process(number: int) -> psutil.Process:
    """Of a job of the array that runs."""
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = "submitit.core._submit" in one.cmdline() and one.name().startswith("python")
            if ours and one.environ().get("SLURM_ARRAY_TASK_ID") == str(number):
                return one
    raise LookupError(number)


@pytest.mark.parametrize("how", ["scancel", "kill -9"])
def test_preempted_job_is_recorded_and_resumes(how: str, mlflow_uri, tmp_path):
    name = how.replace(" ", "")
    words = command(
        mlflow_uri, name, *SLURM, "seed=1,2", "training.max_steps=300", "training.save_strategy=steps",
        "training.save_steps=10",
    )  # fmt: skip
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        begun: list[Path] = []
        while not begun:
            time.sleep(0.2)
            assert process.poll() is None
            begun = list(tmp_path.glob("multirun/*/seed-1*/checkpoints/checkpoint-*/trainer_state.json"))
        victim = job_process(0)
        if how == "scancel":
            environment = victim.environ()
            subprocess.run(["scancel", f"{environment['SLURM_ARRAY_JOB_ID']}_0"], check=True)
        else:
            victim.kill()
        assert process.wait(300) == 1
    parents, children = runs(mlflow_uri, name)
    assert sorted(run.data.tags["outcome"] for run in children) == ["killed", "ok"]  # the other one was left alone
    assert {run.info.status for run in (*parents, *children)} == {"KILLED", "FINISHED"}
    (folder,) = tmp_path.glob("multirun/*/seed-1*")
    before = steps_told(folder)
    assert before == list(range(1, len(before) + 1))
    assert len(before) < 300

    again = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=500)
    assert again.returncode == 0, again.stderr
    assert "was interrupted; resumes from step" in again.stdout
    assert steps_told(folder) == list(range(1, 301))
    _, resumed = runs(mlflow_uri, name)
    assert {run.info.run_id for run in children} <= {run.info.run_id for run in resumed}
    assert [run.data.tags["outcome"] for run in resumed] == ["ok", "ok"]


def test_job_of_two_processes_ends_as_one_and_runs_again(mlflow_uri, tmp_path):
    own = [word.replace("cpus_per_task=1", "cpus_per_task=2") for word in SLURM]
    words = command(mlflow_uri, "two", *own, *SHARED, *LONG)
    check_job_of_two_processes(words, mlflow_uri, "two", tmp_path)


def test_job_whose_processes_slurm_starts_is_one_run_and_ends_as_one(mlflow_uri, tmp_path):
    words = command(mlflow_uri, "tasks", *SLURM, "hydra.launcher.parameters.tasks_per_node=2", *SHARED, *LONG)
    check_job_of_two_processes(words, mlflow_uri, "tasks", tmp_path)


def test_run_takes_the_processes_of_srun(mlflow_uri, tmp_path):
    single = [word for word in command(mlflow_uri, "srun", "distributed=ddp") if word != "-m" or word == "qlora_exp"]
    at = single.index("qlora_exp")
    words = ["srun", "-n", "2", "-c", "1", *single[:at], "-m", *single[at:]]
    result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=400)
    assert result.returncode == 0, result.stderr
    mlflow_runs = runs(mlflow_uri, "srun")[1]
    assert [run.info.status for run in mlflow_runs] == ["FINISHED"]
    assert mlflow_runs[0].data.params["resolved.num_processes"] == "2"
    assert len(list(tmp_path.glob("outputs/*/*"))) == 1


def test_job_that_the_time_limit_ended_is_resumed_by_the_same_command(mlflow_uri, tmp_path):
    own = [word.replace("timeout_min=20", "timeout_min=3") for word in SLURM]  # submitit asks to end 90 s before
    words = command(mlflow_uri, "limit", *own, *LONG[:1], "training.max_steps=100000")  # which saves no checkpoints
    result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=400)
    assert result.returncode == 1
    assert "1 did not finish: the same command resumes them" in result.stderr
    _, (child,) = runs(mlflow_uri, "limit")
    assert (child.info.status, child.data.tags["outcome"]) == ("KILLED", "killed")
    again = subprocess.run([*words, "sweep.dry_run=true"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "was interrupted; resumes from step" in again.stdout
