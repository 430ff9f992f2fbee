"""The same fine-tuning for each contestant of `bench.py`: its command, and what it prints after each step.

All train the same rows in the same order: LoRA r=16, alpha 32, dropout 0.05 on all linear layers, batches of 4 rows,
learning rate 2e-4 with a linear schedule, gradients clipped at 0.3.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml

HERE = Path(__file__).parent
LLAMAFACTORY = "llamafactory==0.9.5"
_LOSS = re.compile(r"'loss': '?([0-9.]+)|step \d+ of \d+: loss ([0-9.]+)")


@dataclass(frozen=True)
class Job:
    """What all contestants do."""

    folder: Path
    """Folder with `rows/train.jsonl`, `rows/test.jsonl` (prompt and completion) and LLaMA-Factory's form of them."""
    model: str
    """Option of the group `model`."""
    base: str
    """Folder of that base model."""
    method: str
    steps: int
    device: str
    llamafactory: Path | None
    """Python of LLaMA-Factory's environment."""
    overrides: tuple[str, ...] = ()
    """Further overrides of qlora-exp's runs."""

    @property
    def shared(self) -> dict[str, Any]:
        """Arguments that transformers' trainers have in common."""
        return {
            "max_steps": self.steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
            "max_grad_norm": 0.3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "seed": 42,
        }


@dataclass(frozen=True)
class Measured:
    """A command as it was seen from outside."""

    contestant: str
    first_step: float
    """Seconds from the command to the end of its first step."""
    steps: list[float]
    """Seconds of each step after the first."""
    step_cpu: list[float]
    """User and system time of each of these steps, of all threads."""
    losses: list[float]
    seconds: float
    cpu_seconds: float
    """User and system time of the command and its children."""
    peak_mib: float
    """Largest resident memory of its processes together, read 20 times a second."""

    def line(self) -> str:
        """Return this as a line of JSON."""
        return json.dumps(asdict(self))


def export(folder: Path, model: str) -> str:
    """Write the rows of the default job for each contestant; return the folder of the converted base model."""
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.data.prompts import render
    from qlora_exp.data.rows import load_rows
    from qlora_exp.models import base, files

    config = compose([f"model={model}"])
    rows, tokenizer = load_rows(config.dataset), base.load_tokenizer(config.model)
    (folder / "rows").mkdir()
    for name, part in (("train", rows.train), ("test", rows.heldout)):
        pairs = []
        for row in part:
            *before, (answer, _) = render(row, config.dataset, tokenizer).pieces
            pairs.append(("".join(piece for piece, _ in before), answer))
        lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs]
        (folder / "rows" / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
        # LLaMA-Factory's template `empty` adds no end to an answer.
        alpaca = [{"instruction": p, "input": "", "output": f"{a}{tokenizer.eos_token}"} for p, a in pairs]
        (folder / f"{name}.json").write_text(json.dumps(alpaca), "utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "train.json"}}), "utf-8")
    return files.locate(config.model)


def llamafactory(folder: Path) -> Path:
    """Return the Python of an environment with LLaMA-Factory, and make it if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        torch = subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.__version__.split('+')[0])"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        subprocess.run([*pip, "install", LLAMAFACTORY, f"torch=={torch}", "bitsandbytes"], check=True)
        if subprocess.run([str(python), "-c", "import torchvision, torchaudio"], capture_output=True).returncode:
            # PyPI's builds are for torch with CUDA. It imports torchaudio, but needs neither for text.
            subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio"], check=True)
            (site,) = (folder / "lib").glob("python*/site-packages")
            (site / "torchaudio.py").write_text('"""Stands in for torchaudio."""\n')
        (folder / "ready").touch()
    return python


def versions(python: Path | None = None) -> str:
    """Return the versions of the libraries that matter, in another environment or in this one."""
    if python is None:
        found = {each.name: each.version for each in distributions()}
    else:
        listed = subprocess.run(
            [str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
        )
        found = {each["name"]: each["version"] for each in json.loads(listed.stdout)}
    names = ["llamafactory", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes"]
    return ", ".join(f"{name} {found[name]}" for name in names if name in found)


def run(contestant: str, job: Job) -> Measured:
    """Run a contestant, and read the time of each step and its loss from what it prints.

    Raises:
        SystemExit: its command failed.
    """
    out = Path(tempfile.mkdtemp(prefix=f"{contestant.split()[0]}-", dir=job.folder))
    tool, *settings = contestant.split()
    command = COMMANDS[tool](job, out, {"bf16": "bf16" in settings, "gradient_checkpointing": "recompute" in settings})
    hidden = {} if job.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    times, used, losses = [], [], []
    with (out / "stderr").open("w") as errors:
        begin = time.perf_counter()
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", **hidden}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables)
        assert process.stdout is not None
        watched = _Watched(process.pid)
        for line in process.stdout:
            if found := _LOSS.search(line):
                times.append(time.perf_counter() - begin)
                used.append(watched.cpu_seconds())
                losses.append(float(found[1] or found[2]))
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or len(losses) != job.steps:
        tail = "\n".join((out / "stderr").read_text("utf-8").splitlines()[-20:])
        sys.exit(f"{' '.join(command)}\nfailed ({process.returncode}) after {len(losses)} steps:\n{tail}")
    steps, step_cpu = ([after - before for before, after in pairwise(values)] for values in (times, used))
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(contestant, times[0], steps, step_cpu, losses, seconds, cpu, watched.peak / 2**20)


class _Watched(threading.Thread):
    """Thread that reads the memory of a process and its children until it ends.

    The kernel's own peak would not do: qlora-exp resets it to measure each phase.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._process = psutil.Process(pid)
        self.start()

    def run(self) -> None:
        with suppress(psutil.Error):
            while self._process.status() != psutil.STATUS_ZOMBIE:
                self.peak = max(self.peak, sum(each.memory_info().rss for each in self._all()))
                time.sleep(0.05)

    def cpu_seconds(self) -> float:
        """Return the user and system time until now."""
        return sum(each.cpu_times().user + each.cpu_times().system for each in self._all())

    def _all(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]


def _ours(job: Job, out: Path, settings: dict[str, bool]) -> list[str]:
    keys = {
        "model": job.model,
        "method": job.method,
        "device": job.device,
        "hydra.run.dir": out / "run",
        "tracking.uri": f"sqlite:///{job.folder / 'mlflow.db'}",
        "evaluation": "loss_only",
        "dataset.max_eval_rows": 1,
        "training.max_steps": job.steps,
        "training.eval_strategy": "no",
        "training.save_strategy": "no",
        "training.train_sampling_strategy": "sequential",
        "training.max_grad_norm": 0.3,
        **{f"training.{name}": str(value).lower() for name, value in settings.items()},
    }
    words = [f"{key}={value}" for key, value in keys.items()]
    return [sys.executable, "-m", "qlora_exp", "train", *words, *job.overrides]


def _plain(job: Job, out: Path, settings: dict[str, bool]) -> list[str]:
    options = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value]
    words = ["--model", job.base, "--data", str(job.folder / "rows"), "--out", str(out), "--steps", str(job.steps)]
    words += ["--method", job.method, "--device", job.device, "--sequential"]
    return [sys.executable, str(HERE / "plain.py"), *words, *options]


def _trl(job: Job, out: Path, settings: dict[str, bool]) -> list[str]:
    values = job.shared | {
        "model_name_or_path": job.base,
        "dataset_name": str(job.folder / "rows"),
        "dtype": "float32" if job.device == "cpu" else "bfloat16",
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "load_in_4bit": job.method == "qlora",
        "use_bnb_nested_quant": job.method == "qlora",
        "max_length": 512,
        "train_sampling_strategy": "sequential",
        "use_cpu": job.device == "cpu",
        "output_dir": str(out),
        **settings,
    }
    return [str(Path(sys.executable).with_name("trl")), "sft", "--config", _written(out, values)]


def _llamafactory(job: Job, out: Path, settings: dict[str, bool]) -> list[str]:
    assert job.llamafactory is not None
    values = job.shared | {
        "model_name_or_path": job.base,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        **({"quantization_bit": 4} if job.method == "qlora" else {}),
        "dataset_dir": str(job.folder),
        "dataset": "rows",
        "template": "empty",
        "cutoff_len": 512,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": not settings["gradient_checkpointing"],
        "bf16": settings["bf16"],
        "use_cpu": job.device == "cpu",
        "output_dir": str(out),
    }
    return [str(job.llamafactory.with_name("llamafactory-cli")), "train", _written(out, values)]


def _written(out: Path, values: dict[str, Any]) -> str:
    file = out / "config.yaml"
    file.write_text(yaml.safe_dump(values), "utf-8")
    return str(file)


COMMANDS: dict[str, Callable[[Job, Path, dict[str, bool]], list[str]]] = {
    "qlora-exp": _ours,
    "plain": _plain,
    "trl": _trl,
    "llamafactory": _llamafactory,
}
"""Each tool's command for a job, given an output folder and whether to use `bf16` and `gradient_checkpointing`."""
