"""What MLflow's web page shows of our runs: saved views of the runs table, and the address that opens one.

A saved view is a tag of the experiment, in a format of MLflow's web page, which no API documents: checked with MLflow
3.17.2, and opened in a real browser by `nox -s ui`. Knows nothing of stores.
"""

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

_TAG = "mlflow.sharedViewState."
ALL_RUNS, NEWEST_SWEEP = "qlora_exp_all_runs", "qlora_exp_newest_sweep"
"""The views' keys."""

_COST_AND_QUALITY = (
    "metrics.`after/loss`", "metrics.`after/rougeL`", "metrics.`after/task_score`",
    "metrics.`memory/allocated_peak_mib`", "metrics.`memory/rss_peak_mib`", "metrics.`tokens_per_second`",
    "metrics.`trainable_share`", "tags.`outcome`", "attributes.`Models`", "attributes.`Dataset`",
)  # fmt: skip
_CONFIG = ("method.name", "quantization.name", "lora_variant.name", "method.r", "method.lora_alpha", "seed")
_RUN_NAME = "attributes.`Run Name`"
_WIDTHS = {_RUN_NAME: 300, "attributes.`Models`": 200, "attributes.`Dataset`": 200}


def all_runs() -> tuple[str, str]:
    """The tag, key and value, of a view of every run with its config, newest first, sweeps not folded."""
    columns = [f"params.`{key}`" for key in _CONFIG]
    return _view(ALL_RUNS, "All runs", "tags.run_key LIKE '%'", columns, "attributes.start_time", ascending=False)


def newest_sweep(name: str, swept: Sequence[str], now: int) -> tuple[str, str]:
    """The tag of a view of a sweep's jobs with what is swept, the lowest held-out loss first.

    Args:
        name: the sweep's.
        swept: its keys.
        now: milliseconds since 1970.
    """
    where = f"tags.sweep = '{name}' and tags.run_key LIKE '%'"
    columns = [f"tags.`sweep.{key}`" for key in swept]
    return _view(NEWEST_SWEEP, f"Sweep {name}", where, columns, "metrics.`after/loss`", ascending=True, now=now)


def _view(
    key: str, title: str, where: str, first: Sequence[str], order_by: str, ascending: bool, now: int = 0
) -> tuple[str, str]:
    columns = [*first, *_COST_AND_QUALITY]
    state: dict[str, Any] = {"searchFilter": where, "orderByKey": order_by, "orderByAsc": ascending}
    widths = {column: 40 + 6 * len(column.partition(".")[2]) for column in columns}  # pixels: the heading is readable
    state |= {"selectedColumns": columns, "columnOrder": [_RUN_NAME, *columns], "columnWidths": widths | _WIDTHS}
    return f"{_TAG}{key}", json.dumps({"name": title, "createdAt": now, "updatedAt": now, "state": json.dumps(state)})


def is_older(view: str, other: str | None) -> bool:
    """Whether a tag's value was made before another, which a journal that is delivered late must not undo."""
    try:
        return other is not None and bool(json.loads(view)["createdAt"] < json.loads(other)["createdAt"])
    except (ValueError, KeyError, TypeError):  # somebody else's
        return False


def address(server: str, experiment_id: str, tags: Sequence[str], newest_is_sweep: bool) -> str:
    """Where an MLflow server shows an experiment: a view of ours, if its tags have one.

    Args:
        server: its base URL.
        experiment_id: MLflow's.
        tags: keys of the experiment's tags.
        newest_is_sweep: whether the newest run belongs to a sweep.
    """
    wanted = [NEWEST_SWEEP, ALL_RUNS] if newest_is_sweep else [ALL_RUNS]
    view = next((key for key in wanted if f"{_TAG}{key}" in tags), None)
    words = {"workflowType": "machine_learning"} | ({"viewStateShareKey": view} if view else {})
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{urlencode(words)}"
