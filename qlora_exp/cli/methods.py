"""`probe` and `quantize-error`: examine a method or a quantization before training with it."""

import argparse
from pathlib import Path

from qlora_exp.cli.parents import OWN_OPTIONS, Commands, add_command, add_overrides
from qlora_exp.config.tables import compatibility
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.quiet import quiet

_BLOCK_SIZES = [64 * 2**power for power in range(7)]  # the sizes that bitsandbytes supports


def add_parsers(commands: Commands) -> None:
    """Add both commands."""
    parser = add_command(commands, "probe", probe, [OWN_OPTIONS])
    add_overrides(parser, "method=NAME and further keys, as for `train`", nargs="+")
    bases = {name: f"{name} ({quantization})" for name, quantization in compatibility.BASES.items()}
    parser.add_argument(
        "--base",
        action="append",
        choices=tuple(bases),
        help=f"how the base model's weights are stored: {', '.join(bases.values())}; may be repeated; default: plain",
    )

    parser = add_command(commands, "quantize-error", quantize_error, [OWN_OPTIONS])
    add_overrides(parser, "model=NAME, unrelated=NAME (text to measure the loss on) and further keys, as for `train`")
    size = "number of weights that share one scale; default: 64"
    parser.add_argument("--blocksize", type=int, default=64, choices=_BLOCK_SIZES, help=size)
    out = "folder to write table and plot to; default: outputs/quantize_error"
    parser.add_argument("--out", type=Path, default=Path("outputs/quantize_error"), metavar="FOLDER", help=out)


def probe(options: argparse.Namespace) -> None:
    """Test whether a method works with the installed library versions.

    Trains a tiny random model on this machine and checks training, gradient
    checkpointing, packing, loading the best model, resuming and merging.

    examples:
      qlora-exp probe method=loha
      qlora-exp probe method=lora lora_variant=dora --base 4bit --base 8bit
    """
    quiet()
    from qlora_exp.config import hydra_compose

    bases = list(dict.fromkeys(options.base or ["plain"]))
    with compatibility.ignored():  # report mistakes before the slow imports
        stored = f"quantization={compatibility.BASES[bases[0]]}"
        name = hydra_compose.compose([*options.overrides, stored, "method.quantized_base=null"]).method.name
    from transformers.utils import logging as transformers_logging

    from qlora_exp.studies.probe import verdicts
    from qlora_exp.utils.tables import print_table

    transformers_logging.disable_progress_bar()
    results = [verdicts(options.overrides, base) for base in bases]
    rows = [[aspect, *(result.get(aspect, "-") for result in results)] for aspect in compatibility.ASPECTS]
    print_table(f"method={name} on a tiny model", ["", *bases], rows)


def quantize_error(options: argparse.Namespace) -> None:
    """Measure what 4-bit and 8-bit quantization costs a model.

    Compares NF4, FP4, INT4 and INT8: error on the model's weights, error on
    normally distributed samples, bits per weight, and the model's loss on text.

    examples:
      qlora-exp quantize-error
      qlora-exp quantize-error model=tiny_llama --blocksize 128
    """
    quiet()
    from qlora_exp.config.hydra_compose import compose

    config = compose(["method=lora", *options.overrides])
    if not config.unrelated.paths:
        raise ConfigError("quantize-error measures the loss on a text: choose one, such as unrelated=python_docs")
    from qlora_exp.studies.quantize_error import study
    from qlora_exp.utils.tables import print_table

    options.out.mkdir(parents=True, exist_ok=True)
    headings, rows = study(config, options.blocksize, options.out)
    print_table(f"{config.model.model_name_or_path}, blocks of {options.blocksize}", headings, rows)
    print("\n".join(f"file  {file}" for file in sorted(options.out.glob("quantize_error.*"))))
