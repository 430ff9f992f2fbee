"""A past run again, from what MLflow or a bundle says of it, and whether the same came out.

A record is somebody else's word: it is read as plain data, checked like any config, and may neither run code nor choose
files of this machine. Never imports training internals.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_exp.config.schema import Config
from qlora_exp.config.untrusted import changed
from qlora_exp.config.values import APART, flatten
from qlora_exp.environment import hub, provenance
from qlora_exp.results import bundle, stats
from qlora_exp.results.records import Record, find
from qlora_exp.tracking import run_key
from qlora_exp.tracking.journal import LOCK_FILE, is_over, last_message
from qlora_exp.utils.errors import ConfigError, TrackingError

BIT_IDENTICAL = "bit-identical"
WITHIN_NOISE = "within the noise over seeds"
DRIFTED = "drifted"
_SEEDS = 3
"""From fewer, Student's interval is so wide (12.7 standard deviations from two) that anything is within it."""


@dataclass(frozen=True)
class Verdict:
    """How a run compares with the one that it repeats."""

    grade: str
    """`BIT_IDENTICAL`, `WITHIN_NOISE` or `DRIFTED`."""
    why: str


def one_record(uri: str | None, word: str) -> Record:
    """The run in this bundle, or with this id, key or name.

    Raises:
        ConfigError: the bundle is none.
        TrackingError: there is none, or several.
    """
    if bundle.is_bundle(word):
        return bundle.read(Path(word))
    found = find(uri, [word])
    if len(found) > 1:
        names = "\n  ".join(f"{one.run_id} {one.name}" for one in found)
        raise TrackingError(f"'{word}' is several runs; give the id of one:\n  {names}")
    return found[0]


def recorded_config(record: Record, changes: Mapping[str, Any], uri: str | None) -> Config:
    """The config of a recorded run, as far as a record may decide it.

    Args:
        record: of the run.
        changes: dotted keys with the values of whoever asks, which win.
        uri: where the new run is tracked.

    Raises:
        ConfigError: it is no valid config, or asks for what only the user may allow.
    """
    values = record.yaml()
    told = values.get("tracking")
    name = told.get("experiment_name", "qlora_exp") if isinstance(told, dict) else "qlora_exp"
    values |= {"tracking": {"uri": uri, "experiment_name": name}, "sweep": {}, "search": {}}
    return changed(values, changes, f"run {record.run_id}")


def differences(record: Record, config: Config) -> list[str]:
    """What is not as it was, likeliest cause first; empty if nothing that was recorded differs."""
    now, found = run_key.parts(config), []
    if record.tags.get("identity.config") != now["config"]:
        found.append(f"config: {_changed_keys(record, config)}")
    for part in ("data", "model"):
        if (before := record.tags.get(f"identity.{part}")) != now[part]:
            found.append(f"{part}: {before} then, {now[part]} now")
    if record.tags.get("identity.code") != now["code"]:
        then, here = record.tags.get("git.sha", "no commit")[:12], provenance.git().get("sha", "no commit")[:12]
        found.append(f"code of qlora_exp: commit {then} then, {here} now")
    here_now = provenance.libraries(config.quantization.quant_method)
    for key, before in sorted(record.tags.items()):
        name = key.removeprefix("version.")
        if key.startswith("version.") and here_now.get(name, "none") != before:
            found.append(f"{name}: {before} then, {here_now.get(name, 'none')} now")
    if others := _other_packages(record):
        found.append(f"other packages: {', '.join(others)}")
    for key, value in provenance.hardware().items():
        if key in ("threads", "cuda", "platform") and (before := record.tags.get(f"hardware.{key}")) != str(value):
            found.append(f"{key}: {before} then, {value} now")
    return found


def _other_packages(record: Record) -> list[str]:
    """Those that have another version now or are gone, beside `provenance.LIBRARIES`; new ones changed nothing."""
    lines = (line.partition("==") for line in record.text(LOCK_FILE).splitlines())
    now = provenance.environment()
    return [
        f"{name} {before} then, {now.get(name, 'none')} now"
        for name, _, before in lines
        if name not in (*provenance.LIBRARIES, "qlora-exp") and now.get(name) != before
    ]


def _changed_keys(record: Record, config: Config) -> str:
    now = {key: str(value) for key, value in flatten(config).items()}
    now = {key: value for key, value in now.items() if key.split(".")[0] not in APART}
    then = {key: record.params.get(key, "None") for key in now}  # what is not set is not recorded
    changed = [key for key, value in now.items() if then[key] != value]
    return ", ".join(f"{key} {then[key]} then, {now[key]} now" for key in changed) or "where files are, or defaults"


def judge(record: Record, again: Record, config: Config) -> Verdict:
    """Grade `again` against the run that it repeats.

    The noise is Student's interval for one more seed, from the seeds of the same config that were recorded.
    """
    unequal = _unequal(record, again)
    if not unequal:
        steps = len(record.curve("train/loss"))
        return Verdict(BIT_IDENTICAL, f"all {steps} training losses and all measures of quality are the same")
    before, now = record.metrics["after/loss"], again.metrics.get("after/loss", float("nan"))
    causes = [*_data(record, again), *differences(record, config)]
    cause = f"first cause that differs: {causes[0]}" if causes else "nothing that was recorded differs"
    said = f"held-out loss {before:.6f} then, {now:.6f} now; first difference: {unequal}; {cause}"
    others = record.seed_losses()
    if len(others) < _SEEDS:
        few = "no other seeds of it were recorded" if len(others) < 2 else f"only {len(others)} seeds were recorded"
        return Verdict(DRIFTED, f"{said}; {few}: {_SEEDS} can say how large noise is")
    spread = float(np.std(others, ddof=1)) * (1 + 1 / len(others)) ** 0.5
    allowed = stats.quantile(len(others) - 1) * spread
    grade = WITHIN_NOISE if abs(now - before) <= allowed else DRIFTED
    return Verdict(grade, f"{said}; over {len(others)} seeds it varies by ±{allowed:.6f}")


def _unequal(record: Record, again: Record) -> str:
    """The first thing that is not the same to the last bit; empty if there is none."""
    for metric in ("train/loss", "eval/loss"):
        for before, now in zip(record.curve(metric), again.curve(metric), strict=False):
            if before != now:
                return f"{metric} at step {before[0]}"
        if len(record.curve(metric)) != len(again.curve(metric)):
            return f"the number of steps of {metric}"
    timed = ("seconds", "per_second")
    for name, value in record.metrics.items():
        quality = name.startswith(("before/", "after/")) and not any(word in name for word in timed)
        if quality and again.metrics.get(name) != value:
            return name
    return ""


def _data(record: Record, again: Record) -> list[str]:
    keys = ("data.training_fingerprint", "data.evaluation_fingerprint")
    changed = [key for key in keys if record.params.get(key) != again.params.get(key)]
    return [f"{key}: {record.params.get(key)} then, {again.params.get(key)} now" for key in changed]


def free_folder(record: Record) -> Path:
    """Where a repetition may write: a new folder, or that of one that was cut off and goes on."""
    folder = Path("outputs", "reproduced", record.run_id)
    number = 1
    while (last := last_message(folder)) is not None and is_over(last):
        number += 1
        folder = folder.with_name(f"{record.run_id}.{number}")
    return folder


def start(record: Record, config: Config, folder: Path) -> str:
    """Run `config` anew; the new run's id.

    Raises:
        ConfigError: the folder has something in it that is not an unfinished run of this config, or the record has no
            result to compare with.
    """
    if "after/loss" not in record.metrics:
        raise ConfigError(f"run {record.run_id} has no held-out loss ({record.outcome}): nothing to compare with")
    if (last := last_message(folder)) is not None and is_over(last):
        raise ConfigError(f"{folder}: holds a run that ended ({last['outcome']}); choose another: --out FOLDER")
    if hub.is_needed(config):
        hub.go_offline_if_unreachable()
    from qlora_exp.recipe.finetune import run

    result = run(config, folder, {"reproduces": record.run_id, "mlflow.runName": f"{record.name} again"})
    assert result.run_id is not None  # it is reached at the start, or there is no run
    return result.run_id
