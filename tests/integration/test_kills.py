"""Processes that are killed lose nothing that was recorded."""

import signal
import subprocess
import sys
import time

import pytest
from helpers.tracking import start_run
from support import QUICK, take_interrupts

from qlora_exp.tracking.journal import metrics
from qlora_exp.tracking.mlflow_store import client


def test_run_of_a_dead_process_is_marked_killed_by_the_next_run(mlflow_uri, mlflow_client, tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from qlora_exp.tracking import tracker\n"
        "from qlora_exp.config.hydra_compose import compose\n"
        f"with tracker.start(compose(['tracking.uri={mlflow_uri}']), Path({str(tmp_path)!r})) as t:\n"
        "    print(t.run_id, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    assert mlflow_client.get_run(died).info.status == "RUNNING"
    with start_run(mlflow_uri, tmp_path / "next") as tracked:
        assert mlflow_client.get_run(tracked.run_id).info.status == "RUNNING"
        assert mlflow_client.get_run(died).info.status == "KILLED"


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_train_command_ended_by_a_signal_is_recorded_as_killed(signal_name: str, mlflow_uri, mlflow_client, tmp_path):
    words = [*QUICK, "training.max_steps=100000", "evaluation=loss_only", f"tracking.uri={mlflow_uri}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_exp", "train", *words, f"hydra.run.dir={tmp_path / 'killed'}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=take_interrupts,
    )
    for _ in range(600):
        if any("train/loss" in one for one in metrics(tmp_path / "killed")):
            break
        time.sleep(0.2)
    process.send_signal(getattr(signal, signal_name))
    assert process.wait(60) == 130
    run_id = (tmp_path / "killed" / "run.log").read_text().split("run ", 1)[1].split()[0]
    run = mlflow_client.get_run(run_id)
    assert (run.info.status, run.data.tags["outcome"]) == ("KILLED", "killed")
    assert run.data.metrics["train/loss"] > 0


def test_killed_run_resumes_from_its_checkpoint_with_equal_results(
    run_quick, read_losses, make_config, mlflow_uri, tmp_path
):
    from qlora_exp.recipe.finetune import run

    saving = ["training.max_steps=6", "training.save_strategy=steps", "training.save_steps=2", "method=qlora"]
    whole = run_quick(*saving)
    words = [*QUICK, *saving, f"tracking.uri={mlflow_uri}"]
    killed = f"""
import os, signal
from qlora_exp.training.trainer import Watcher
mark = Watcher.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    mark(self, args, state, control, **kwargs)
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Watcher.on_step_end = on_step_end
import qlora_exp
qlora_exp.train(qlora_exp.compose({words!r}), {str(tmp_path / "killed")!r})
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False, capture_output=True).returncode == -9
    resumed = run(make_config(*saving, f"tracking.uri={mlflow_uri}"), tmp_path / "killed")
    assert read_losses(resumed) == read_losses(whole)
    assert resumed.metrics["after/loss"] == whole.metrics["after/loss"]
    tokens = [
        [one["train/num_tokens"] for one in metrics(each.output_dir) if "train/num_tokens" in one]
        for each in (resumed, whole)
    ]
    assert tokens[0] == tokens[1]
    found = client(mlflow_uri)
    points = found.get_metric_history(resumed.run_id, "train/loss")
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
    assert found.get_run(resumed.run_id).info.status == "FINISHED"
