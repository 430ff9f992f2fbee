"""A sweep on Ray's own cluster on this machine. Only `nox -s ray` runs this."""

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from clusters.sweeps import LONG, SHARED, check_job_of_two_processes, command, runs, steps_told
from ray.cluster_utils import Cluster

RAY = ["hydra/launcher=ray", "sweep.n_jobs=2"]
SAVING = ["seed=1,2", "training.max_steps=200", "training.save_strategy=steps", "training.save_steps=10"]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    yield
    deadline = time.monotonic() + 30
    while (left := [one for one in psutil.process_iter(["name"]) if "raylet" in (one.info["name"] or "")]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.5)
    assert not left


def begin(words: Sequence[str], folder: Path) -> subprocess.Popen:
    """Started, and come as far as the first job's first checkpoint."""
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(folder.glob("multirun/*/seed-1*/checkpoints/checkpoint-*/trainer_state.json")):
        time.sleep(0.2)
        assert process.poll() is None, process.communicate()[0]
    return process


def goes_on(words: Sequence[str], store: str, experiment: str, folder: Path) -> str:
    """Started again it runs to its end, every step is there once and every job one run; what it printed."""
    again = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder, timeout=500)
    assert again.returncode == 0, again.stderr
    for job in folder.glob("multirun/*/seed-*"):
        assert steps_told(job) == list(range(1, 201))
    parents, children = runs(store, experiment)
    assert [run.data.tags["outcome"] for run in children] == ["ok", "ok"]
    assert "RUNNING" not in {run.info.status for run in parents}
    return again.stdout


def test_jobs_end_like_local_jobs(mlflow_uri, tmp_path):
    words = command(mlflow_uri, "ray", *RAY, "training.max_length=5,300,400")
    for _ in range(2):
        result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=400)
        assert result.returncode == 1
        assert "1 of 3 jobs did not end well" in result.stderr
        assert "Traceback" not in result.stderr
    assert result.stdout.count("done in") == 2
    (parent,), children = runs(mlflow_uri, "ray")
    assert sorted(run.data.tags["outcome"] for run in children) == ["error", "ok", "ok"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"
    for log in tmp_path.glob("multirun/*/max_length-300*/output.log"):
        assert "run " in log.read_text("utf-8")


def test_killed_job_runs_once_and_resumes_on_request(mlflow_uri, tmp_path):
    words = command(mlflow_uri, "killed", *RAY, *SAVING)
    with begin(words, tmp_path) as process:
        workers = [one for one in psutil.Process(process.pid).children(True) if one.name().startswith("ray::_call")]
        assert len(workers) == 2
        workers[0].kill()
        assert process.wait(300) == 1
    _, children = runs(mlflow_uri, "killed")
    assert sorted(run.data.tags["outcome"] for run in children) == ["killed", "ok"]
    assert "was interrupted" in goes_on(words, mlflow_uri, "killed", tmp_path)


def test_killed_sweep_resumes(mlflow_uri, tmp_path):
    words = command(mlflow_uri, "sweep", *RAY, *SAVING)
    with begin(words, tmp_path) as process:
        process.kill()
    assert "was interrupted; resumes from step" in goes_on(words, mlflow_uri, "sweep", tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_sweep_is_recorded_and_resumes(number: signal.Signals, mlflow_uri, tmp_path):
    words = command(mlflow_uri, number.name, *RAY, *SAVING)
    with begin(words, tmp_path) as process:
        process.send_signal(number)
        assert process.wait(120) == 130
    parents, children = runs(mlflow_uri, number.name)
    assert {run.info.status for run in (*parents, *children)} == {"KILLED"}
    assert "was interrupted; resumes from step" in goes_on(words, mlflow_uri, number.name, tmp_path)


def test_job_of_two_processes_ends_as_one_and_runs_again(mlflow_uri, tmp_path):
    words = command(mlflow_uri, "two", "hydra/launcher=ray", *SHARED, *LONG)
    check_job_of_two_processes(words, mlflow_uri, "two", tmp_path)


@pytest.fixture
def two_nodes():
    """A cluster of two nodes, which are on this machine; its address."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


def test_job_on_two_nodes_ends_as_one_and_runs_again(two_nodes: str, mlflow_uri, tmp_path):
    words = command(mlflow_uri, "nodes", "hydra/launcher=ray", "hydra.launcher.nodes=2", *SHARED, *LONG)
    check_job_of_two_processes([*words, f"hydra.launcher.init.address='{two_nodes}'"], mlflow_uri, "nodes", tmp_path)
    (job,) = [file.parent for file in tmp_path.glob("multirun/*/*/output.1.log") if ".1" not in file.parent.name]
    _, children = runs(mlflow_uri, "nodes")
    (done,) = [run for run in children if run.data.tags["outcome"] == "ok"]
    assert ": 2 x " in done.data.params["resolved.topology"]  # both nodes are this machine
    assert steps_told(job) == list(range(1, 301))


def test_job_gets_its_time_limit(mlflow_uri, tmp_path):
    words = command(mlflow_uri, "late", *RAY, "seed=1", "training.max_steps=100000", "sweep.timeout_minutes=0.3")
    result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=200)
    assert result.returncode == 1
    _, (child,) = runs(mlflow_uri, "late")
    assert child.data.tags["outcome"] == "timeout"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("hydra.launcher.remote.num_cpus=999", "a job requests 999 CPUs and 0 GPUs; this machine has"),
        ("hydra.launcher.init.address=auto", "Could not find any running Ray instance"),
        ("+hydra.launcher.remote.num_cpu=1", "Invalid option keyword num_cpu"),
        ("hydra.launcher.nodes=2", "hydra.launcher.nodes=2: 1 processes of a job cannot be shared equally"),
    ],
)
def test_unsupported_settings_are_rejected_at_once(wrong: str, message: str, mlflow_uri, tmp_path):
    words = command(mlflow_uri, "wrong", *RAY, "seed=1,2", wrong)
    result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=100)
    assert result.returncode == 1
    assert message in result.stdout
    assert "Traceback" not in result.stderr
    assert result.stdout.count("not started") == 2
