"""What the commands beside `train` do: each takes its options, prints, and raises what the user can mend.

Imports nothing heavy until a command must.
"""

import argparse
import gc
import logging
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from qlora_exp.planning import calibration, gpus
from qlora_exp.planning.gpus import Gpu
from qlora_exp.utils.errors import ConfigError, JournalError, TrackingError, UserError
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.secrets import redact


def keys(chosen: str | None) -> None:
    """What each key of the config means, of one section, one key or of all; its type, default and value as shipped."""
    from pydantic import BaseModel

    from qlora_exp.config import hydra_compose, peft_methods
    from qlora_exp.config.schema import Config
    from qlora_exp.config.sections.base import PeftSettings
    from qlora_exp.config.validate import known_keys
    from qlora_exp.utils.errors import did_you_mean

    fields = Config.model_fields
    known = [*fields, *known_keys()]
    if chosen not in (None, *known):
        own = [key for key in known if key.endswith(f".{chosen}")]
        hint = f"; did you mean '{own[0]}'?" if own else did_you_mean(str(chosen), known)
        raise ConfigError(f"no section or key '{chosen}'{hint} Sections: {', '.join(fields)}")
    section, _, key = (chosen or "").partition(".")
    shipped = hydra_compose.compose([])
    for name, field in fields.items():
        if section not in ("", name):
            continue
        kind, values = field.annotation, getattr(shipped, name)
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            print(_key(name, field, values))
            continue
        if not key:
            print(f"\n{name}: {(kind.__doc__ or '').strip()}")
        for one, inner in kind.model_fields.items():
            if key in ("", one):
                print(_key(f"  {one}", inner, getattr(values, one)))
        if issubclass(kind, PeftSettings) and key not in kind.model_fields:
            print(f"  and for LoRA: {', '.join(peft_methods.settings('LORA'))}")


def _key(name: str, field: Any, shipped: Any) -> str:
    also = f"; {shipped!r} in the default run" if shipped != field.default and not isinstance(shipped, dict) else ""
    means = f"\n      {field.description}" if field.description else ""
    return f"{name}: {_type(field.annotation)} = {field.default!r}{also}{means}"


def _type(kind: Any) -> str:
    """A type as a user would write its values."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(_type, inner)))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type, inner))}]"
    return "null" if kind is NoneType else getattr(kind, "__name__", str(kind))


def compare(options: argparse.Namespace) -> None:
    """A table of runs, and its files."""
    quiet()
    from qlora_exp.results import compare, records, report

    if options.metric not in compare.METRICS and not re.fullmatch(r"lm_eval/.+/.+", options.metric):
        known = ", ".join(compare.METRICS)
        raise ConfigError(f"--metric {options.metric}: choose one of {known} or lm_eval/TASK/METRIC")
    if options.preset not in report.PRESETS:
        raise ConfigError(f"--preset {options.preset}: choose one of {', '.join(report.PRESETS)}")
    runs = records.find(options.uri, options.chosen, options.experiment, options.filter)
    found = compare.compare(runs, options.metric, options.baseline)
    report.show(found, options.preset)
    for file in report.write(found, options.out, options.preset) if options.out else ():
        print(f"file  {file}")
    if options.log:
        if (parent := report.log(found, options.uri, options.preset)) is None:
            raise ConfigError("--log: these runs are not of one sweep")
        print(f"report in MLflow's run {parent}")


def reproduce(options: argparse.Namespace) -> None:
    """A recorded run again, with a verdict; a drift is an error."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    quiet()
    from qlora_exp.config.untrusted import given
    from qlora_exp.results import records, reproduce

    record = reproduce.one_record(options.uri, options.run)
    config = reproduce.recorded_config(record, given(options.changes), options.uri)
    print(f"run {record.run_id} {record.name}")
    for line in (causes := reproduce.differences(record, config)):
        print(f"differs  {line}")
    if not causes:
        print("nothing that was recorded differs: config, data, base model, code, libraries, threads")
    if options.check_only:
        return
    folder = options.out or reproduce.free_folder(record)
    run_id = reproduce.start(record, config, folder)
    (again,) = records.find(options.uri, [run_id])
    verdict = reproduce.judge(record, again, config)
    print(f"files  {folder}\nrun    {run_id}\n{verdict.grade}: {verdict.why}")
    if verdict.grade == reproduce.DRIFTED:
        raise TrackingError(f"run {run_id} is not what run {record.run_id} was")


def bundle(options: argparse.Namespace) -> None:
    """A recorded run as a folder or zip."""
    quiet()
    from qlora_exp.results import bundle, reproduce

    record = reproduce.one_record(options.uri, options.run)
    target = options.out or Path(f"{record.run_id}.zip")
    bundle.write(record, target)
    print(f"{target}: run {record.run_id} {record.name}")
    again = f"qlora-exp reproduce {target}"
    print(
        f"run it again anywhere: {again}"
        if record.outcome == "ok"
        else f"it ended {record.outcome}: {again} --check-only"
    )


def sync(folders: Sequence[Path], uri: str | None) -> None:
    """Send MLflow what the runs in these folders could not; one that cannot be read does not hold up the others."""
    from qlora_exp.tracking import journal

    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ConfigError(f"no folder {', '.join(map(str, missing))} in {Path.cwd()}")
    unread: list[OSError | JournalError] = []
    late: list[Path] = []
    sent = 0
    walk = (entry for root in folders for entry in os.walk(root, onerror=unread.append))
    for folder in sorted(Path(at) for at, below, files in walk if journal.FILE in (*below, *files)):
        try:
            if journal.is_settled(folder, uri) or journal.is_held(folder):
                continue
            quiet()
            from qlora_exp.tracking import recovery

            if recovery.finish(folder, "killed", "its process is gone", uri):
                sent += 1
            else:
                late.append(folder)
        except (JournalError, OSError) as error:
            unread.append(error)
    for one in unread:
        print(f"warning: not all of it can be read: {one}", file=sys.stderr)
    problems = [f"{len(unread)} runs or folders could not be read whole (above)"] * bool(unread)
    problems += [f"MLflow did not take everything of {', '.join(map(str, late))}; try again later"] * bool(late)
    if problems:
        raise TrackingError(f"{sent} runs sent; {'; '.join(problems)}")
    print(f"{sent} runs sent; MLflow has everything of all runs under {', '.join(map(str, folders))}")


def ui(uri: str | None, host: str, port: int) -> None:
    """MLflow's server in place of this process, or the address of one that is there."""
    store = Path.cwd() / "mlruns" / "mlflow.db"
    if uri is None and not store.is_file():
        raise TrackingError(f"no runs yet: {store} is not there; run `qlora-exp train` here first")
    if not (uri or "").startswith("http"):
        is_free(host, port)
    quiet()
    from qlora_exp.results import records

    address = uri or f"sqlite:///{store}"
    if address.startswith("http"):
        print(f"MLflow's UI: {redact(records.page(uri, address))}")
        return
    page = records.page(uri, f"http://{host}:{port}")
    print(f"MLflow's UI on {redact(address)}, in a few seconds (Ctrl-C ends it):\n{page}", flush=True)
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | dict(os.environ)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", address, "--workers", "1"]
    # In place of this process, so that whatever ends it ends the server.
    os.execve(sys.executable, [*command, "--host", host, "--port", str(port)], environment)


def is_free(host: str, port: int) -> None:
    """That a server can begin there.

    Raises:
        ConfigError: it cannot.
    """
    try:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot serve at {host}:{port}: {error}; choose another: --port NUMBER") from error


def probe(options: argparse.Namespace) -> None:
    """Whether a method works here, tried on a tiny model."""
    quiet()
    from qlora_exp.config import compatibility, hydra_compose

    bases = list(dict.fromkeys(options.base or ["plain"]))
    with compatibility.ignored():  # a wrong name is told before anything slow is imported
        stored = f"quantization={compatibility.BASES[bases[0]]}"
        name = hydra_compose.compose([*options.overrides, stored, "method.quantized_base=null"]).method.name
    from transformers.utils import logging as transformers_logging

    from qlora_exp.studies import probe
    from qlora_exp.utils.tables import print_table

    transformers_logging.disable_progress_bar()
    found = [probe.verdicts(options.overrides, base) for base in bases]
    rows = [[aspect, *(verdicts.get(aspect, "-") for verdicts in found)] for aspect in compatibility.ASPECTS]
    print_table(f"method={name} on a tiny model", ["", *bases], rows)


def quantize_error(options: argparse.Namespace) -> None:
    """What storing a model's weights in few bits loses."""
    quiet()
    from qlora_exp.config.hydra_compose import compose

    config = compose(["method=lora", *options.overrides])
    if not config.unrelated.paths:
        raise ConfigError("quantize-error takes the model's loss on unrelated text: choose one, unrelated=python_docs")
    from qlora_exp.studies import quantize_error as quantization_lab
    from qlora_exp.utils.tables import print_table

    options.out.mkdir(parents=True, exist_ok=True)
    title = f"{config.model.model_name_or_path}, blocks of {options.blocksize}"
    headings, rows = quantization_lab.study(config, options.blocksize, options.out)
    print_table(title, headings, rows)
    print("\n".join(f"file  {file}" for file in sorted(options.out.glob("quantize_error.*"))))


def plan(options: argparse.Namespace) -> None:
    """Memory by phase and the time of a step, of one run or of each of a sweep."""
    quiet()
    from qlora_exp.config import hydra_compose
    from qlora_exp.config.hydra_compose import grid
    from qlora_exp.config.schema import Config

    if options.price is not None and (options.price < 0 or not options.gpu):
        raise ConfigError("--price: an amount an hour of a GPU that is named: --gpu NAME --price AMOUNT")
    gpu, cpu = _gpu(options), gpus.this_cpu().calibrated(calibration.read())
    jobs = grid(options.overrides)
    composed: list[Config | UserError] = []
    for words in jobs:  # a mistake is told before anything slow is imported
        try:
            composed.append(hydra_compose.compose(words))
        except UserError as error:
            composed.append(error)
    if isinstance(composed[0], UserError) and len(jobs) == 1:
        raise composed[0]
    _import_planner()
    from qlora_exp.planning import tables
    from qlora_exp.planning.planner import planner

    planned = []
    for words, checked in zip(jobs, composed, strict=True):
        try:
            if isinstance(checked, UserError):
                raise checked
            on = cpu if checked.device == "cpu" else gpu
            planned.append(tables.Planned(words, checked, planner(checked, on.device).predict(), on))
        except UserError as error:
            if len(jobs) == 1:
                raise
            planned.append(tables.Planned(words, None, None, gpu, str(error)))
    if len(planned) == 1:
        tables.show_one(planned[0], options.price)
    else:
        tables.show_many(planned, options.price)


def advise(options: argparse.Namespace) -> None:
    """Which methods fit a card, how large a batch, how long a row; or which models."""
    quiet()
    from rich.console import Console

    from qlora_exp.planning import advisor

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
            found, why = advisor.options(options.overrides, gpu, cards, report)
    if options.models:
        tables.show_models(sized, why, cards)
    elif gpu.memory_gib:
        tables.show_card(found, why, gpu)
    else:
        tables.show_cards(found, why, cards)


def calibrate(options: argparse.Namespace) -> None:
    """What runs took against what was planned for them, by kind of device; plans made here use it from now on."""
    quiet()
    from qlora_exp.results import records
    from qlora_exp.utils.tables import print_table

    runs = records.find(options.uri, [], options.experiment, "metrics.`plan/memory_ratio` > 0")
    found, left_out = calibration.fit(runs)
    rows = [
        [
            one.device,
            str(one.runs),
            f"{one.offset_mib:,.0f} + {one.slope:.3f} x plan",
            f"{one.median_error:.1%}",
            f"{one.worst_error:.1%}",
            "-" if one.flops_per_second is None else f"{one.flops_per_second / 1e9:,.0f}",
            "-" if one.time_error is None else f"{one.time_error:.0%}",
        ]
        for one in found.values()
    ]
    headings = ["device", "runs", "MiB", "median", "worst error", "GFLOP/s", "error"]
    if rows:
        print_table("each run expected as the others say", headings, rows)
        print(f"file  {calibration.write(found.values())}, which `plan` and `advise` read")
    for told in left_out:
        print(f"left out  {told}")


def _gpu(options: argparse.Namespace) -> Gpu:
    """The one that --gpu or --vram say, with what runs on it said."""
    if options.gpu and options.vram:
        raise ConfigError("--gpu and --vram: give one of them")
    if options.vram is not None and not 0 < options.vram < 10_000:
        raise ConfigError(f"--vram {options.vram:g}: not the memory of a GPU in GiB")
    known = gpus.find(options.gpu) if options.gpu else gpus.Gpu("GPU", options.vram or 0.0)
    return known.calibrated(calibration.read())


def _import_planner() -> None:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled, and its imports take a second
    gc.disable()  # a fifth of the imports' time
    from transformers.utils import logging as transformers_logging

    import qlora_exp.planning.planner  # noqa: F401

    gc.enable()
    gc.freeze()
    transformers_logging.disable_progress_bar()
