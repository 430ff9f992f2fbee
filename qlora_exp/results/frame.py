"""Give past runs as pandas data frames, for notebooks."""

import ast
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_exp.results import compare as comparing
from qlora_exp.results import records, report

if TYPE_CHECKING:
    import pandas as pd


def runs(
    *chosen: str, experiment: str | None = None, where: str | None = None, uri: str | None = None
) -> "pd.DataFrame":
    """Return past runs, newest first: also those that failed, and repetitions.

    Args:
        chosen: names of sweeps or runs, output folders, run ids or run keys. Default: all runs.
        experiment: name of the only MLflow experiment to search.
        where: filter in MLflow's syntax, such as `params.method.name = 'lora'`.
        uri: MLflow tracking URI. Default: SQLite in ./mlruns.

    Returns:
        A row for each run, with the run id as index, and columns `name`, `outcome`, `start_time` (UTC), `sweep`,
        `run_key`; each config key (`method.r`) and resolved value (`resolved.dtype`), as numbers, booleans and lists
        where they are such; and each metric's last value (`after/loss`). What a run does not have is missing.

    Raises:
        TrackingError: the store cannot be reached, or has no such experiment or run id.
    """
    import pandas as pd

    rows = [
        {
            "run_id": record.run_id,
            "name": record.name,
            "outcome": record.outcome,
            "start_time": pd.Timestamp(record.start_time, unit="ms", tz="UTC"),
            "sweep": record.tags.get("sweep"),
            "run_key": record.tags.get("run_key"),
            **{key: _typed(value) for key, value in record.params.items()},
            **record.metrics,
        }
        for record in records.every(uri, chosen, experiment, where)
    ]
    return pd.DataFrame(rows, columns=None if rows else ["run_id"]).set_index("run_id")


def curves(run_ids: Sequence[str], metric: str = "train/loss", uri: str | None = None) -> "pd.DataFrame":
    """Return every value of a metric, such as `train/loss` or `eval/loss`.

    Args:
        run_ids: ids of the runs; for example the index of `runs`.
        metric: name of the metric.
        uri: MLflow tracking URI. Default: SQLite in ./mlruns.

    Returns:
        A column for each run, with the step as index.

    Raises:
        TrackingError: the store cannot be reached, or lacks one of the runs.
    """
    import pandas as pd

    points = {record.run_id: dict(record.curve(metric)) for record in records.by_ids(uri, list(run_ids))}
    return pd.DataFrame(points).sort_index().rename_axis("step")


def compare(
    *chosen: str,
    metric: str = "loss",
    baseline: str | None = None,
    experiment: str | None = None,
    where: str | None = None,
    uri: str | None = None,
) -> "pd.DataFrame":
    """Compare runs as `qlora-exp compare` does.

    Args:
        chosen: names of sweeps or runs, output folders, run ids or run keys. Default: the newest sweep.
        metric: metric to compare, such as `loss`, `rougeL` or `lm_eval/TASK/METRIC`.
        baseline: row that the others are compared with, by a part of its name. Default: the first row.
        experiment: name of an MLflow experiment: compare its runs only.
        where: filter in MLflow's syntax, such as `params.method.name = 'lora'`.
        uri: MLflow tracking URI. Default: SQLite in ./mlruns.

    Returns:
        A row for each configuration. Columns: keys that differ; `seeds` and `failed`, numbers of runs; the mean over
        seeds of each metric, with `METRIC low` and `METRIC high`, its 95 % interval, if there are several; `difference`
        from the baseline with its interval, `p`, adjusted for the number of comparisons, and `verdict`; `ties`: rows
        that share a letter do not differ significantly. What a row does not have is missing.

    Raises:
        ConfigError: nothing can be compared, or no row or several rows match `baseline`.
        TrackingError: the store cannot be reached, or has no such sweep, experiment or run.
    """
    import pandas as pd

    comparison = comparing.compare(records.find(uri, chosen, experiment, where), metric, baseline)
    return pd.DataFrame([report.as_numbers(row, comparison) for row in comparison.rows])


def _typed(value: str) -> Any:
    """Return a param, which MLflow stores as text, as the value that it was."""
    try:
        return ast.literal_eval(value)  # plain values only: it runs no code
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
