"""Print predicted memory beside published memory, for the scripts published_fms and published_litgpt."""

import argparse
from collections.abc import Callable, Mapping
from statistics import median

from qlora_exp.utils.quiet import quiet

Run = tuple[str, str, int]
"""Model, method or storage, rows of a batch."""


def print_errors(doc: str | None, published: Mapping[Run, float], allocated: Callable[[str, str, int], float]) -> None:
    """Predict the memory of each run and print the errors; `--runs N` takes only the first N.

    Args:
        doc: what the script's `--help` says.
        published: for each run, the peak of allocated memory in GB.
        allocated: predicts it, in bytes.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(published), help="use only the first N runs")
    options = parser.parse_args()
    quiet()
    errors = []
    for run, measured in [*published.items()][: options.runs]:
        predicted = allocated(*run) / 1e9
        errors.append(predicted / measured - 1)
        name, choice, rows = run
        print(
            f"{name:12} {choice:14} {rows}  {predicted:6.2f} GB, published {measured:6.2f}  {errors[-1]:+.1%}",
            flush=True,
        )
    sizes = [*map(abs, errors)]
    print(f"median error {median(sizes):.1%}, worst {max(sizes):.1%}")
