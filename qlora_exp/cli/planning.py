"""`plan`, `advise` and `calibrate`: predict memory and time before anything runs."""

import argparse
import gc
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_exp.cli.parents import OWN_OPTIONS, URI, Commands, add_command, add_overrides
from qlora_exp.libraries.imports import import_quickly
from qlora_exp.planning import calibration, cost, gpus
from qlora_exp.planning.gpus import Gpu
from qlora_exp.utils.digests import json_digest
from qlora_exp.utils.display import say
from qlora_exp.utils.errors import ConfigError, UserError
from qlora_exp.utils.quiet import quiet

if TYPE_CHECKING:
    from qlora_exp.config.schema import Config
    from qlora_exp.planning.planner import Prediction
    from qlora_exp.planning.tables import Planned


def add_parsers(commands: Commands) -> None:
    """Add the three commands."""
    gpu = argparse.ArgumentParser(add_help=False)
    gpu.add_argument("--gpu", metavar="NAME", help=f"GPU to plan for (`plan`: or several, A,B): {', '.join(gpus.GPUS)}")
    gpu.add_argument("--vram", type=float, metavar="GIB", help="memory of the GPU in GiB, if --gpu does not list it")

    parser = add_command(commands, "plan", plan, [gpu, OWN_OPTIONS])
    add_overrides(
        parser, "keys of the config, as for `train`; a list of values (KEY=A,B) gives a row for each combination"
    )
    _add_price(parser)
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="training rows of an epoch, for hours and cost; default: rows on this machine are counted with --price",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="rate at which each GPU sends to the others, for distributed=ddp and fsdp; default: that of --gpu",
    )

    parser = add_command(commands, "advise", advise, [gpu, URI, OWN_OPTIONS])
    _add_price(parser)
    parser.add_argument(
        "--goal",
        choices=("quality", "speed", "memory", "cost"),
        default="quality",
        help="what to choose by, among what fits; default: quality",
    )
    add_overrides(parser, "model=NAME, training.max_length=N, method=A,B, ..., as for `train`")
    parser.add_argument("--models", action="store_true", help="find the largest model for each GPU instead")

    parser = add_command(commands, "calibrate", calibrate, [URI])
    parser.add_argument("--experiment", metavar="NAME", help="use only runs of this MLflow experiment; default: all")


def plan(options: argparse.Namespace) -> None:
    """Predict memory, hours and cost of a run before it starts.

    Needs no GPU and downloads no weights. Shows memory by phase of the run and by
    kind (weights, gradients, ...); with --gpu or --vram also whether the run fits;
    with --gpu and --rows or --price also hours and cost, of several GPUs side by side.

    examples:
      qlora-exp plan model=llama3_8b --gpu rtx4090 training.max_length=1024
      qlora-exp plan model=llama3_8b method=lora,qlora --vram 24
      qlora-exp plan model=llama3_8b --gpu a10 training.max_steps=1000 --price 0.5
      qlora-exp plan model=llama3_8b --rows 20000 --gpu a10,l40s --price a10=0.8,l40s=1.6
      qlora-exp plan model=llama2_13b distributed=fsdp distributed.num_processes=2,4,8 --gpu rtx4090
    """
    quiet()
    from qlora_exp.config import hydra_compose
    from qlora_exp.config.schema import Config
    from qlora_exp.config.tables.optimizers import check_package
    from qlora_exp.models import files

    _refuse_options_as_keys(options)
    if options.bandwidth is not None and not 0 < options.bandwidth < 100_000:
        raise ConfigError(f"--bandwidth {options.bandwidth:g}: not a rate in GB/s")
    cards, cpu = _gpus(options, gpus.of_this_machine()), gpus.this_cpu().calibrated(calibration.read())
    prices = cost.prices(options.price, cards)
    cost.check_rows(options.rows, options.overrides)
    if options.bandwidth is not None:
        cards = [replace(device, link_gb_per_s=options.bandwidth) for device in cards]
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
    if (options.gpu or options.vram) and all(config.device == "cpu" for config in valid_configs):
        raise ConfigError("--gpu, --vram: device=cpu is planned for the CPU of this machine; leave them out")
    _say_formats(valid_configs)
    _import_planner()
    from qlora_exp.planning import tables

    lengths = cost.Lengths(options.rows) if options.rows or prices else None
    predictions: dict[str, Prediction] = {}  # of all runs: seeds and learning rates change no plan
    planned = [
        run
        for words, config in zip(jobs, composed, strict=True)
        for run in _planned(words, config, cards, cpu, lengths, predictions, alone=len(jobs) == 1)
    ]
    if len(planned) == 1:
        tables.show_one(planned[0], prices.get(planned[0].gpu.name))
        _show_remedies(planned[0])
    else:
        tables.show_many(planned, prices)
    if hydra_compose.sweeper(options.overrides) == "tuned":
        _show_trials(planned)


def _show_trials(planned: Sequence["Planned"]) -> None:
    """Print what the trials of a tuned comparison add to its final runs."""
    from qlora_exp.planning import tables
    from qlora_exp.sweeps.rungs import rungs

    one = next((run.config for run in planned if run.config), None)
    if one is None:
        return
    steps = rungs(one, one.tuning)
    share = sum(each.trials * each.share for each in steps)
    seeds = len({word for run in planned for word in run.words if word.startswith("seed=")}) or 1
    *shorter, last = steps
    parts = [f"{each.trials} with 1/{round(1 / each.share)} of the steps" for each in shorter]
    trials = " and ".join([*filter(None, [", ".join(parts)]), f"{last.trials} with all steps"])
    tables.note(
        "trials",
        f"each row also has trials, {trials}, which take as long as {share:.3g} final runs: the whole comparison "
        f"takes {1 + share / seeds:.3g} times the hours of the final runs above",
    )


def _show_remedies(planned: "Planned") -> None:
    """Print with which settings a run would fit that does not, or only may; a few more runs are planned for it."""
    from qlora_exp.planning import tables
    from qlora_exp.planning.guidance.remedies import advice, remedies

    judged = tables.judged(planned)
    if planned.config and judged in ("does not fit", "may fit"):
        found = remedies(planned.config, planned.gpu)
        if found or judged == "does not fit":
            tables.note("instead", advice(found, planned.gpu))


def _planned(
    words: Sequence[str],
    config: "Config | UserError",
    cards: Sequence[Gpu],
    cpu: Gpu,
    lengths: cost.Lengths | None,
    predictions: "dict[str, Prediction]",
    alone: bool,
) -> "Iterator[Planned]":
    """Plan a run for each card; runs that are planned alike on cards on which they resolve alike share a prediction.

    Raises:
        UserError: the only run cannot be planned.
    """
    from qlora_exp.planning import tables, tuning
    from qlora_exp.planning.planner import Planner, resolved_on

    if isinstance(config, UserError):
        yield tables.Planned(words, None, None, cards[0], why=str(config))
        return
    try:
        asked = lengths is not None or config.training.max_steps > 0
        amount = (lengths or cost.Lengths()).of(config) if asked else tables.UNASKED
        for card in [cpu] if config.device == "cpu" else cards:
            resolved = tuning.planned(config, resolved_on(config, card.device), card)
            alike = json_digest([calibration.planned_values(config), repr(replace(resolved, device_name=""))])
            if alike not in predictions:
                predictions[alike] = Planner(config, resolved).predict()
            yield tables.Planned(words, config, predictions[alike], card, amount, resolved.tuned)
    except UserError as error:
        if alone:
            raise
        yield tables.Planned(words, None, None, cards[0], why=str(error))


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

    Shows for each method what it takes (memory, largest batch, longest sequence, time
    and cost of 1,000 examples) and what is known of its quality: from runs in the
    MLflow store on the same model and rows, else what is published. Says which one to
    take, why, and with which settings. Without --gpu or --vram, for GPUs of 4 to 80 GiB.

    examples:
      qlora-exp advise model=llama3_8b --gpu rtx4090
      qlora-exp advise model=llama3_8b method=lora,qlora --vram 24
      qlora-exp advise model=llama3_8b --gpu l4 --price 0.7 --goal cost
      qlora-exp advise --models training.max_length=512
    """
    quiet()
    from rich.console import Console

    from qlora_exp.planning import advisor

    _refuse_options_as_keys(options)
    gpu, *more = _gpus(options)
    if more:
        raise ConfigError("advise is about one GPU: --gpu NAME; `qlora-exp plan --gpu A,B` shows several side by side")
    price = cost.prices(options.price, [gpu]).get(gpu.name)
    if options.goal == "cost" and price is None:
        raise ConfigError("--goal cost needs the price of the GPU: --gpu NAME --price PER_HOUR")
    advisor.check(options.overrides, options.models)
    _import_planner()
    from qlora_exp.planning import tables
    from qlora_exp.planning.guidance import tables as advice

    cards = advisor.cards(gpu)
    console, done = Console(stderr=True), itertools.count(1)
    with console.status("planning") as status:

        def report(what: str) -> None:
            status.update(f"planning: {what}")
            if next(done) % 20 == 0 and not console.is_terminal:
                console.print(f"planning: {what}", highlight=False, markup=False)

        if options.models:
            sized, why = advisor.models(options.overrides, gpu, report)
        else:
            fitting, why = advisor.options(options.overrides, gpu, cards, report)
    if options.models:
        tables.show_models(sized, why, cards)
    elif gpu.memory_gib:
        from qlora_exp.studies.measured_quality import measured

        found, notes = measured(options.uri, {option.name: option.config for option in fitting})
        advice.show_card(fitting, why, gpu, options.goal, price, found, str(options.config_dir or ""))
        for text in notes:
            tables.note("measured", text)
    else:
        advice.show_cards(fitting, why, cards, options.goal)


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
        if key in ("gpu", "vram", "price", "rows", "bandwidth", "goal") and key in options:  # `advise` has no --rows
            raise ConfigError(f"{key}: no such key or group; did you mean --{key} {value}?")


def _gpus(options: argparse.Namespace, default: Gpu | None = None) -> list[Gpu]:
    """Return the GPUs of --gpu, or that of --vram, or `default`, with the corrections that `calibrate` wrote."""
    if options.gpu and options.vram:
        raise ConfigError("--gpu and --vram: give one of them")
    if options.vram is not None and not 0 < options.vram < 10_000:
        raise ConfigError(f"--vram {options.vram:g}: not the memory of a GPU in GiB")
    named = [Gpu("GPU", options.vram)] if options.vram else [default or Gpu("GPU", 0.0)]
    found = gpus.find_all(options.gpu) if options.gpu else named
    return [gpu.calibrated(calibration.read()) for gpu in found]


def _add_price(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--price",
        metavar="PER_HOUR",
        help="price of a GPU per hour, in any currency, to show cost; of several NAME=PRICE,...; needs --gpu",
    )


def _import_planner() -> None:
    # Nothing is compiled here, and importing the compiler takes a second.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    gc.disable()  # saves a fifth of the imports' time
    import_quickly()
    from transformers.utils import logging as transformers_logging

    import qlora_exp.planning.planner  # noqa: F401

    gc.enable()
    gc.freeze()
    transformers_logging.disable_progress_bar()
