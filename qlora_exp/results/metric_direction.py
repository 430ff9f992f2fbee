"""Which metrics are better when they are higher. All others (losses, seconds, bytes) are better when lower."""

_HIGHER = ("rougeL", "exact_match", "task_score", "token_accuracy", "_per_second", "tokens_per_gb_second", "mfu")


def lower_is_better(metric: str) -> bool:
    """Return whether a lower value of a metric is better.

    Not for scores of lm-eval: their direction depends on the task, and is recorded with the run.

    Args:
        metric: name with or without the phase (`after/rougeL`, `rougeL`).
    """
    return not metric.endswith(_HIGHER)
