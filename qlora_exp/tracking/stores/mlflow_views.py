"""Build saved views of the runs table in MLflow's web page, and the address that opens a view.

MLflow keeps a saved view as a tag of the experiment. The format belongs to its web page, and no API documents it: it
was checked with MLflow 3.17.2, and `nox -s ui` opens the views in a real browser. This module connects to no store.
"""

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

_TAG = "mlflow.sharedViewState."
ALL_RUNS, NEWEST_SWEEP = "qlora_exp_all_runs", "qlora_exp_newest_sweep"
"""Keys of the two views."""

_COST_AND_QUALITY = (
    "metrics.`after/loss`", "metrics.`after/rougeL`", "metrics.`after/exact_match`", "metrics.`after/task_score`",
    "metrics.`forgetting`", "metrics.`memory/allocated_peak_mib`", "metrics.`memory/rss_peak_mib`",
    "metrics.`tokens_per_second`", "metrics.`trainable_share`", "tags.`outcome`", "attributes.`Models`",
    "attributes.`Dataset`",
)  # fmt: skip
_MOST = 20
"""Most further columns of a view: it is one tag, and lm-eval's groups have dozens of tasks."""
_CONFIG = ("method.name", "quantization.name", "lora_variant.name", "method.r", "method.lora_alpha", "seed")
_RUN_NAME = "attributes.`Run Name`"
_WIDTHS = {_RUN_NAME: 300, "attributes.`Models`": 200, "attributes.`Dataset`": 200}


def all_runs() -> tuple[str, str]:
    """Return the tag (key and value) of a view of all runs with their config, newest first, sweeps not collapsed."""
    columns = [f"params.`{key}`" for key in _CONFIG]
    return _view(ALL_RUNS, "All runs", "tags.run_key LIKE '%'", columns, "attributes.start_time", ascending=False)


def newest_sweep(name: str, swept: Sequence[str], now: int, scores: Sequence[str] = ()) -> tuple[str, str]:
    """Return the tag (key and value) of a view of a sweep's jobs with their swept values, lowest held-out loss first.

    Args:
        name: name of the sweep.
        swept: the swept keys.
        now: current time in milliseconds since 1970.
        scores: metrics of the jobs, of which the first have a column besides those of every view.
    """
    where = f"tags.sweep = '{name}' and tags.run_key LIKE '%'"
    columns = [*(f"tags.`sweep.{key}`" for key in swept), *(f"metrics.`{score}`" for score in scores[:_MOST])]
    return _view(NEWEST_SWEEP, f"Sweep {name}", where, columns, "metrics.`after/loss`", ascending=True, now=now)


def _view(
    key: str, title: str, where: str, first: Sequence[str], order_by: str, ascending: bool, now: int = 0
) -> tuple[str, str]:
    columns = [*first, *_COST_AND_QUALITY]
    state: dict[str, Any] = {"searchFilter": where, "orderByKey": order_by, "orderByAsc": ascending}
    widths = {column: 40 + 6 * len(column.partition(".")[2]) for column in columns}  # pixels, to show the full heading
    state |= {"selectedColumns": columns, "columnOrder": [_RUN_NAME, *columns], "columnWidths": widths | _WIDTHS}
    return f"{_TAG}{key}", json.dumps({"name": title, "createdAt": now, "updatedAt": now, "state": json.dumps(state)})


def is_older(view: str, other: str | None) -> bool:
    """Check whether a view was created before `other`: a journal that is delivered late must not replace a newer view.

    Both are values of the tag.
    """
    try:
        return other is not None and bool(json.loads(view)["createdAt"] < json.loads(other)["createdAt"])
    except (ValueError, KeyError, TypeError):  # a value that this package did not write
        return False


def address(server: str, experiment_id: str, tags: Sequence[str], newest_is_sweep: bool) -> str:
    """Return the address at which an MLflow server shows an experiment, with a view of this module if it has one.

    Args:
        server: base URL of the server.
        experiment_id: MLflow's id of the experiment.
        tags: keys of the experiment's tags.
        newest_is_sweep: whether the newest run belongs to a sweep.
    """
    wanted = [NEWEST_SWEEP, ALL_RUNS] if newest_is_sweep else [ALL_RUNS]
    view = next((key for key in wanted if f"{_TAG}{key}" in tags), None)
    words = {"workflowType": "machine_learning"} | ({"viewStateShareKey": view} if view else {})
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{urlencode(words)}"
