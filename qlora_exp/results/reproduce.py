"""Repeat a past run from its record in MLflow or in a bundle, and grade whether the result is the same.

A record is untrusted input: it is read as plain data and checked like any config. It can neither run code nor choose
files of this machine. This module does not import the internals of training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.dataset import looks_local
from qlora_exp.config.untrusted import changed, refuse_plugins
from qlora_exp.config.values import APART, flatten
from qlora_exp.data.reading.recognize import recognized
from qlora_exp.environment import data_files, hub, provenance
from qlora_exp.results import bundle, stats
from qlora_exp.results.record import Record
from qlora_exp.results.records import find
from qlora_exp.tracking import run_key
from qlora_exp.tracking.journal import FILE as JOURNAL_FILE
from qlora_exp.tracking.journal import LOCK_FILE, has_ended, last_message
from qlora_exp.utils.errors import ConfigError, DataError, TrackingError

BIT_IDENTICAL = "bit-identical"
WITHIN_NOISE = "within the noise over seeds"
DRIFTED = "drifted"
_SEEDS = 3
"""Fewest seeds for an estimate of noise: with two, Student's interval is so wide (12.7 standard deviations) that
every result is within it.
"""


@dataclass(frozen=True)
class Verdict:
    """Grade of a repetition compared with the original run."""

    grade: str
    """`BIT_IDENTICAL`, `WITHIN_NOISE` or `DRIFTED`."""
    why: str
    """Reason for the grade, with losses, first difference and likely cause."""


def find_run(uri: str | None, word: str) -> Record:
    """Return the run in a bundle, or the run with this id, run key or name.

    Args:
        uri: MLflow tracking URI.
        word: path of a bundle, or output folder, id, run key or name of a run.

    Raises:
        ConfigError: the path is not a valid bundle.
        TrackingError: no run or several runs match.
    """
    if bundle.is_bundle(word) and not (Path(word) / JOURNAL_FILE).is_file():  # not an output folder
        return bundle.read(Path(word))
    matches = find(uri, [word])
    if len(matches) > 1:
        names = "\n  ".join(f"{match.run_id} {match.name}" for match in matches)
        raise TrackingError(f"'{word}' matches several runs; give the id of one of them:\n  {names}")
    return matches[0]


def recorded_config(record: Record, changes: Mapping[str, Any], uri: str | None, to_run: bool = True) -> Config:
    """Return the config of a recorded run, without the parts that a record must not decide.

    Args:
        record: the run.
        changes: dotted keys with the user's values; they replace the recorded values.
        uri: MLflow tracking URI of the new run.
        to_run: whether it is to be run: then files that the user names must exist, and else they differ.

    Raises:
        ConfigError: the config is invalid, or uses a setting that only the user may allow.
        DataError: a file that the user names cannot be used, or its format not be recognized (`dataset.format=auto`).
    """
    values = record.yaml()
    recorded_tracking = values.get("tracking")
    name = recorded_tracking.get("experiment_name") if isinstance(recorded_tracking, dict) else None
    values |= {"tracking": {"uri": uri, "experiment_name": name}, "sweep": {}, "search": {}, "tuning": {}}
    config = changed(values, changes, f"run {record.run_id}")
    refuse_plugins(config, changes)
    for section, source in config.sections_of_rows.items() if to_run else ():
        sections = {section, section.partition(".")[0]}
        given = {f"{name}.{key}" for name in sections for key in ("path", "eval_path")} & changes.keys()
        for path in filter(looks_local, source.paths if given else ()):
            data_files.check(path, f"{section}.path")
    try:
        return recognized(config)
    except DataError:  # the rows are not here
        if to_run:
            raise
        return config


def differences(record: Record, config: Config) -> list[str]:
    """List what has changed since the recorded run, most likely cause first; empty if nothing recorded differs."""
    now, lines = run_key.digests(config, may_lack_data=True), []
    if record.tags.get("identity.config") != now["config"]:
        lines.append(f"config: {_changed_keys(record, config)}")
    for part in ("data", "model", "adapter", "plugins"):
        if (before := record.tags.get(f"identity.{part}")) != now.get(part):
            lines.append(f"{part}: {before} then, {now.get(part)} now")
    if record.tags.get("identity.code") != now["code"]:
        recorded_commit = record.tags.get("git.sha", "no commit")[:12]
        current_commit = provenance.git().get("sha", "no commit")[:12]
        commits = f"commit {recorded_commit} then, {current_commit} now"
        if recorded_commit == current_commit:
            commits = f"commit {current_commit} then and now, with other changes that are not committed"
        lines.append(f"code of qlora_exp: {commits}")
    current_versions = provenance.libraries(config.quantization.quant_method)
    for key, before in sorted(record.tags.items()):
        name = key.removeprefix("version.")
        if key.startswith("version.") and current_versions.get(name, "none") != before:
            lines.append(f"{name}: {before} then, {current_versions.get(name, 'none')} now")
    if others := _other_packages(record):
        lines.append(f"other packages: {', '.join(others)}")
    for key, value in provenance.hardware().items():
        if key in ("threads", "cuda", "platform") and (before := record.tags.get(f"hardware.{key}")) != str(value):
            lines.append(f"{key}: {before} then, {value} now")
    return lines


def _other_packages(record: Record) -> list[str]:
    """List packages outside `provenance.LIBRARIES` whose version changed or that are gone; new ones have no effect."""
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
    then = {key: record.params.get(key, "None") for key in now}  # keys that are not set are not recorded
    changed = [key for key, value in now.items() if then[key] != value]
    return ", ".join(f"{key} {then[key]} then, {now[key]} now" for key in changed) or "file locations or defaults"


def judge(record: Record, again: Record, config: Config) -> Verdict:
    """Grade the run `again` against the run that it repeats.

    The noise is Student's prediction interval for one more seed, from the recorded seeds of the same config.
    """
    unequal = _unequal(record, again, config)
    if not unequal:
        steps = len(record.curve("train/loss"))
        return Verdict(BIT_IDENTICAL, f"all {steps} training losses and all measures of quality are equal")
    loss_before, loss_now = record.metrics["after/loss"], again.metrics.get("after/loss", float("nan"))
    causes = [*_data(record, again), *differences(record, config)]
    cause = f"likely cause: {causes[0]}" if causes else "nothing that was recorded differs"
    losses_and_cause = f"held-out loss {loss_before:.6f} then, {loss_now:.6f} now; first difference: {unequal}; {cause}"
    seed_losses = record.seed_losses()
    if len(seed_losses) < _SEEDS:
        none = len(seed_losses) < 2
        count = (
            "no other seeds of this config were recorded" if none else f"only {len(seed_losses)} seeds were recorded"
        )
        return Verdict(
            DRIFTED, f"{losses_and_cause}; {count}, but the noise can be estimated only from {_SEEDS} or more"
        )
    spread = float(np.std(seed_losses, ddof=1)) * (1 + 1 / len(seed_losses)) ** 0.5
    allowed = stats.quantile(len(seed_losses) - 1) * spread
    grade = WITHIN_NOISE if abs(loss_now - loss_before) <= allowed else DRIFTED
    return Verdict(grade, f"{losses_and_cause}; over {len(seed_losses)} seeds the loss varies by ±{allowed:.6f}")


def _unequal(record: Record, again: Record, config: Config) -> str:
    """Return the name of the first value that is not bit-identical; empty if all are.

    Metrics that the user did not allow to be measured again are not compared.
    """
    for metric in ("train/loss", "eval/loss"):
        for before, now in zip(record.curve(metric), again.curve(metric), strict=False):
            if before != now:
                return f"{metric} at step {before[0]}"
        if len(record.curve(metric)) != len(again.curve(metric)):
            return f"the number of steps of {metric}"
    timed = ("seconds", "per_second")
    for name, value in record.metrics.items():
        quality = name.startswith(("before/", "after/")) and not any(word in name for word in timed)
        if (metric := name.partition("/metric/")[2]) and metric not in config.evaluation.metrics:
            continue
        if quality and again.metrics.get(name) != value:
            return name
    return ""


def _data(record: Record, again: Record) -> list[str]:
    keys = ("data.training_fingerprint", "data.evaluation_fingerprint")
    changed = [key for key in keys if record.params.get(key) != again.params.get(key)]
    return [f"{key}: {record.params.get(key)} then, {again.params.get(key)} now" for key in changed]


def repetition_folder(record: Record) -> Path:
    """Return the output folder of a repetition: a new folder, or that of an interrupted repetition, to resume it."""
    folder = Path("outputs", "reproduced", record.run_id)
    number = 1
    while (last := last_message(folder)) is not None and has_ended(last):
        number += 1
        folder = folder.with_name(f"{record.run_id}.{number}")
    return folder


def start(record: Record, config: Config, folder: Path) -> str:
    """Repeat the run.

    Args:
        record: the run to repeat.
        config: config of the new run.
        folder: its output folder; an unfinished run of this config in it is resumed.

    Returns:
        Id of the new MLflow run.

    Raises:
        ConfigError: the folder contains anything but an unfinished run of this config, or the record has no held-out
            loss to compare with.
    """
    if "after/loss" not in record.metrics:
        raise ConfigError(f"run {record.run_id} has no held-out loss ({record.outcome}): nothing to compare with")
    if (last := last_message(folder)) is not None and has_ended(last):
        raise ConfigError(
            f"{folder}: contains a run that has ended ({last['outcome']}); choose another folder: --out FOLDER"
        )
    if hub.is_needed(config):
        hub.go_offline_if_unreachable()
    from qlora_exp.recipe.finetune import run

    result = run(config, folder, {"reproduces": record.run_id, "mlflow.runName": f"{record.name} again"})
    assert result.run_id is not None  # the run starts only if MLflow can be reached
    return result.run_id
