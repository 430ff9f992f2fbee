"""What a run gives back."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunResult:
    """What came out of a run."""

    run_id: str | None
    """MLflow's; None if its server was away the whole time, and `qlora-exp sync` has to tell it."""
    output_dir: Path
    metrics: dict[str, float]
    """All final metrics: `before/loss`, `after/rougeL`, `memory/rss_peak_mib`, `trainable_parameters`, ..."""
