"""Which metrics are better the higher they are; all others (losses, seconds, bytes) are better the lower."""

_HIGHER = ("rougeL", "exact_match", "task_score", "token_accuracy", "tokens_per_second", "tokens_per_gb_second", "mfu")


def lower_is_better(metric: str) -> bool:
    """Tell whether less of a metric is better, by its name with or without the phase (`after/rougeL`, `rougeL`).

    Not for scores of lm-eval: whether less of them is better depends on the task, and is recorded with the run.
    """
    return not metric.endswith(_HIGHER)
