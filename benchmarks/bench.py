"""Compare `qlora-exp train` with its peers on equal work: a plain script, TRL's command line and LLaMA-Factory.

    nox -s bench                            # half an hour on 2 cores; keep the machine quiet meanwhile
    nox -s bench -- --peers plain           # only the plain script of the same libraries
    nox -s bench -- --device cuda           # on a GPU, where all compute in bfloat16

All train the same rows in the same order with the same settings, one after another, several rounds. Each is seen from
outside: when its steps end, by the losses that it prints; CPU seconds and peak memory of its process. LLaMA-Factory is
installed in an environment of its own, in .nox. `--race` compares the time in training steps until the same held-out
loss: of the plain script (float32, nothing recomputed, rows in random order) and of qlora-exp's defaults.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import peers
from peers import HERE, Job, Measured

ON_CPU = ["", "bf16"]
"""Settings that are compared on a CPU; "": float32."""
FIGURES: dict[str, Callable[[Measured], float]] = {
    "step, seconds": lambda run: statistics.median(run.steps),
    "CPU seconds of a step": lambda run: statistics.median(run.step_cpu),
    "command to first step, seconds": lambda run: run.first_step,
    "CPU seconds of the command": lambda run: run.cpu_seconds,
    "peak memory, MiB": lambda run: run.peak_mib,
}


def contestants(tools: Sequence[str], device: str) -> list[str]:
    """List who is compared; on a CPU, LLaMA-Factory also as it is by default, which recomputes activations."""
    tools = ["qlora-exp", *tools]
    if device == "cuda":
        return [f"{tool} bf16" for tool in tools]
    named = [" ".join(filter(None, (tool, setting))) for setting in ON_CPU for tool in tools]
    return named + ["llamafactory recompute"] * ("llamafactory" in tools)


def report(runs: Sequence[Measured]) -> None:
    """Print medians with the range, the ratio to qlora-exp with the same settings, and the losses."""
    names = [*dict.fromkeys(run.contestant for run in runs)]
    of = {name: [run for run in runs if run.contestant == name] for name in names}
    for figure, value in FIGURES.items():
        print(f"\n{figure}")
        for name in names:
            values = [value(run) for run in of[name]]
            ours = " ".join(["qlora-exp", *(word for word in name.split()[1:] if word == "bf16")])
            ratios = [value(a) / b for a, b in zip(of.get(ours, []), values, strict=False)]
            spread = f"{statistics.median(values):10.2f} ({min(values):.2f} to {max(values):.2f})"
            ratio = f"   qlora-exp: {statistics.median(ratios):.2f} of it" if ratios and name != ours else ""
            print(f"  {name:<24} {spread}{ratio}")
    print("\nlosses")
    for name in names:
        print(f"  {name:<24} {' '.join(f'{loss:.3f}' for loss in of[name][0].losses)}")


def race(job: Job, steps: int, overrides: Sequence[str], rounds: int) -> None:
    """Compare the time in training steps until the held-out loss that the plain script ends with."""
    from qlora_exp.tracking.journal import metrics

    interval = max(1, steps // 10)
    for turn in range(rounds):
        words = ["--model", job.base, "--data", str(job.folder / "rows"), "--out", str(job.folder / "race-plain")]
        words += ["--method", job.method, "--steps", str(steps), "--eval-steps", str(interval)]
        done = subprocess.run(
            [sys.executable, str(HERE / "plain.py"), *words], stdout=subprocess.PIPE, text=True, check=True
        )
        seconds, target = json.loads(done.stdout.splitlines()[-1])["heldout"][-1]
        for number, name in enumerate(("", "training.tune=auto training.bf16=false", "training.tune=auto")):
            folder = job.folder / f"race-{turn}-{number}"
            keys = [f"model={job.model}", f"method={job.method}", "device=cpu", f"hydra.run.dir={folder}"]
            keys += ["evaluation=loss_only", "training.save_strategy=no", f"training.max_steps={steps}"]
            keys += [f"training.eval_steps={interval}", f"tracking.uri=sqlite:///{job.folder / 'mlflow.db'}"]
            command = [sys.executable, "-m", "qlora_exp", "train", *keys, *name.split(), *overrides]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            elapsed, heldout = 0.0, []
            for line in metrics(folder):
                elapsed += line.get("train/step_seconds", 0.0)
                if "eval/loss" in line:
                    heldout.append((elapsed, line["eval/loss"]))
            reached = next((at for at, loss in heldout if loss <= target), None)
            result = {"race": name or "defaults", "target": target, "plain": seconds, "qlora-exp": reached}
            result |= {"ratio": reached and reached / seconds, "all steps": elapsed, "last loss": heldout[-1][1]}
            print(json.dumps(result), flush=True)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="plain,trl,llamafactory", help="whom to compare with (default: %(default)s)")
    parser.add_argument("--model", default="smollm2_135m", help="option of the config group `model`")
    parser.add_argument("--method", default="lora", choices=["lora", "qlora"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps of each run; the first is not counted")
    parser.add_argument("--only", default="", help="contestants by name, separated by commas, such as `qlora-exp bf16`")
    parser.add_argument("--race", type=int, default=0, metavar="STEPS", help="compare the time to a held-out loss too")
    parser.add_argument("--environment", type=Path, default=Path(".nox/llamafactory"), help="for LLaMA-Factory")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further overrides of qlora-exp's runs")
    options = parser.parse_args()
    tools = [name for name in options.peers.split(",") if name]
    if unknown := {*tools} - {*peers.COMMANDS} | {"qlora-exp"} & {*tools}:
        parser.error(f"--peers: unknown: {', '.join(sorted(unknown))}; there are plain, trl, llamafactory")
    python = peers.llamafactory(options.environment.absolute()) if "llamafactory" in tools else None
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else a thread that waits takes a core from another program
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = peers.export(folder, options.model)
        more = tuple(options.overrides)
        job = Job(folder, options.model, base, options.method, options.steps, options.device, python, more)
        names = options.only.split(",") if options.only else contestants(tools, options.device)
        print(json.dumps({"qlora-exp": peers.versions()}))
        if python:
            print(json.dumps({"llamafactory": peers.versions(python)}))
        runs = []
        for name in names if options.rounds else []:
            if name.startswith("qlora-exp"):
                peers.run(name, replace(job, steps=1))  # fills the caches
        for _ in range(options.rounds):
            for name in names:
                runs.append(peers.run(name, job))
                print(runs[-1].line(), flush=True)
        if runs:
            report(runs)
        if options.race:
            race(job, options.race, more, 1)


if __name__ == "__main__":
    main()
