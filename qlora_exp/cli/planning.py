"""`plan`, `advise` and `calibrate`: predict memory and time before anything runs."""

import argparse
import gc
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_exp.cli.parents import URI, Commands, add_command, add_overrides
from qlora_exp.planning import calibration, gpus
from qlora_exp.planning.gpus import Gpu
from qlora_exp.utils.display import say
from qlora_exp.utils.errors import ConfigError, UserError
from qlora_exp.utils.quiet import quiet

if TYPE_CHECKING:
    from qlora_exp.config.schema import Config


def add_parsers(commands: Commands) -> None:
    """Add the three commands."""
    gpu = argparse.ArgumentParser(add_help=False)
    gpu.add_argument("--gpu", metavar="NAME", help=f"GPU to plan for: {', '.join(gpus.GPUS)}")
    gpu.add_argument("--vram", type=float, metavar="GIB", help="memory of the GPU in GiB, if --gpu does not list it")

    parser = add_command(commands, "plan", plan, [gpu])
    add_overrides(
        parser, "keys of the config, as for `train`; a list of values (KEY=A,B) gives a row for each combination"
    )
    parser.add_argument(
        "--price",
        type=float,
        metavar="PER_HOUR",
        help="price of the GPU per hour, to show the cost of the run; needs --gpu",
    )

    parser.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="rate at which each GPU sends to the others, for distributed=ddp and fsdp; default: that of --gpu",
    )

    parser = add_command(commands, "advise", advise, [gpu])
    add_overrides(parser, "model=NAME, training.max_length=N, method=A,B, ..., as for `train`")
    parser.add_argument("--models", action="store_true", help="find the largest model for each GPU instead")

    parser = add_command(commands, "calibrate", calibrate, [URI])
    parser.add_argument("--experiment", metavar="NAME", help="use only runs of this MLflow experiment; default: all")


def plan(options: argparse.Namespace) -> None:
    """Predict the memory and the step time of a run before it starts.

    Needs no GPU and downloads no weights. Shows memory by phase of the run and by
    kind (weights, gradients, ...); with --gpu or --vram also whether the run fits.

    examples:
      qlora-exp plan model=llama3_8b --gpu rtx4090 training.max_length=1024
      qlora-exp plan model=llama3_8b method=lora,qlora --vram 24
      qlora-exp plan model=llama3_8b --gpu a10 training.max_steps=1000 --price 0.5
      qlora-exp plan model=llama2_13b distributed=fsdp distributed.num_processes=2,4,8 --gpu rtx4090
    """
    quiet()
    from qlora_exp.config import hydra_compose
    from qlora_exp.config.schema import Config
    from qlora_exp.config.tables.optimizers import check_package
    from qlora_exp.models import files

    _refuse_options_as_keys(options)
    if options.price is not None and (options.price < 0 or not options.gpu):
        raise ConfigError("--price: must not be negative, and needs the GPU's name: --gpu NAME --price PER_HOUR")
    if options.bandwidth is not None and not 0 < options.bandwidth < 100_000:
        raise ConfigError(f"--bandwidth {options.bandwidth:g}: not a rate in GB/s")
    gpu, cpu = _gpu(options), gpus.this_cpu().calibrated(calibration.read())
    if options.bandwidth is not None:
        gpu, cpu = (replace(device, link_gb_per_s=options.bandwidth) for device in (gpu, cpu))
    jobs = hydra_compose.grid(options.overrides)
    composed: list[Config | UserError] = []
    for words in jobs:  # report mistakes before the slow imports
        try:
            valid = hydra_compose.compose(words)
            files.check(valid, trains=False)
            check_package(valid.optimizer.optim)
            composed.append(valid)
        except UserError as error:
            composed.append(error)
    valid_configs = [config for config in composed if isinstance(config, Config)]
    if not valid_configs:
        raise ConfigError("\n".join(dict.fromkeys(map(str, composed))))
    _say_formats(valid_configs)
    _import_planner()
    from qlora_exp.planning import tables, tuning
    from qlora_exp.planning.planner import Planner, resolved_on

    planned = []
    for words, config in zip(jobs, composed, strict=True):
        try:
            if isinstance(config, UserError):
                raise config
            device = cpu if config.device == "cpu" else gpu
            resolved = tuning.planned(config, resolved_on(config, device.device), device)
            prediction = Planner(config, resolved).predict()
            planned.append(tables.Planned(words, config, prediction, device, tuned=resolved.tuned))
        except UserError as error:
            if len(jobs) == 1:
                raise
            planned.append(tables.Planned(words, None, None, gpu, str(error)))
    if len(planned) == 1:
        tables.show_one(planned[0], options.price)
    else:
        tables.show_many(planned, options.price)


def _say_formats(configs: Sequence["Config"]) -> None:
    """Say how rows on this machine would be read (`dataset.format=auto`); a plan does not need them."""
    from qlora_exp.config.sections.dataset import is_url, looks_local
    from qlora_exp.config.sections.mixture import REPLAY, of_source
    from qlora_exp.data.reading.recognize import recognized_in

    parts = [(name, part) for config in configs for name, part in config.dataset.parts.items()]
    parts += [(REPLAY, config.unrelated) for config in configs if config.unrelated.paths]
    parts = [(name, part) for name, part in parts if part.format == "auto"]
    for name, part in {part.model_dump_json(): (name, part) for name, part in parts}.values():
        if looks_local(part.path) and not is_url(part.path):
            try:
                say(of_source(recognized_in(part).line(part), name))
            except UserError as error:
                say(of_source(f"a run would be refused: {error}", name))


def advise(options: argparse.Namespace) -> None:
    """Recommend method, batch size and sequence length for a GPU.

    Shows for each method its largest batch and its longest sequence, and says
    whether to use LoRA or QLoRA and why. Without --gpu or --vram, shows this for GPUs
    of 4 to 80 GiB.

    examples:
      qlora-exp advise model=llama3_8b --gpu rtx4090
      qlora-exp advise model=llama3_8b method=lora,qlora --vram 24
      qlora-exp advise --models training.max_length=512
    """
    quiet()
    from rich.console import Console

    from qlora_exp.planning import advisor

    _refuse_options_as_keys(options)
    gpu = _gpu(options)
    advisor.check(options.overrides, options.models)
    _import_planner()
    from qlora_exp.planning import tables

    cards = advisor.cards(gpu)
    with Console(stderr=True).status("planning") as status:

        def report(what: str) -> None:
            status.update(f"planning: {what}")

        if options.models:
            sized, why = advisor.models(options.overrides, gpu, report)
        else:
            fitting, why = advisor.options(options.overrides, gpu, cards, report)
    if options.models:
        tables.show_models(sized, why, cards)
    elif gpu.memory_gib:
        tables.show_card(fitting, why, gpu)
    else:
        tables.show_cards(fitting, why, cards)


def calibrate(options: argparse.Namespace) -> None:
    """Fit a per-device correction of planned memory from recorded runs.

    Compares the memory that runs used with what was planned for them, and writes
    mlruns/calibration.json, which `plan` and `advise` use from then on.
    """
    quiet()
    from qlora_exp.results import records
    from qlora_exp.utils.tables import print_table

    runs = records.find(options.uri, [], options.experiment, "metrics.`plan/memory_ratio` > 0")
    fits, left_out = calibration.fit(runs)
    rows = [
        [
            fit.device,
            str(fit.runs),
            f"{fit.offset_mib:,.0f} + {fit.slope:.3f} x plan",
            f"{fit.median_error:.1%}",
            f"{fit.worst_error:.1%}",
            "-" if fit.flops_per_second is None else f"{fit.flops_per_second / 1e9:,.0f}",
            "-" if fit.time_error is None else f"{fit.time_error:.0%}",
        ]
        for fit in fits.values()
    ]
    headings = ["device", "runs", "MiB", "median error", "worst error", "GFLOP/s", "time error"]
    if rows:
        print_table(
            "measured memory predicted from planned memory; errors on plans left out of the fit", headings, rows
        )
        print(f"file  {calibration.write(fits.values())}, which `plan` and `advise` read")
    for reason in left_out:
        say(f"left out  {reason}")


def _refuse_options_as_keys(options: argparse.Namespace) -> None:
    for word in options.overrides:
        key, _, value = word.partition("=")
        if key in ("gpu", "vram", "price", "bandwidth") and key in options:  # `advise` has no --price
            raise ConfigError(f"{key}: no such key or group; did you mean --{key} {value}?")


def _gpu(options: argparse.Namespace) -> Gpu:
    """Return the GPU of --gpu or --vram, with the correction that `calibrate` wrote."""
    if options.gpu and options.vram:
        raise ConfigError("--gpu and --vram: give one of them")
    if options.vram is not None and not 0 < options.vram < 10_000:
        raise ConfigError(f"--vram {options.vram:g}: not the memory of a GPU in GiB")
    gpu = gpus.find(options.gpu) if options.gpu else Gpu("GPU", options.vram or 0.0)
    return gpu.calibrated(calibration.read())


def _import_planner() -> None:
    # Nothing is compiled here, and importing the compiler takes a second.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    gc.disable()  # saves a fifth of the imports' time
    from transformers.utils import logging as transformers_logging

    import qlora_exp.planning.planner  # noqa: F401

    gc.enable()
    gc.freeze()
    transformers_logging.disable_progress_bar()
