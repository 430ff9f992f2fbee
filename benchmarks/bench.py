"""Compare `qlora-exp train` with a plain script that uses the same libraries, running the two alternately.

    nox -s bench                        # about a quarter of an hour on 2 cores; keep the machine quiet meanwhile

1. Overhead: both run the same job (precision, batches, seed). Compares step time, peak memory and time to the first
   step. The peak of `qlora-exp` is the largest of all phases, that of the plain script is of its complete process; both
   occur in training.
2. Defaults: the plain script runs with TRL's own precision, checkpointing and sampling. Compares the time in training
   steps until the same held-out loss.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def export(folder: Path, model: str) -> str:
    """Write the rows of the default job as prompt and completion; return the path of the converted base model."""
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.data.prompts import render
    from qlora_exp.data.rows import load_rows
    from qlora_exp.models import base, files

    config = compose([f"model={model}"])
    rows = load_rows(config.dataset)
    tokenizer = base.load_tokenizer(config.model)
    for name, part in (("train", rows.train), ("heldout", rows.heldout)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
            for row in part:
                *before, (answer, _) = render(row, config.dataset, tokenizer).pieces
                prompt = "".join(piece for piece, _ in before)
                lines.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    return files.locate(config.model)


def plain(model: str, data: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """Run the plain script; return the values that it printed."""
    command = [
        sys.executable,
        str(HERE / "plain.py"),
        "--model",
        model,
        "--data",
        str(data),
        "--out",
        str(out),
        *arguments,
    ]
    begin = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout.splitlines()[-1])
    return printed | {"first_step": printed["first_step"] - begin}


def ours(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run `qlora-exp train`; return the same values, read from its output folder."""
    from qlora_exp.tracking.journal import metrics

    command = [sys.executable, "-m", "qlora_exp", "train", "device=cpu", f"hydra.run.dir={folder}"]
    common = [
        "evaluation=loss_only",
        "training.save_strategy=no",
        f"tracking.uri=sqlite:///{folder.parent / 'mlflow.db'}",
    ]
    begin = time.time()
    subprocess.run([*command, *common, *overrides], capture_output=True, text=True, check=True)
    records = metrics(folder)
    steps = [record for record in records if "train/step_seconds" in record]
    elapsed = {
        record["step"]: sum(r["train/step_seconds"] for r in steps if r["step"] <= record["step"]) for record in records
    }
    return {
        "steps": [record["train/step_seconds"] for record in steps],
        "first_step": steps[0]["timestamp"] / 1000 - begin,
        "peak_mib": next(r["memory/rss_peak_mib"] for r in records if "memory/rss_peak_mib" in r),
        "losses": [(elapsed[record["step"]], record["eval/loss"]) for record in records if "eval/loss" in record],
    }


def report(name: str, mine: list[float], theirs: list[float]) -> None:
    """Print the medians, and the median and range of the ratios of the pairs."""
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    print(
        f"{name:<34} qlora-exp {statistics.median(mine):9.2f}   plain {statistics.median(theirs):9.2f}   "
        f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        flush=True,
    )


def main() -> None:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2_135m", help="option of the config group `model`")
    parser.add_argument("--pairs", type=int, default=3, help="number of alternating pairs")
    parser.add_argument("--steps", type=int, default=10, help="steps of each run, at least 2: the first is not counted")
    parser.add_argument("--race-steps", type=int, default=20, help="steps of the second comparison; 0: skip it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further overrides of qlora-exp's runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, chosen = export(folder, options.model), [f"model={options.model}", *options.overrides]
        ours(folder / "warmup", *chosen, "training.max_steps=1", "training.eval_strategy=no", "dataset.max_eval_rows=1")
        mine, theirs = [], []
        for pair in range(options.pairs):
            theirs.append(plain(model, folder, folder / f"plain{pair}", "--steps", str(options.steps)))
            steps = [
                *chosen,
                f"training.max_steps={options.steps}",
                "training.train_sampling_strategy=random",
                "training.eval_strategy=no",
                "dataset.max_eval_rows=1",
            ]
            mine.append(ours(folder / f"ours{pair}", *steps))
        print(f"The same job, {options.pairs} alternating pairs of {options.steps} steps; medians and ratios:")
        for name, pick in (
            ("step, seconds (without the first)", lambda run: statistics.median(run["steps"][1:])),
            ("peak RSS, MiB", lambda run: run["peak_mib"]),
            ("command to first step, seconds", lambda run: run["first_step"]),
        ):
            report(name, [pick(run) for run in mine], [pick(run) for run in theirs])
        if options.race_steps:
            interval = max(1, options.race_steps // 10)
            slow = plain(
                model,
                folder,
                folder / "default",
                "--steps",
                str(options.race_steps),
                "--eval-steps",
                str(interval),
                "--trl-defaults",
            )
            seconds, target = slow["losses"][-1]
            race = [*chosen, f"training.max_steps={options.race_steps}", f"training.eval_steps={interval}"]
            fast = ours(folder / "race", *race)
            reached = next((elapsed for elapsed, loss in fast["losses"] if loss <= target), None)
            print(f"Held-out loss {target:.4f}: TRL's defaults needed {seconds:.1f} s of training steps, ", end="")
            print(
                f"qlora-exp {reached:.1f} s, ratio {reached / seconds:.3f}" if reached else "qlora-exp did not reach it"
            )
            print(f"  TRL's defaults {slow['losses']}\n  qlora-exp      {fast['losses']}")


if __name__ == "__main__":
    main()
