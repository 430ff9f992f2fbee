"""A sweep on a real SLURM cluster: one node on this machine, by `cluster.sh`. Only `nox -s slurm` runs this."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import QUICK

from qlora_exp.journal import metrics
from qlora_exp.store import client

CLUSTER = Path(__file__).parent / "cluster.sh"
SLURM = [
    "hydra/launcher=submitit_slurm", "hydra.launcher.partition=main", "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=4", "hydra.launcher.timeout_min=20",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # the database has a user of its own
        subprocess.run(["bash", str(CLUSTER), "start", folder], check=True, timeout=120)
        yield
        subprocess.run(["bash", str(CLUSTER), "stop", folder], check=True, timeout=60)


def sweep(store: str, experiment: str, *more: str) -> list[str]:
    where = [f"tracking.uri={store}", f"tracking.experiment_name={experiment}", "evaluation=loss_only", "method=lora"]
    return [sys.executable, "-m", "qlora_exp", "train", "-m", *SLURM, *QUICK, *where, *more]


def runs(store: str, experiment: str):
    mlflow = client(store)
    found = mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id])
    parents = [run for run in found if "sweep.keys" in run.data.tags]
    return parents, [run for run in found if "run_key" in run.data.tags]


def test_jobs_end_as_they_do_on_this_machine(store, tmp_path):
    words = sweep(store, "slurm", "training.max_length=5,300,400")
    for _ in range(2):
        result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=400)
        assert result.returncode == 1
        assert "1 of 3 jobs did not end well" in result.stderr
    assert result.stdout.count("done in") == 2
    (parent,), children = runs(store, "slurm")
    assert sorted(run.data.tags["outcome"] for run in children) == ["error", "ok", "ok"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"


@pytest.mark.parametrize("how", ["scancel", "kill -9"])
def test_a_job_that_is_cut_off_is_recorded_and_would_go_on(how: str, store, tmp_path):
    name = how.replace(" ", "")
    words = sweep(
        store, name, "seed=1,2", "training.max_steps=4000", "training.save_strategy=steps", "training.save_steps=10"
    )
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        begun: list[Path] = []
        while not begun:
            time.sleep(1)
            assert process.poll() is None
            begun = list(tmp_path.glob("multirun/*/seed-1*/checkpoints/checkpoint-*/trainer_state.json"))
        if how == "scancel":
            subprocess.run(["scancel", "--user", "root"], check=True)
        else:
            subprocess.run(["pkill", "-9", "-f", "submitit.core._submit"], check=True)
        assert process.wait(200) == 1
    parents, children = runs(store, name)
    assert {run.data.tags["outcome"] for run in children} == {"killed"}
    assert {run.info.status for run in (*parents, *children)} <= {"KILLED", "FINISHED"}

    shown = subprocess.run([*words, "--dry-run"], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "was cut off; from step" in shown
    (folder,) = tmp_path.glob("multirun/*/seed-1*")
    told = [one["step"] for one in metrics(folder) if "train/loss" in one]
    assert told == list(range(1, len(told) + 1))
