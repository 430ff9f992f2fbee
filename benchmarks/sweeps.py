"""Measure the overhead of a sweep, compared with separate processes and with Hydra's basic launcher.

    nox -s sweeps                       # about ten minutes on 2 cores; keep the machine quiet meanwhile

1. Total time of 8 short jobs on a tiny model: with `qlora-exp train -m`, with Hydra's basic sweeper and launcher (one
   process for all jobs), and with 8 plain scripts one after the other.
2. Memory of the sweep's own process after 5 and after 50 jobs.
3. Time to detect that all of 500 jobs are already done.
4. Eight LoRA and eight QLoRA jobs of the built-in model (ranks 4 to 64): one after the other, two at once, by turns on
   one base (`sweep.fuse=8`), and with their rows in one pass. Time, memory, and how far each adapter is from that of
   the job alone.
"""

import argparse
import contextlib
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from peers import export
from safetensors.torch import load_file

from qlora_exp.config.hydra_compose import compose
from qlora_exp.tracking.run_key import run_key
from qlora_exp.utils.units import MIB

QUICK = [
    "model=tiny_llama", "device=cpu", "method=qlora", "training.max_steps=5", "training.per_device_train_batch_size=4",
    "training.eval_strategy=no", "evaluation=loss_only", "dataset.max_train_rows=32", "dataset.max_eval_rows=4",
]  # fmt: skip


def sweep(folder: Path, jobs: int, *more: str) -> tuple[float, list[int]]:
    """Return a sweep's seconds, and the peak bytes of its own process by the number of jobs finished until then."""
    where = [f"hydra.sweep.dir={folder}", f"tracking.uri=sqlite:///{folder.parent / folder.name}.db"]
    words = [sys.executable, "-m", "qlora_exp", "train", "-m", *QUICK, *where, f"seed=range(0,{jobs})", *more]
    begin, memory = time.perf_counter(), [0] * (jobs + 1)
    with (folder.parent / f"{folder.name}.out").open("wb") as out:
        process = psutil.Popen(words, stdout=out, stderr=out)
        while process.poll() is None:
            done = len(list(folder.glob("*/*/qlora_exp.yaml")))
            memory[min(done, jobs)] = max(memory[min(done, jobs)], process.memory_info().rss)
            time.sleep(0.2)
    if process.returncode:
        raise RuntimeError((folder.parent / f"{folder.name}.out").read_text())
    return time.perf_counter() - begin, memory


def scripts(folder: Path, jobs: int) -> float:
    """Return the seconds that `jobs` runs of the plain script took, one after the other."""
    model = export(folder, "tiny_llama")
    words = [sys.executable, str(Path(__file__).parent / "plain.py"), "--model", model, "--data", str(folder / "rows")]
    begin = time.perf_counter()
    for number in range(jobs):
        subprocess.run(
            [*words, "--steps", "5", "--out", str(folder / f"plain{number}")], check=True, capture_output=True
        )
    return time.perf_counter() - begin


HOW = {
    "one after the other": [],
    "sweep.n_jobs=2": ["sweep.n_jobs=2"],
    "sweep.fuse=8": ["sweep.fuse=8"],
    "sweep.fuse=8 sweep.fused_rows=true": ["sweep.fuse=8", "sweep.fused_rows=true"],
}
"""Ways to run the jobs that are compared with `sweep.fuse`; the first is what the others are compared with."""


def fused(folder: Path, method: str, steps: int, device: str) -> None:
    """Print the time and memory of eight jobs of the built-in model, and how exact each way is."""
    words = [f"method={method}", "method.r=4,8,16,64", "seed=1,2", f"training.max_steps={steps}", f"device={device}"]
    words += ["training.eval_strategy=no", "dataset.max_eval_rows=8", "evaluation=loss_only", "evaluation.before=false"]
    words += ["unrelated=none", "tracking.plan=false"]
    alone: dict[str, dict[str, Any]] = {}
    first: tuple[float, float] | None = None
    for number, (name, more) in enumerate(HOW.items()):
        place = folder / f"{method}{number}"
        where = [f"hydra.sweep.dir={place}", f"tracking.uri=sqlite:///{place}.db", "sweep.name=jobs"]
        seconds, memory = watched([sys.executable, "-m", "qlora_exp", "train", "-m", *words, *more, *where])
        adapters = {file.parts[-3]: load_file(file) for file in place.glob("jobs/*/model/adapter_model.safetensors")}
        alone, first = alone or adapters, first or (seconds, memory)
        if adapters.keys() != alone.keys() or len(alone) != 8:
            raise RuntimeError(f"{name}: not all jobs ended")
        farthest = max(map(distance, adapters.values(), (alone[key] for key in adapters)))
        print(
            f"8 {method} jobs, {name}: {seconds:.1f} s ({seconds / first[0]:.2f}), "
            f"{memory / MIB:,.0f} MiB ({memory / first[1]:.2f}), adapters differ by {farthest:.1e}",
            flush=True,
        )


def watched(words: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds, and the most bytes of its processes, each with its part of shared pages."""
    begin, most = time.perf_counter(), 0.0
    with tempfile.TemporaryFile() as out:
        process = psutil.Popen(words, stdout=out, stderr=out)
        while process.poll() is None:
            taken = 0
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    taken += each.memory_full_info().pss
            most = max(most, taken)
            time.sleep(0.3)
        if process.returncode:
            out.seek(0)
            raise RuntimeError(out.read().decode())
    return time.perf_counter() - begin, most


def distance(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Return the norm of the difference of two adapters, relative to the second one's."""
    differences = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    return math.sqrt(differences / sum(float(tensor.double().square().sum()) for tensor in theirs.values()))


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=8, help="jobs of the first measurement; 0: skip it")
    parser.add_argument("--many", type=int, default=50, help="jobs of the second measurement; 0: skip it")
    parser.add_argument("--done", type=int, default=500, help="jobs of the third measurement; 0: skip it")
    parser.add_argument("--fused", type=int, default=6, help="steps of the jobs of the fourth measurement; 0: skip it")
    parser.add_argument("--device", default="cpu", help="device of the fourth measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.jobs:
            makespan(folder, options.jobs)
        if options.many:
            _, memory = sweep(folder / "many", options.many)
            few, many = (max(memory[: count + 1]) / MIB for count in (5, options.many))
            print(f"the sweep's own process: {few:.0f} MiB up to 5 jobs, {many:.0f} MiB up to {options.many}")
        if options.done:
            single, many = decide(folder, options.done)
            print(
                f"sweep with all {options.done} jobs already done: {many:.2f} s; with its only job done: {single:.2f} s"
            )

        for method in ("lora", "qlora") if options.fused else ():
            fused(folder, method, options.fused, options.device)


def makespan(folder: Path, jobs: int) -> None:
    """Print how long `jobs` jobs take as a sweep, with the basic launcher, and as plain scripts."""
    ours, _ = sweep(folder / "ours", jobs)
    basic, _ = sweep(folder / "basic", jobs, "hydra/sweeper=basic", "hydra/launcher=basic")
    again, _ = sweep(folder / "ours2", jobs)
    separate = scripts(folder, jobs)
    mean = (ours + again) / 2
    print(f"{jobs} jobs, seconds: qlora-exp {ours:.1f}, {again:.1f}; basic launcher {basic:.1f}; ", end="")
    print(
        f"plain scripts {separate:.1f}; ratio to scripts {mean / separate:.2f}, to basic launcher {mean / basic:.2f}",
        flush=True,
    )


def decide(folder: Path, jobs: int) -> tuple[float, float]:
    """Return the seconds of a sweep whose only job is done, and of one with `jobs` jobs that are done.

    The folders of the other jobs are copies of one real job's journal, named with the other jobs' run keys.
    """
    sweep(folder / "done", 1, "sweep.name=done")
    single, _ = sweep(folder / "done", 1, "sweep.name=done")
    (real,) = (folder / "done" / "done").glob("seed-*")
    first = compose([*QUICK, "seed=0"])
    for seed in range(1, jobs):
        key = run_key(first.model_copy(update={"seed": seed}))
        (real.parent / f"seed-{seed}_{key}").mkdir()
        for file in (*real.glob("journal.*"), real / "delivered.json"):
            shutil.copy(file, real.parent / f"seed-{seed}_{key}")
    return single, sweep(folder / "done", jobs, "sweep.name=done")[0]


if __name__ == "__main__":
    main()
