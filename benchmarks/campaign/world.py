"""The folder in which faulted commands run: prepared once, copied before each fault, and read afterwards."""

import hashlib
import re
import shutil
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaign import processes
from campaign.processes import Ended, Kill

QUICK = [
    "device=cpu", "model=tiny_llama", "method=lora", "dataset.max_train_rows=32", "dataset.max_eval_rows=4",
    "training.max_steps=8", "training.save_strategy=steps", "training.save_steps=2", "training.save_total_limit=3",
    "training.per_device_train_batch_size=2", "training.learning_rate=1e-2", "training.eval_strategy=steps",
    "training.eval_steps=4", "unrelated=none", "evaluation.before=false", "evaluation.generate_rows=2",
    "evaluation.max_new_tokens=4", "tracking.plan=false",
]  # fmt: skip
"""A run of a second, which writes six checkpoints."""
STORE = Path("mlruns/mlflow.db")
SEEDS = (1, 2, 3)
_SAME = re.compile(r"(train|eval|after)/(?!.*(second|_mib|memory|tokens_per|runtime|flops)).*")
"""Metrics that are the same in every repetition of a run."""
_SPEED = re.compile(r".*(second|mfu|flops|samples|tokens|runtime|memory[/_]).*")
"""Measures of speed and memory: a run that was killed after its last step trains none to measure."""
_CURVES = ("train/", "eval/")


def train(experiment: str, folder: str, *overrides: str) -> list[str]:
    """Return the command of a run."""
    return ["train", *QUICK, f"tracking.experiment_name={experiment}", f"hydra.run.dir=outputs/{folder}", *overrides]


class World:
    """A folder with an MLflow store and runs.

    Attributes:
        folder: its path, the same for every copy: output folders know their own paths.
    """

    def __init__(self, scratch: Path) -> None:
        self.folder = scratch / "world"
        self._templates = scratch / "templates"
        self._mounted = False
        self.folder.mkdir(parents=True)

    def prepare(self) -> None:
        """Make the templates: `empty` has one run, `runs` three more, `unsent` these without the store, and so on."""
        self.must("empty", train("other", "other"))
        for seed in SEEDS:
            self.must("runs", train("recorded", f"seed{seed}", f"seed={seed}"))
        self.must("runs", ["bundle", "outputs/seed1", "--out", "bundle.zip"])
        self.save("runs")
        shutil.rmtree(self.folder / "mlruns")
        shutil.copytree(self._templates / "empty" / "mlruns", self.folder / "mlruns", symlinks=True)
        self.save("unsent")

    def must(self, template: str, words: list[str]) -> Ended:
        """Run a command that has to end well, and save the folder as a template."""
        ended = processes.run(words, self.folder)
        if ended.code != 0:
            raise RuntimeError(f"{' '.join(words)} failed without a fault: {ended.output}")
        self.save(template)
        return ended

    def save(self, template: str) -> None:
        """Save the folder as a template."""
        shutil.rmtree(self._templates / template, ignore_errors=True)
        shutil.copytree(self.folder, self._templates / template, symlinks=True)

    def has(self, template: str) -> bool:
        """Check whether a template was made."""
        return (self._templates / template).is_dir()

    def reset(self, template: str) -> None:
        """Make the folder a copy of a template."""
        self.give_space()
        shutil.rmtree(self.folder)
        shutil.copytree(self._templates / template, self.folder, symlinks=True)

    def limit_space(self, place: str, free: int) -> None:
        """Put a folder of this one on a disk of its own, with this many bytes free (needs root, for `mount`)."""
        disk = self.folder / place
        kept = self.folder.with_name("kept")
        disk.mkdir(parents=True, exist_ok=True)
        shutil.copytree(disk, kept, symlinks=True)
        self._disk = disk
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "faults", str(disk)], check=True)
        self._mounted = True
        shutil.copytree(kept, disk, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(kept)
        used = shutil.disk_usage(disk).used
        subprocess.run(["mount", "-o", f"remount,size={used + free}", str(disk)], check=True)

    def enlarge(self) -> None:
        """Give the disk of `limit_space` enough space."""
        subprocess.run(["mount", "-o", "remount,size=1g", str(self._disk)], check=True)

    def give_space(self) -> None:
        """Unmount the disk of `limit_space`."""
        if self._mounted:
            subprocess.run(["umount", "--lazy", str(self._disk)], check=True)
            self._mounted = False

    def run(self, words: list[str], kill: Kill | None = None) -> Ended:
        """Run a command in the folder."""
        return processes.run(words, self.folder, kill)

    def recorded(self, store: Path | None = None) -> dict[str, "Recorded"]:
        """Read all runs from the MLflow store, by experiment and name, with `#2` and so on for further ones."""
        return read_store(store or self.folder / STORE, self.folder)

    def files(self, folder: str) -> dict[str, str]:
        """Return the digests of all files below a folder, by path."""
        return {
            str(file.relative_to(self.folder / folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted((self.folder / folder).rglob("*"))
            if file.is_file()
        }

    def leftovers(self) -> list[str]:
        """List temporary files, which the next command must have removed."""
        return sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.name.endswith((".part", ".tmp")) or path.name.startswith((".qlora_exp.", "tmp-checkpoint"))
        )


@dataclass(frozen=True)
class Recorded:
    """What the MLflow store has of a run."""

    status: str
    points: dict[str, float]
    """Values by `METRIC at STEP`, of metrics that are the same in every repetition."""
    others: frozenset[str]
    """The other metrics, apart from those of speed."""
    doubled: list[str]
    artifacts: frozenset[str]
    models: int

    def difference(self, right: "Recorded") -> str:
        """Return in what it differs from a run without faults; empty if in nothing."""
        for what, mine, others in (
            ("status", {self.status}, {right.status}),
            ("points", self.points.items(), right.points.items()),
            ("metrics", self.others, right.others),
            ("artifacts", self.artifacts, right.artifacts),
            ("logged models", {self.models}, {right.models}),
        ):
            if missing := sorted(map(str, set(others) - set(mine))):
                return f"lost {what}: {missing[:3]} ({len(missing)}); has {sorted(map(str, mine))[:3]}"
            if what != "artifacts" and (more := sorted(map(str, set(mine) - set(others)))):
                return f"further {what}: {more[:3]} ({len(more)})"
        doubled = sorted(set(self.doubled) - set(right.doubled))  # the trainer logs the epoch twice if it evaluates
        return f"doubled points: {doubled[:3]}" if doubled else ""


def read_store(file: Path, folder: Path) -> dict[str, Recorded]:
    """Read all runs of an MLflow store in SQLite."""
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as store:
        found: dict[str, Recorded] = {}
        runs = list(
            store.execute(
                "SELECT run_uuid, e.name, r.name, status, artifact_uri FROM runs r JOIN experiments e "
                "USING (experiment_id) WHERE r.lifecycle_stage = 'active' ORDER BY start_time"
            )
        )
        for run_id, experiment, name, status, place in runs:
            rows = list(store.execute("SELECT key, step, value FROM metrics WHERE run_uuid = ?", (run_id,)))
            counts = Counter((key, step) for key, step, _ in rows)
            models = store.execute("SELECT count(*) FROM logged_models WHERE source_run_id = ?", (run_id,)).fetchone()
            label = number = f"{experiment}/{name}"
            copies = 1
            while number in found:
                number, copies = f"{label}#{copies + 1}", copies + 1
            found[number] = Recorded(
                status,
                {f"{key} at {step}": value for key, step, value in rows if _SAME.fullmatch(key)},
                frozenset(key for key, _, _ in rows if not _SAME.fullmatch(key) and not _SPEED.fullmatch(key)),
                [f"{key} at {step}" for (key, step), n in counts.items() if n > 1 and key.startswith(_CURVES)],
                frozenset(_artifacts(place, file, folder)),
                models[0],
            )
    return found


def _artifacts(place: str, store: Path, folder: Path) -> Iterable[str]:
    path = place.removeprefix("mlflow-artifacts:/").removeprefix("file://")
    root = store.parent / "artifacts" / path.lstrip("/") if place.startswith("mlflow-artifacts:") else Path(path)
    # A kill inside MLflow's own upload leaves its temporary file there, which nothing can tell from one in use.
    found = (file for file in (folder / root).rglob("*") if not file.name.startswith(".artifact.uploading."))
    files = (str(file.relative_to(root)) for file in found if file.is_file())
    return (re.sub(r"comparison_[\d_-]+", "comparison", file) for file in files)  # named by the time


@dataclass(frozen=True)
class Command:
    """A command to fault."""

    name: str
    template: str
    words: list[str]
    result: Callable[[World], Any]
    """Reads what the command made; it must be the same as without a fault."""
    made: Callable[[World], bool] = lambda _: False
    """Checks whether its result is there under its final name: then it may refuse to run again."""
    then: tuple[str, ...] = ()
    """Command that completes it, such as `sync`."""
