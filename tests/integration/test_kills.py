"""Processes that are killed lose nothing that was recorded."""

import logging
import os
import signal
import time

import pytest
from helpers import processes
from helpers.tracking import start_run
from support import QUICK

from qlora_exp.tracking.journal import metrics
from qlora_exp.tracking.mlflow_store import client


def test_run_of_a_dead_process_is_marked_killed_by_the_next_run(mlflow_uri, mlflow_client, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)  # why it was not, if it was not
    process = processes.start(processes.killed_after_its_start, [f"tracking.uri={mlflow_uri}"], tmp_path / "dead")
    process.join()
    died = (tmp_path / "dead.id").read_text()
    assert mlflow_client.get_run(died).info.status == "RUNNING"
    for again in range(5):  # a process of another test may be ending it at the same moment, and be killed itself
        with start_run(mlflow_uri, tmp_path / f"next{again}") as tracked:
            assert mlflow_client.get_run(tracked.run_id).info.status == "RUNNING"
        if mlflow_client.get_run(died).info.status == "KILLED":
            break
    assert mlflow_client.get_run(died).info.status == "KILLED"


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_train_command_ended_by_a_signal_is_recorded_as_killed(signal_name: str, mlflow_uri, mlflow_client, tmp_path):
    words = [*QUICK, "training.max_steps=100000", "evaluation=loss_only", f"tracking.uri={mlflow_uri}"]
    process = processes.start(processes.command, ["train", *words, f"hydra.run.dir={tmp_path / 'killed'}"])
    for _ in range(600):
        if any("train/loss" in one for one in metrics(tmp_path / "killed")):
            break
        time.sleep(0.2)
    os.kill(process.pid, getattr(signal, signal_name))
    process.join(60)
    assert process.exitcode == 130
    run_id = (tmp_path / "killed" / "run.log").read_text().split("run ", 1)[1].split()[0]
    run = mlflow_client.get_run(run_id)
    assert (run.info.status, run.data.tags["outcome"]) == ("KILLED", "killed")
    assert run.data.metrics["train/loss"] > 0
    saved = [file.name for file in (tmp_path / "killed").glob("checkpoints/checkpoint-*")]
    last = max(one["step"] for one in metrics(tmp_path / "killed") if "train/loss" in one)
    # A scheduler sends SIGTERM, and the step that it interrupts is finished and saved; Ctrl-C ends at once.
    assert saved == ([f"checkpoint-{last}"] if signal_name == "SIGTERM" else [])


def test_killed_run_resumes_from_its_checkpoint_with_equal_results(
    run_quick, read_losses, make_config, mlflow_uri, tmp_path
):
    from qlora_exp.recipe.finetune import run

    saving = ["training.max_steps=6", "training.save_strategy=steps", "training.save_steps=2", "method=qlora"]
    whole = run_quick(*saving)
    words = [*QUICK, *saving, f"tracking.uri={mlflow_uri}"]
    process = processes.start(processes.killed_at_step, 5, words, tmp_path / "killed")
    process.join()
    assert process.exitcode == -signal.SIGKILL
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
