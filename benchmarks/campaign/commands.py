"""The commands that the campaign faults, and how the result of each is read."""

import json
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Any

from campaign.world import QUICK, STORE, Command, World, train
from qlora_exp.config.tables.schedules import SETTINGS
from qlora_exp.sweeps.jobs import state

_NEEDS_A_MINIMUM = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
SCHEDULES = [
    *((name, "{}") for name in SETTINGS if name not in ("warmup_stable_decay", *_NEEDS_A_MINIMUM)),
    *((name, "{min_lr_rate: 0.5}") for name in _NEEDS_A_MINIMUM),
    ("warmup_stable_decay", "{num_decay_steps: 4, min_lr_ratio: 0.5}"),
]
"""Every learning rate schedule, with settings that it needs."""
RUN = "outputs/run"


def schedule_words(number: int) -> list[str]:
    """Return the overrides that choose a learning rate schedule."""
    name, settings = SCHEDULES[number % len(SCHEDULES)]
    return [f"training.lr_scheduler_type={name}", f"training.lr_scheduler_kwargs={settings}"]


def training(schedule: int) -> Command:
    """Return the command of a run with one of the schedules."""
    words = train("faulted", "run", *schedule_words(schedule))
    return Command("train", "empty", words, _runs, _has_ended, ("sync", "outputs"))


def _has_ended(world: World) -> bool:
    return (state(world.folder / RUN)[1] or {}).get("op") == "end"


def _runs(world: World) -> Any:
    return world.recorded()


def _report(world: World) -> Any:
    """Return the newest comparison, by the kind of its files."""
    files = sorted((world.folder / "report").glob("comparison_*"))
    newest = files[-1].stem if files else ""
    texts = {file.suffix: file.read_text("utf-8") for file in files if file.stem == newest}
    return {kind: text[-9:] if kind == ".html" else text for kind, text in texts.items()}  # pictures have random ids


def _zip(path: str) -> Any:
    def read(world: World) -> Any:
        if not (world.folder / path).exists():
            return {}
        with zipfile.ZipFile(world.folder / path) as archive:
            damaged = archive.testzip()
            return {"damaged": damaged, **{entry.filename: entry.CRC for entry in archive.infolist()}}

    return read


def _folder(name: str) -> Any:
    def read(world: World) -> Any:
        """Return what an export wrote, and what MLflow has of it."""
        files = world.files(name)
        with closing(sqlite3.connect(world.folder / STORE)) as store:
            tags = store.execute("SELECT count(*) FROM tags WHERE key LIKE 'export%'").fetchone()[0]
            params = store.execute("SELECT count(*) FROM params WHERE key LIKE 'export%'").fetchone()[0]
            metrics = store.execute("SELECT count(*) FROM metrics WHERE key LIKE 'export%'").fetchone()[0]
        logged = sorted(name for run in world.recorded().values() for name in run.artifacts if "export" in name)
        return {"files": files, "in MLflow": (tags, params, metrics, logged)}

    return read


def _registry(world: World) -> Any:
    with closing(sqlite3.connect(world.folder / STORE)) as store:
        versions = list(store.execute("SELECT name, version, status_message, length(description) FROM model_versions"))
        aliases = list(store.execute("SELECT name, alias, version FROM registered_model_aliases"))
        tags = sorted(store.execute("SELECT name, version, key FROM model_version_tags"))
    return {"versions": versions, "aliases": aliases, "tags": tags, "runs": world.recorded()}


def _sweep(world: World) -> Any:
    jobs = {
        folder.name: (state(folder)[0], (state(folder)[1] or {}).get("metrics", {}).get("after/loss"))
        for folder in (world.folder / "multirun" / "sweep").glob("seed-*")
    }
    return {"jobs": jobs, "runs": world.recorded()}


def _exists(path: str) -> Any:
    return lambda world: (world.folder / path).exists()


def others() -> list[Command]:
    """Return the commands that are faulted apart from runs."""
    run = "outputs/seed1"
    sweep = [
        "train", "-m", *QUICK, "tracking.experiment_name=swept", "hydra.sweep.dir=multirun/sweep", "sweep.rerun=failed",
        "seed=1,2",
    ]  # fmt: skip
    return [
        Command("sweep", "empty", sweep, _sweep, then=("sync", "multirun")),
        Command("sync", "unsent", ["sync", "outputs"], _runs),
        Command("compare --out", "runs", ["compare", "--experiment", "recorded", "--out", "report"], _report),
        Command("bundle", "runs", ["bundle", run, "--out", "new.zip"], _zip("new.zip"), _exists("new.zip")),
        Command("merge", "runs", ["merge", run, "--out", "merged"], _folder("merged"), _exists("merged")),
        Command("export --to gguf", "runs", ["export", run, "--to", "gguf", "--out", "gguf"], _folder("gguf"),
                _exists("gguf")),
        Command("register", "runs", ["register", run, "--name", "concrete", "--alias", "champion"], _registry),
        Command("reproduce", "runs", ["reproduce", run, "--out", RUN], _runs, _has_ended, ("sync", "outputs")),
    ]  # fmt: skip


def difference(mine: Any, right: Any) -> str:
    """Return in what the result of a command differs from the result without a fault; empty if in nothing."""
    if isinstance(right, dict):
        if missing := sorted(set(right) - set(mine)):
            return f"lost: {missing[:3]}"
        if more := sorted(set(mine) - set(right)):
            return f"doubled: {more[:3]}"
        problems = {key: difference(mine[key], right[key]) for key in right}
        return next((f"{key}: {problem}" for key, problem in problems.items() if problem), "")
    if hasattr(right, "difference"):
        return str(mine.difference(right))
    return (
        ""
        if mine == right
        else f"differs: {json.dumps(mine, default=str)[:200]}, not {json.dumps(right, default=str)[:200]}"
    )


def half_made(mine: Any, right: Any) -> str:
    """Return what is under its final name but not as it would be without a fault; empty if nothing is."""
    if not isinstance(mine, dict):
        return ""
    return next((f"{key}: half made" for key, value in mine.items() if key in right and value != right[key]), "")


def path_of(world: World, name: str) -> Path:
    """Return a path in the world."""
    return world.folder / name
