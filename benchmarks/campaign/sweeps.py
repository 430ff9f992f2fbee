"""Kill sweeps, their jobs and an MLflow server at random times; then count what was lost or doubled."""

import math
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
from mlflow import MlflowClient

from campaign.commands import SCHEDULES
from campaign.servers import Server
from qlora_exp.sweeps.jobs import state
from qlora_exp.tracking.tracker import LOG_FILE


@dataclass(frozen=True)
class Size:
    """Number of jobs of each sweep, and of steps of each job."""

    jobs: int
    steps: int


def command(folder: Path, uri: str, sweep: int, size: Size) -> list[str]:
    """Return the command of a sweep over seeds of a tiny model, whose jobs save six checkpoints.

    Args:
        folder: folder of all sweeps.
        uri: MLflow tracking URI.
        sweep: number of the sweep, from 0; it decides the seeds and the learning rate schedule.
        size: number of jobs and steps.
    """
    seeds = range(sweep * size.jobs, (sweep + 1) * size.jobs)
    schedule, settings = SCHEDULES[sweep % len(SCHEDULES)]
    return [
        sys.executable, "-m", "qlora_exp", "train", "-m", "model=tiny_llama", "device=cpu", "method=lora",
        f"training.max_steps={size.steps}", "training.save_strategy=steps",
        f"training.save_steps={max(1, size.steps // 6)}", "training.per_device_train_batch_size=2",
        "training.eval_strategy=no", "dataset.max_train_rows=64", "dataset.max_eval_rows=16",
        "evaluation.before=false", "evaluation.generate_rows=8", "evaluation.max_new_tokens=24",
        f"training.lr_scheduler_type={schedule}", f"training.lr_scheduler_kwargs={settings}",
        "sweep.n_jobs=2", "sweep.rerun=failed",
        f"tracking.uri={uri}", f"hydra.sweep.dir={folder}", f"seed={','.join(map(str, seeds))}",
    ]  # fmt: skip


def job_processes(parent: psutil.Process) -> list[psutil.Process]:
    """List the processes of a sweep that run a job: the children of its fork server."""
    try:
        return [job for child in parent.children() for job in child.children()]
    except psutil.NoSuchProcess:
        return []


def evaluates(job: psutil.Process) -> bool:
    """Check whether a job has ended its training and is evaluating."""
    try:
        logs = [Path(file.path) for file in job.open_files() if Path(file.path).name == LOG_FILE]
    except psutil.NoSuchProcess:
        return False
    return any("evaluating after training" in log.read_text("utf-8") for log in logs)


def kill_at_random(
    folder: Path, uri: str, kills: int, chance: random.Random, size: Size
) -> tuple[Counter[str], dict[str, float], int, int]:
    """Run sweeps with kills; return the kills by target, the final losses by job, the lost jobs and the sweeps."""
    hit: Counter[str] = Counter()
    done: dict[str, str] = {}
    lost = sweeps = 0
    losses: dict[str, float] = {}
    share = math.ceil(kills / len(SCHEDULES))  # every schedule gets some of the kills
    while hit.total() < kills or len(losses) < sweeps * size.jobs:
        if len(losses) == sweeps * size.jobs:
            sweeps += 1
        words = command(folder, uri, sweeps - 1, size)
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            parent = psutil.Process(process.pid)
            while process.poll() is None:
                time.sleep(chance.uniform(0.5, 6.0))
                target = chance.choices(["sweep", "evaluation", "job"], [4, 5, 11])[0]
                most = min(kills, share * sweeps)
                while process.poll() is None and hit.total() < most and (jobs := job_processes(parent)):
                    if target == "evaluation" and not (jobs := [job for job in jobs if evaluates(job)]):
                        time.sleep(0.05)
                        continue
                    hit[target] += 1
                    (process if target == "sweep" else chance.choice(jobs)).kill()
                    break
        for job in folder.glob("*/seed-*"):
            outcome, last = state(job)
            if outcome == "ok":
                losses[job.name] = last["metrics"]["after/loss"]
                lost += done.get(job.name, last["timestamp"]) != last["timestamp"]
                done[job.name] = last["timestamp"]
            elif job.name in done:
                lost += 1
        print(f"{hit.total()} kills {dict(hit)}, {len(done)} jobs done, {lost} lost", flush=True)
    return hit, losses, lost, sweeps


def check(uri: str, folder: Path, size: Size) -> dict[str, int]:
    """Count jobs and MLflow runs, and the faults in MLflow."""
    mlflow = MlflowClient(uri)
    runs = [run for experiment in mlflow.search_experiments() for run in mlflow.search_runs([experiment.experiment_id])]
    jobs = [run for run in runs if "run_key" in run.data.tags]
    keys = Counter(run.data.tags["run_key"] for run in jobs)
    missing = repeated = beyond = 0
    for run in jobs:
        steps = Counter(point.step for point in mlflow.get_metric_history(run.info.run_id, "train/loss"))
        missing += sum(step not in steps for step in range(1, size.steps + 1))
        repeated += sum(count - 1 for count in steps.values())
        beyond += sum(step > size.steps for step in steps)
    return {
        "jobs": len({folder.name for folder in folder.glob("*/seed-*") if "." not in folder.name}),
        "MLflow runs of jobs": len(jobs),
        "duplicated runs": sum(count - 1 for count in keys.values()),
        "runs left RUNNING": sum(run.info.status == "RUNNING" for run in runs),
        "runs not FINISHED": sum(run.info.status != "FINISHED" for run in jobs),
        "steps missing": missing,
        "steps logged twice": repeated,
        "steps after the last": beyond,
    }


def outages(folder: Path, count: int, chance: random.Random, size: Size) -> dict[str, int]:
    """Run sweeps while the server is killed and started again `count` times; return the final counts of `check`."""
    server = Server(folder)
    server.start()
    sweep = 0
    while count > 0:
        words = command(folder / "outages", server.uri, sweep, size)
        sweep += 1
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            parent = psutil.Process(process.pid)
            while process.poll() is None:
                time.sleep(chance.uniform(1.0, 4.0))
                if job_processes(parent) and count > 0:
                    count -= 1
                    server.kill()
                    time.sleep(chance.uniform(1.0, 8.0))
                    server.start()
        print(f"{count} outages left", flush=True)
    subprocess.run([sys.executable, "-m", "qlora_exp", "sync", str(folder / "outages")], check=True)
    counts = check(server.uri, folder / "outages", size)
    server.kill()
    print(f"Server outages: {counts}", flush=True)
    return counts


def wrong(counts: dict[str, int]) -> bool:
    """Check whether anything was lost or duplicated."""
    numbers = list(counts.values())
    return numbers[0] != numbers[1] or any(numbers[2:])


def kills_and_outages(folder: Path, kills: int, outages_: int, seed: int, size: Size) -> bool:
    """Run the kills, then the server outages; return whether anything was lost or doubled."""
    chance = random.Random(seed)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    bad = False
    if kills:
        hit, losses, lost, sweeps = kill_at_random(folder / "killed", uri, kills, chance, size)
        counts = check(uri, folder / "killed", size)
        for sweep in range(sweeps):
            calm = command(folder / "calm", f"sqlite:///{folder / 'calm.db'}", sweep, size)
            subprocess.run(calm, capture_output=True, check=True)
        same = sum(
            state(job)[1]["metrics"]["after/loss"] == losses[job.name] for job in (folder / "calm").glob("*/seed-*")
        )
        print(f"Kills: {dict(hit)}; finished jobs lost: {lost}; {counts}")
        print(f"Final loss bit-identical to that without kills: {same} of {len(losses)}", flush=True)
        bad = bool(lost) or wrong(counts) or same != len(losses)
    return bool(outages_ and wrong(outages(folder, outages_, chance, size))) or bad
