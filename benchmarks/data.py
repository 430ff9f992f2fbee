"""Measure how fast rows are read, checked for leaks and tokenized, and how much memory this takes.

    nox -s data-bench -- --rows 1000000                # about ten minutes on 2 cores
    nox -s data-bench -- --rows 1000000 --kind chat

Writes rows of 20 to 300 words (a hundredth of them twice), trains a tiny model on them for one step with the
tokenizer of the built-in model, and prints a JSON line for each phase: seconds, seconds of all cores together, and the
largest memory of the process and its children together, in MiB (pages that they share counted once, without pages of
files). The first command has 1000 rows: its memory is the bare process's. The last has everything in the cache. Then
the loader of the trainer is read for some seconds with 0, 1 and 2 workers.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil

SHORT = 1000
SECONDS = 5.0
BATCH = 16


def words() -> tuple[list[str], list[float]]:
    """Return words of Python's documentation, and how often each occurs there, added up."""
    from pydoc_data.topics import topics

    counts: dict[str, int] = {}
    for text in topics.values():
        for word in text.split():
            counts[word] = counts.get(word, 0) + 1
    return list(counts), list(accumulate(counts.values()))


def write(file: Path, rows: int, kind: str) -> None:
    """Write rows, the same for each call."""
    chance = random.Random(0)
    vocabulary, weights = words()

    def text(least: int, most: int) -> str:
        return " ".join(chance.choices(vocabulary, cum_weights=weights, k=chance.randint(least, most)))

    line = ""
    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            if chance.random() > 0.01 or not line:
                asked, given = text(8, 40), text(10, 120)
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": given}]
                if chance.random() < 0.3:
                    turns += [{"role": "user", "content": text(5, 20)}, {"role": "assistant", "content": text(10, 60)}]
                row = {"instruction": asked, "input": text(5, 30) if chance.random() < 0.3 else "", "output": given}
                line = json.dumps({"messages": turns} if kind == "chat" else row)
            print(line, file=out)


def tiny_model(folder: Path) -> Path:
    """Write a model of one small layer with the tokenizer of the built-in model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.models.base import load_tokenizer

    if not folder.exists():
        tokenizer = load_tokenizer(compose(["model=smollm2_135m"]).model)
        sizes: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


class Meter:
    """Seconds and memory of phases; a phase inside another one is not a part of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self.peaks: dict[str, int] = {}
        self._open = ["other"]
        self._since = self._now()
        threading.Thread(target=self._sample, daemon=True).start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside as this phase."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def timed(self, owner: Any, name: str, phase: str) -> None:
        """Count the calls of a function as a phase."""
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return function(*args, **kwargs)

        setattr(owner, name, call)

    def _count(self) -> None:
        now = self._now()
        before = self.seconds.get(self._open[-1], (0.0, 0.0))
        wall, cpu = (b + n - s for b, n, s in zip(before, now, self._since, strict=True))
        self.seconds[self._open[-1]] = wall, cpu
        self._since = now

    @staticmethod
    def _now() -> tuple[float, float]:
        """Return seconds, and seconds of all cores together, of processes that ended too."""
        return time.perf_counter(), sum(os.times()[:4])

    def _sample(self) -> None:
        me = psutil.Process()
        while True:
            used = 0
            for process in (me, *me.children(recursive=True)):
                with suppress(OSError, psutil.Error):
                    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text("utf-8").splitlines()
                    used += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))
            self.peaks[self._open[-1]] = max(self.peaks.get(self._open[-1], 0), used // 1024)
            time.sleep(0.2)


def measure(name: str, overrides: list[str]) -> None:
    """Train for one step in this process, print the phases, and end the process."""
    begin, meter = time.perf_counter(), Meter()
    from qlora_exp.utils.quiet import quiet

    quiet()
    from qlora_exp.data import leakage, rows

    meter.timed(rows, "clean", "read and clean")
    meter.timed(leakage, "find", "leaks")
    from qlora_exp.data import label_audit, tokenization
    from qlora_exp.recipe import tokens
    from qlora_exp.training import trainer

    for owner in (tokenization, tokens):
        meter.timed(owner, "fingerprint", "fingerprint")
    meter.timed(tokenization, "tokenize", "tokenize")
    meter.timed(tokenization, "cut", "cut")
    meter.timed(label_audit, "audit", "audit")
    meter.timed(trainer, "build", "trainer")

    def first_step(self: Any, *_: Any, **__: Any) -> None:
        seconds = time.perf_counter() - begin
        for phase, (spent, cpu) in meter.seconds.items():
            line = {"run": name, "phase": phase, "seconds": round(spent, 2), "cpu_seconds": round(cpu, 2)}
            print(json.dumps(line | {"peak_mib": meter.peaks.get(phase)}), flush=True)
        line = {"run": name, "phase": "to the first step", "seconds": round(seconds, 2)}
        print(json.dumps(line | {"peak_mib": max(meter.peaks.values())}), flush=True)
        if name == "cached":
            for count in (0, 1, 2):
                loaded(self, count)
        sys.stdout.flush()
        os._exit(0)

    setattr(trainer.Trainer, "training_step", first_step)  # noqa: B010
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.recipe.finetune import run

    with tempfile.TemporaryDirectory() as folder:
        run(compose([*overrides, f"tracking.uri=sqlite:///{folder}/mlflow.db"]), output_dir=Path(folder))


def loaded(trained: Any, workers: int) -> None:
    """Print how many tokens the trainer's loader gives in a second."""
    trained.args.dataloader_num_workers = workers
    batches = iter(trained.get_train_dataloader())
    next(batches)
    tokens, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < SECONDS and (batch := next(batches, None)) is not None:
        tokens += int(batch["attention_mask"].sum())
    print(json.dumps({"phase": "loader", "workers": workers, "tokens_per_second": round(tokens / seconds)}), flush=True)


def main() -> None:
    """Write the rows, and measure three commands, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of rows")
    parser.add_argument("--kind", choices=("alpaca", "chat"), default="alpaca", help="what rows are like")
    parser.add_argument("--folder", type=Path, help="where rows and cache are kept; default: a temporary folder")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="changes of the config")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.overrides)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        model = tiny_model(folder / "model")
        for name, rows in (("bare", SHORT), ("first", arguments.rows), ("cached", arguments.rows)):
            file = folder / f"{arguments.kind}-{rows}.jsonl"
            if not file.exists():
                write(file, rows, arguments.kind)
            changes = [
                "model=hub", f"model.model_name_or_path={model}", "device=cpu", "evaluation=loss_only",
                "evaluation.before=false", "unrelated=none", "dataset=own", f"dataset.path={file}",
                "training.max_steps=1", f"training.per_device_train_batch_size={BATCH}", "tracking.plan=false",
                "training.eval_strategy=no", *arguments.overrides,
            ]  # fmt: skip
            words_ = [sys.executable, __file__, "--measure", name, "--", *changes]
            subprocess.run(words_, check=True, env={**os.environ, "QLORA_EXP_CACHE": str(folder / "cache")})


if __name__ == "__main__":
    main()
