"""Define the result of a run."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunResult:
    """Result of a run."""

    run_id: str | None
    """MLflow's id of the run; None if its server never answered: `qlora-exp sync` sends it later."""
    output_dir: Path
    metrics: dict[str, float]
    """All final metrics: `before/loss`, `after/rougeL`, `memory/rss_peak_mib`, `trainable_parameters`, ..."""
