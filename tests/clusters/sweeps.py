"""What the checks on each cluster share: a sweep's command, and what MLflow knows of it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from support import QUICK

from qlora_exp.tracking.journal import metrics
from qlora_exp.tracking.mlflow_store import client


def command(store: str, experiment: str, *more: str) -> list[str]:
    where = [f"tracking.uri={store}", f"tracking.experiment_name={experiment}", "evaluation=loss_only", "method=lora"]
    return [sys.executable, "-m", "qlora_exp", "train", "-m", *QUICK, *where, *more]


def runs(store: str, experiment: str):
    mlflow = client(store)
    found = mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id])
    parents = [run for run in found if "sweep.keys" in run.data.tags]
    return parents, [run for run in found if "run_key" in run.data.tags]


SHARED = ["distributed=ddp", "distributed.num_processes=2"]
LONG = ["seed=1", "training.max_steps=300", "training.save_strategy=steps", "training.save_steps=10"]


def kill_second_rank(process: subprocess.Popen, folder: Path) -> None:
    """Kill rank 1 of the only job of a sweep, once it has a checkpoint."""
    while not list(folder.glob("multirun/*/*/checkpoints/checkpoint-*/trainer_state.json")):
        time.sleep(0.2)
        assert process.poll() is None, process.communicate()[0]
    (log,) = folder.glob("multirun/*/*/ranks/1.log")
    found = re.search(r"rank 1 of 2 is process (\d+)", log.read_text("utf-8"))
    assert found is not None
    os.kill(int(found[1]), signal.SIGKILL)


def check_job_of_two_processes(words: list[str], store: str, experiment: str, folder: Path) -> None:
    """Start a sweep whose job has two processes, kill one, and start it again."""
    begin = time.monotonic()
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        kill_second_rank(process, folder)
        assert process.wait(300) == 1, process.communicate()[0]
    _, (child,) = runs(store, experiment)
    assert (child.info.status, child.data.tags["outcome"]) == ("FAILED", "error")
    assert "rank 1: its process " in child.data.tags["failure"]
    print(f"rank 1 killed; the sweep ended {time.monotonic() - begin:.0f} s after its start")
    again = subprocess.run(
        [*words, "sweep.rerun=failed"], capture_output=True, text=True, check=False, cwd=folder, timeout=500
    )
    assert again.returncode == 0, again.stderr
    _, children = runs(store, experiment)
    assert sorted(run.data.tags["outcome"] for run in children) == ["error", "ok"]
    (done,) = [run for run in children if run.data.tags["outcome"] == "ok"]
    assert done.data.params["resolved.num_processes"] == "2"


def steps_told(folder: Path) -> list[int]:
    return [one["step"] for one in metrics(folder) if "train/loss" in one]
