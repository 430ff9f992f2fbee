"""Sweeps whose jobs share a base model in one process: each job's result is what it is alone."""

import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import processes
from safetensors.torch import load_file
from support import QUICK, exit_code

from qlora_exp.tracking.journal import last_message

MORE = ["evaluation=loss_only", "method.lora_dropout=0.1", "training.gradient_accumulation_steps=2"]


@pytest.fixture
def sweep(mlflow_uri, request):
    """Run a sweep, and give the folder of each job by its swept value."""

    def run(*words: str, code: int = 0) -> dict[str, Path]:
        name = request.node.originalname
        tracked = [f"tracking.uri={mlflow_uri}", f"tracking.experiment_name={name}"]
        assert exit_code("train", "-m", *QUICK, *MORE, *tracked, "sweep.name=fused", *words) == code
        folders = [file.parent for file in Path("multirun/fused").glob("*/job.json")]
        return {folder.name.rsplit("_", 1)[0].rsplit("-", 1)[1]: folder for folder in folders}

    return run


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "adapter_model.safetensors")


@pytest.mark.long
def test_jobs_by_turns_learn_bit_for_bit_what_they_learn_alone_though_one_diverges(sweep, run_quick, capfd):
    folders = sweep("method=qlora", "training.learning_rate=1e-3,3e-3,1e30", "sweep.fuse=8", code=1)
    shown = capfd.readouterr().out
    assert "group 1: 3 jobs, by turns" in shown
    outcomes = {rate: last_message(folder)["outcome"] for rate, folder in folders.items()}
    assert outcomes == {"0.001": "ok", "0.003": "ok", "1e+30": "nan"}
    assert not (folders["1e+30"] / "model").exists()
    assert "step 2 of 3" in (folders["0.003"] / "output.log").read_text()
    for rate in ("0.001", "0.003"):
        alone = run_quick(*MORE, "method=qlora", f"training.learning_rate={rate}")
        ours, theirs = adapter(folders[rate]), adapter(alone.output_dir)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert last_message(folders[rate])["metrics"]["after/loss"] == alone.metrics["after/loss"]


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_jobs_whose_rows_go_through_the_base_together_learn_the_same_but_for_rounding(sweep, run_quick, method: str):
    words = [f"method={method}", "training.learning_rate=1e-2"]
    folders = sweep(*words, "method.r=2,4,16", "sweep.fuse=auto", "sweep.fused_rows=true")
    for r, folder in folders.items():
        alone = run_quick(*MORE, *words, f"method.r={r}")
        ours, theirs = adapter(folder), adapter(alone.output_dir)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
        assert last_message(folder)["metrics"]["after/loss"] == pytest.approx(alone.metrics["after/loss"], rel=1e-5)


@pytest.mark.thorough
def test_jobs_of_a_killed_group_resume_from_their_checkpoints(mlflow_uri, run_quick):
    words = ["training.max_steps=60", "training.save_strategy=steps", "training.save_steps=4", "method=lora"]
    command = ["train", "-m", *QUICK, *MORE, *words, "method.r=2,4", "sweep.fuse=2", "sweep.name=fused"]
    command.append(f"tracking.uri={mlflow_uri}")
    process = processes.start(processes.command, command)
    folder = Path("multirun/fused")

    def begun() -> list[Path]:
        return [*folder.glob("*/checkpoints/checkpoint-8")]

    wait_until(lambda: len(begun()) == 2)
    (group,) = [
        each
        for each in psutil.Process().children(recursive=True)
        if str(folder.resolve()) in " ".join(file.path for file in each.open_files()) and each.pid != process.pid
    ]
    group.kill()
    process.join(120)
    assert process.exitcode == 1
    assert {last_message(file.parents[1])["outcome"] for file in begun()} == {"killed"}
    assert exit_code(*command) == 0
    for file in begun():
        job = file.parents[1]
        assert "resuming from" in (job / "output.log").read_text()
        r = job.name.split("_")[0].removeprefix("r-")
        ours, theirs = adapter(job), adapter(run_quick(*MORE, *words, f"method.r={r}").output_dir)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def wait_until(done) -> None:
    for _ in range(600):
        if done():
            return
        time.sleep(0.2)
    raise TimeoutError


@pytest.mark.parametrize("launcher", ["slurm", "joblib"])
def test_other_launchers_refuse_fused_jobs_before_anything_runs(launcher: str, capfd):
    assert exit_code("train", "-m", *QUICK, "seed=1,2", "sweep.fuse=auto", f"hydra/launcher={launcher}") == 1
    assert "sweep.fuse: only hydra/launcher=local" in capfd.readouterr().err
