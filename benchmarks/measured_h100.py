"""Compare predicted with measured GPU memory of runs of this project on one H100 80 GB (torch 2.11, transformers 5.23).

    nox -s memory -- measured_h100      # about ten minutes; needs no GPU

The runs: the built-in model (`qlora-exp train`, and two jobs of `-m sweep=cost_comparison`), and six steps of a model
in the shape of Llama 2 7B with random weights (`evaluation=loss_only training.eval_strategy=no
dataset.max_train_rows=64`, and the overrides in the table). Plans assume that all rows are as long as the longest,
and that more tokens carry loss than did in the runs.
"""

import argparse
from statistics import median

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import Device, resolve
from qlora_exp.planning.planner import Planner
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.units import MIB

BUILT_IN = (168, 165)
"""Tokens of the longest training row and of the longest evaluation row, for the built-in model."""
LLAMA2_7B = (512, 0)
"""The same for the model in the shape of Llama 2 7B; 0: no evaluation."""
MEASURED: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "": (BUILT_IN, (245, 287), (300, 342)),
    "experiment=smollm2_faq_full": (BUILT_IN, (2_700, 2_688), (2_744, 2_786)),
    "experiment=smollm2_faq_lora": (BUILT_IN, (377, 384), (418, 426)),
    "model=llama2_7b method=lora training.per_device_train_batch_size=1": (
        LLAMA2_7B,
        (13_679, 13_721),
        (14_082, 14_106),
    ),
    "model=llama2_7b method=lora training.per_device_train_batch_size=4": (
        LLAMA2_7B,
        (14_348, 14_650),
        (15_100, 15_284),
    ),
    "model=llama2_7b method=qlora training.per_device_train_batch_size=1": (LLAMA2_7B, (4_294, 4_470), (4_742, 4_742)),
    "model=llama2_7b method=qlora training.per_device_train_batch_size=4": (LLAMA2_7B, (5_044, 5_220), (5_688, 5_622)),
}
"""By overrides: tokens of rows; peak allocated MiB, then peak reserved MiB, in the first step and in later steps."""


def main() -> None:
    """Predict the memory of each run and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(MEASURED), help="use only the first N runs")
    options = parser.parse_args()
    quiet()
    errors = []
    print("peak MiB allocated and reserved in training: predicted / measured")
    for words, (lengths, allocated, reserved) in [*MEASURED.items()][: options.runs]:
        config = compose(words.split())
        planner = Planner(config, resolve(config, Device("cuda", "H100", bf16=True, paging=True)))
        phases = planner.predict(length=lengths[0], evaluated=lengths[1]).phases
        cells = []
        for name, measured in (("allocated", allocated), ("reserved", reserved)):
            planned = max(getattr(phases[phase], name) for phase in ("first_step", "steady")) / MIB
            cells.append(f"{planned:7,.0f} / {max(measured):6,} {planned / max(measured) - 1:+6.1%}")
        errors.append(planned / max(reserved) - 1)
        print(f"{words or 'the default run':68} {'   '.join(cells)}", flush=True)
    print(f"reserved: median error {median(map(abs, errors)):.1%}, from {min(errors):+.1%} to {max(errors):+.1%}")


if __name__ == "__main__":
    main()
