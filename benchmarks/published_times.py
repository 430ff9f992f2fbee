"""Compare planned with published times of a step: fms-acceleration's benchmarks on one A100 of 80 GB.

    nox -s memory -- published_times   # a minute; needs no GPU

The runs are those of `published_fms` on one GPU; their `train_runtime` is divided by its 100 steps. The share of the
manufacturer's rates (`EFFICIENCY` in `qlora_exp/planning/gpus.py`) was chosen with them.
"""

import argparse

from published_fms import planned

from qlora_exp.planning.fit import step_seconds
from qlora_exp.planning.gpus import GPUS
from qlora_exp.planning.planner import Prediction
from qlora_exp.utils.quiet import quiet

PUBLISHED = {
    ("SantaCoder", "full", 4): 0.477,
    ("SantaCoder", "full", 8): 0.890,
    ("Mistral-7B", "full", 4): 5.350,
    ("Mistral-7B", "lora", 4): 4.929,
    ("Mistral-7B", "lora", 8): 9.770,
}
"""Published seconds of a step, by model, method and batch size."""


def main() -> None:
    """Print planned and published seconds of each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(PUBLISHED), help="use only the first N runs")
    options = parser.parse_args()
    quiet()
    for run, measured in [*PUBLISHED.items()][: options.runs]:
        seconds = step_seconds(Prediction({}, planned(*run)[1], 1, 1), GPUS["a100-80gb"]) or 0.0
        name, method, rows = run
        print(f"{name:12} {method:6} {rows}  {seconds:.3f} s, published {measured:.3f}  {seconds / measured - 1:+.1%}")


if __name__ == "__main__":
    main()
