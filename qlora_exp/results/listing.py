"""List past runs on the terminal, and show one."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.values import flatten
from qlora_exp.results.records import MlflowRecord
from qlora_exp.utils.display import say
from qlora_exp.utils.errors import ConfigError, did_you_mean
from qlora_exp.utils.tables import print_table
from qlora_exp.utils.text import shortened

_OF_MLFLOW: dict[str, Callable[[MlflowRecord], str]] = {
    "run_id": lambda record: record.run_id,
    "user": lambda record: record.tags.get("mlflow.user", ""),
}
"""What MLflow itself keeps of a run, by the name of its column."""


def show_list(
    records: Sequence[MlflowRecord], columns: Sequence[str], by: str | None, reverse: bool, limit: int
) -> None:
    """Print a line for each run; with the user who started it, if there are several.

    Args:
        records: the runs, newest first.
        columns: config keys, tags, metrics, `run_id` or `user`, to print besides the usual ones.
        by: any of these to sort by; runs without it, or with NaN, come last. None: keep the order.
        reverse: print them in the reverse order.
        limit: most lines to print; 0: all.

    Raises:
        ConfigError: no run has such a key or metric.
    """
    several_users = len({_value(record, "user") for record in records}) > 1
    ids = ["run key", *["run_id"] * ("run_id" in columns)]
    extra = [key for key in dict.fromkeys([*["user"] * several_users, *columns, by or "after/loss"]) if key not in ids]
    _check(records, [*columns, *([by] if by else [])])
    if by:
        values = {record.run_id: value for record in records if (value := _value(record, by)) not in ("", "nan")}
        numbers = {run_id: number for run_id, value in values.items() if (number := _number(value)) is not None}
        keys: dict[str, Any] = numbers if len(numbers) == len(values) else values
        having = sorted((each for each in records if each.run_id in keys), key=lambda each: keys[each.run_id])
        records = [*having[:: -1 if reverse else 1], *(each for each in records if each.run_id not in keys)]
    elif reverse:
        records = records[::-1]
    left = len(records) - limit if limit > 0 else 0
    lines = [
        [
            record.tags.get("run_key", ""),
            *[record.run_id] * ("run_id" in ids),
            f"{_started(record):%Y-%m-%d %H:%M}",
            record.outcome,
            shortened(record.name),
            *(shortened(_value(record, key)) for key in extra),
        ]
        for record in records[: limit if left > 0 else None]
    ]
    print_table(f"{len(records)} runs", [*ids, "started", "outcome", "name", *extra], lines, whole=len(ids) + 2)
    if left > 0:
        say(f"{left} more; --limit 0 lists all")


def show_one(record: MlflowRecord) -> None:
    """Print what one run recorded: how it ended, the config keys that are not as by default, and its metrics."""
    defaults = {key: str(value) for key, value in flatten(compose()).items()}
    say(f"run      {record.run_id} {record.name}")
    say(f"started  {_started(record):%Y-%m-%d %H:%M:%S}, {record.outcome}")
    for name in ("run_key", "sweep", "failure", "process.folder", "mlflow.user"):
        if value := record.tags.get(name):
            say(f"{name.rpartition('.')[2].replace('_', ' '):<8} {value}")
    for tag in sorted(key for key in record.tags if key.startswith("metric_failed.")):
        _, moment, metric = tag.split(".", 2)
        say(f"{metric} was not measured {moment} training: {record.tags[tag]}")
    changed = [[key, value] for key, value in sorted(record.params.items()) if value != defaults.get(key, "None")]
    print_table("config and resolved values that are not as by default", ["key", "value"], changed)
    metrics = [[key, f"{value:.6g}"] for key, value in sorted(record.metrics.items())]
    print_table("metrics", ["metric", "last value"], metrics)


def _started(record: MlflowRecord) -> datetime:
    return datetime.fromtimestamp(record.start_time / 1000, UTC).astimezone()


def _check(records: Sequence[MlflowRecord], keys: Sequence[str]) -> None:
    known = {key for record in records for key in (*_OF_MLFLOW, *record.params, *record.tags, *record.metrics)}
    for key in keys:
        if key not in known:
            raise ConfigError(f"no run has '{key}'{did_you_mean(key, known)}")


def _value(record: MlflowRecord, key: str) -> str:
    if key in _OF_MLFLOW:
        return _OF_MLFLOW[key](record)
    if key in record.metrics:
        return f"{record.metrics[key]:.6g}"
    return record.params.get(key, record.tags.get(key, ""))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
