"""The jobs of a sweep: each in a folder named by its run key, whose journal says how far it came.

That is all a sweep remembers. Knows nothing of how jobs are chosen, composed or launched.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_exp.config.schema import Config
from qlora_exp.tracking import run_key
from qlora_exp.tracking.journal import FILE, is_held, last_message, read
from qlora_exp.training.checkpoints import checkpoints, is_whole, step
from qlora_exp.utils.digests import json_digest
from qlora_exp.utils.errors import JournalError

log = logging.getLogger(__name__)

JOB_FILE = "job.json"
"""What the sweep tells a job beside its config: tags, identity, whether a failure stops the others, its time, ..."""
_STOP_FILE = "stop"
LATE_FILE = "out_of_time"
GOOD = ("ok", "pruned", "unfit")
"""Outcomes that are no failure."""

State = Literal["new", "running", "cut off", "damaged", "ok", "pruned", "oom", "nan", "timeout", "error"]
Action = Literal["run", "resume", "rerun", "skip"]
RUNNING: tuple[Action, str] = ("skip", "another process is running it")
"""What is decided of a job that is under way."""


@dataclass(frozen=True)
class Job:
    """One job of a sweep."""

    swept: Mapping[str, str]
    """The keys that differ between the jobs, with this one's values."""
    overrides: Sequence[str]
    """What composes it."""
    config: Config
    parts: Mapping[str, str]
    """What it depends on (`identity.parts`), as it was when the sweep was planned."""
    key: str
    folder: Path

    @property
    def name(self) -> str:
        """The swept values, as people read them."""
        return " ".join(f"{key}={value}" for key, value in self.swept.items()) or self.config.method.name


@dataclass(frozen=True)
class Ending:
    """How a job's process ended that did not live to record it."""

    outcome: str
    """killed, oom, timeout, error."""
    failure: str


Launch = Callable[[Sequence[Job]], Sequence[Ending | None]]
"""Runs jobs and returns when all have ended, however, with the `Ending` of those whose process died."""


def jobs(
    configs: Sequence[Config], swept: Sequence[Mapping[str, str]], overrides: Sequence[Sequence[str]], folder: Path
) -> list[Job]:
    """The jobs of a sweep in `folder`; of two that would be the same run only the first."""
    found: dict[str, Job] = {}
    for config, values, words in zip(configs, swept, overrides, strict=True):
        parts = run_key.parts(config)
        key = run_key.key_of(parts)
        label = re.sub(r"[^\w.+-]+", "-", "_".join(f"{name.split('.')[-1]}-{value}" for name, value in values.items()))
        found.setdefault(key, Job(values, words, config, parts, key, folder / f"{label[:100]}_{key}".lstrip("_")))
    return list(found.values())


def default_name(swept: Sequence[str], overrides: Sequence[str]) -> str:
    """A sweep's name, made of the keys that it sweeps and a digest of the whole of it."""
    keys = [key.split(".")[-1] for key in swept]
    apart = ("sweep.", "search.", "hydra", "tracking.")
    counting = [word for word in overrides if not word.lstrip("+~").startswith(apart)]
    return "_".join([*keys, json_digest(sorted(counting), digits=6)])


def state(folder: Path) -> tuple[State, dict[str, Any]]:
    """How far the job in `folder` came, and the last message of its journal."""
    held = is_held(folder)
    try:
        last = last_message(folder) or {}
        if held:
            return "running", last
        if not last:
            return "new", last
        if last["op"] == "end" and last["outcome"] != "killed":
            return last["outcome"], last
        for _ in read(folder / FILE):  # it can go on only if every message can be read
            pass
    except JournalError as error:
        return ("running", {}) if held else ("damaged", {"failure": str(error)})
    return "cut off", last


def decide(job: Job, rerun: str) -> tuple[Action, str]:
    """What to do with a job, and why."""
    found, last = state(job.folder)
    if found == "new":
        return "run", _why_new(job)
    if found == "running":
        return RUNNING
    if found == "cut off":
        whole = [step(one) for one in checkpoints(job.folder / "checkpoints") if is_whole(one)]
        from_step = max(whole, default=0)
        return "resume", f"was cut off; from step {from_step}" if from_step else "was cut off before a checkpoint"
    if found == "damaged":  # whatever it came to is lost to the sweep; its files are put aside
        return "rerun", last["failure"]
    if found in GOOD:
        done = "done" if found == "ok" else found
        in_time = f"{done} in {last['seconds']:.0f} s" if "seconds" in last else done
        return ("rerun", f"{done} before") if rerun == "all" else ("skip", in_time)
    why = f"{found}: {last.get('failure', '')}"
    return ("rerun", why) if rerun != "none" else ("skip", f"{why} (sweep.rerun=failed runs it again)")


def _why_new(job: Job) -> str:
    """Whether the same values were run before, and what has changed since."""
    label = job.folder.name.removesuffix(job.key)
    now = job.parts
    for folder in job.folder.parent.glob(f"{label}{'[0-9a-f]' * len(job.key)}"):
        try:
            begin = next((message for message, _ in read(folder / FILE)), {})
        except JournalError as error:
            return f"new: the one before cannot be read: {error}"
        before = {part: begin.get("tags", {}).get(f"identity.{part}") for part in now}
        if changed := [part for part in now if before[part] not in (None, now[part])]:
            return f"new: not the same {', '.join(changed)} as the one before"
    return "new"


def was_late(folder: Path) -> bool:
    """Whether the job in `folder` was told that its time was over."""
    return (folder / LATE_FILE).exists()


def stop(folder: Path) -> None:
    """Let no further job of the sweep in `folder` start."""
    (folder / _STOP_FILE).touch()


def let_start(folder: Path) -> None:
    """Let jobs of the sweep in `folder` start again."""
    (folder / _STOP_FILE).unlink(missing_ok=True)


def stopped(folder: Path) -> bool:
    """Whether no further job of the sweep in `folder` is to start."""
    return (folder / _STOP_FILE).exists()
