"""Predicted against measured GPU memory: runs of this project on one H100 of 80 GB (torch 2.11, transformers 5.23).

    nox -s memory -- measured_h100      # about ten minutes; needs no GPU

The embedded model (`qlora-exp train`, two jobs of `-m sweep=seed1_methods`), and six steps of a model of Llama 2 7B's
shape with random weights (`evaluation=loss_only training.eval_strategy=no dataset.max_train_rows=64`, and what the
table says). The plan is of the longest of their rows, and of more tokens than carried loss in them.
"""

import argparse
from statistics import median

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import Device, resolve
from qlora_exp.planning.planner import Planner
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.units import MIB

EMBEDDED = (168, 165)
"""Tokens of its longest row of training, and of evaluation."""
SEVEN = (512, 0)
MEASURED: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "": (EMBEDDED, (245, 287), (300, 342)),
    "experiment=smollm2_faq_full": (EMBEDDED, (2_700, 2_688), (2_744, 2_786)),
    "experiment=smollm2_faq_lora": (EMBEDDED, (377, 384), (418, 426)),
    "model=llama2_7b method=lora training.per_device_train_batch_size=1": (SEVEN, (13_679, 13_721), (14_082, 14_106)),
    "model=llama2_7b method=lora training.per_device_train_batch_size=4": (SEVEN, (14_348, 14_650), (15_100, 15_284)),
    "model=llama2_7b method=qlora training.per_device_train_batch_size=1": (SEVEN, (4_294, 4_470), (4_742, 4_742)),
    "model=llama2_7b method=qlora training.per_device_train_batch_size=4": (SEVEN, (5_044, 5_220), (5_688, 5_622)),
}
"""Tokens of rows; MiB allocated, then reserved, at most in the first step and in later ones."""


def main() -> None:
    """Predict, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(MEASURED), help="the first of them only")
    options = parser.parse_args()
    quiet()
    errors = []
    print("MiB allocated and reserved at the fullest of training: predicted / measured")
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
