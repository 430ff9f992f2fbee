"""Sweeps whose jobs share a base model in one process: each job's result is what it is alone."""

import time
from pathlib import Path

import optuna
import psutil
import pytest
import torch
from helpers import processes
from optuna.trial import TrialState
from safetensors.torch import load_file
from support import QUICK, exit_code

from qlora_exp.sweeps import search
from qlora_exp.tracking.journal import last_message, metrics

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


def curve(folder: Path) -> dict[int, float]:
    return {each["step"]: each["eval/loss"] for each in metrics(folder) if "eval/loss" in each}


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


SEARCH = ["hydra/sweeper=optuna", "method=lora", "search.prune=true", "search.pruner=halving", "training.max_steps=6"]
SEARCH += ["training.eval_strategy=steps", "training.eval_steps=2"]


@pytest.mark.long
@pytest.mark.thorough
def test_trials_that_are_stopped_or_diverge_make_room_and_leave_the_others_what_they_are_alone(sweep, run_quick, capfd):
    rates = ["0.01", "0.0001", "0.0002", "1e30"]
    words = [f"training.learning_rate={','.join(rates)}", "search.n_trials=4", "sweep.fuse=2"]
    folders = sweep(*SEARCH, *words, code=1)
    assert "group 1: 4 jobs, 2 at a time, by turns" in capfd.readouterr().out
    ended = {rate: last_message(folder) for rate, folder in folders.items()}
    outcomes = {rate: each["outcome"] for rate, each in ended.items()}
    assert outcomes == {"0.01": "ok", "0.0001": "pruned", "0.0002": "pruned", "1e+30": "nan"}
    alone = run_quick(*MORE, *SEARCH[1:2], *SEARCH[4:], "training.learning_rate=0.01")
    ours, theirs = adapter(folders["0.01"]), adapter(alone.output_dir)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    study = optuna.load_study(study_name=None, storage=search.storage(Path("multirun/fused")))
    (trial,) = (trial for trial in study.trials if trial.state == TrialState.COMPLETE)
    assert trial.value == alone.metrics["after/loss"]
    assert trial.intermediate_values == curve(alone.output_dir)


@pytest.mark.thorough
def test_a_trial_of_tpe_takes_the_place_of_one_that_has_ended(sweep, capfd):
    words = ["hydra/sweeper=optuna", "method=lora", "training.max_steps=2", "evaluation=loss_only"]
    words += ["training.learning_rate=tag(log,interval(1e-4,1e-1))", "method.r=2,4", "search.n_trials=15"]
    sweep(*words, "sweep.fuse=2")
    study = optuna.load_study(study_name=None, storage=search.storage(Path("multirun/fused")))
    trials = study.trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    first = search.STARTUP_TRIALS
    for trial in trials[first:]:
        assert trial.datetime_start > trials[trial.number - 2].datetime_complete
        assert trial.datetime_start < trials[trial.number - 1].datetime_complete
    shown = "".join(capfd.readouterr())
    assert "group 1: 10 jobs, 2 at a time, by turns" in shown
    assert shown.count("jobs in one process") == 1


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["method=lora", "method=qlora", "training.packing=true", "training.padding=free"])
def test_jobs_whose_rows_go_through_the_base_together_learn_the_same_but_for_rounding(sweep, run_quick, kind: str):
    words = [
        "training.learning_rate=1e-2",
        "training.eval_strategy=steps",
        "training.eval_steps=1",
        "method=lora",
        kind,
    ]
    folders = sweep(*words, "method.r=2,4,16", "sweep.fuse=auto", "sweep.fused_rows=true")
    for r, folder in folders.items():
        alone = run_quick(*MORE, *words, f"method.r={r}")
        ours, theirs = adapter(folder), adapter(alone.output_dir)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
        assert last_message(folder)["metrics"]["after/loss"] == pytest.approx(alone.metrics["after/loss"], rel=1e-5)
        curve, curve_alone = (
            [each["eval/loss"] for each in metrics(place) if "eval/loss" in each]
            for place in (folder, alone.output_dir)
        )
        assert curve == pytest.approx(curve_alone, rel=1e-5)
        assert "answers are generated by turns" in (folder / "output.log").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize("asked", [[], [*SEARCH[:3], "search.n_trials=2"]], ids=["sweep", "search"])
def test_jobs_of_a_killed_group_resume_from_their_checkpoints(asked: list[str], mlflow_uri, run_quick):
    words = ["training.max_steps=32", "training.save_strategy=steps", "training.save_steps=4", "method=lora"]
    words += ["training.eval_strategy=steps", "training.eval_steps=10"]
    command = ["train", "-m", *QUICK, *MORE, *words, *asked, "method.r=2,4", "sweep.fuse=2", "sweep.name=fused"]
    command += [f"tracking.uri={mlflow_uri}", f"tracking.experiment_name=killed{len(asked)}"]
    process = processes.start(processes.command, command)
    folder = Path("multirun/fused")

    def begun() -> list[Path]:
        return sorted({file.parents[1] for file in folder.glob("*/checkpoints/checkpoint-*")})

    wait_until(lambda: len(begun()) == 2)
    jobs = begun()
    (group,) = [
        each
        for each in psutil.Process().children(recursive=True)
        if str(folder.resolve()) in " ".join(file.path for file in each.open_files()) and each.pid != process.pid
    ]
    group.kill()
    process.join(120)
    assert process.exitcode == 1
    assert {last_message(job)["outcome"] for job in jobs} == {"killed"}
    assert exit_code(*command) == 0
    for job in jobs:
        assert "resuming from" in (job / "output.log").read_text()
        r = job.name.split("_")[0].removeprefix("r-")
        alone = run_quick(*MORE, *words, f"method.r={r}")
        ours, theirs = adapter(job), adapter(alone.output_dir)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert last_message(job)["metrics"]["after/loss"] == alone.metrics["after/loss"]
    if asked:
        trials = optuna.load_study(study_name=None, storage=search.storage(folder)).trials
        losses = [last_message(job)["metrics"]["after/loss"] for job in jobs]
        assert sorted(trial.value for trial in trials) == sorted(losses)


def wait_until(done) -> None:
    for _ in range(600):
        if done():
            return
        time.sleep(0.2)
    raise TimeoutError


@pytest.mark.parametrize("launcher", ["slurm hydra.launcher.cluster=local", "joblib"])
def test_other_launchers_refuse_fused_jobs_before_anything_runs(launcher: str, capfd):
    assert exit_code("train", "-m", *QUICK, "seed=1,2", "sweep.fuse=auto", *f"hydra/launcher={launcher}".split()) == 1
    assert "sweep.fuse: only hydra/launcher=local" in capfd.readouterr().err
