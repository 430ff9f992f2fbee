"""`runs`, `compare`, `ui`, `reproduce`, `bundle` and `sync`: use recorded runs."""

import argparse
import logging
import os
import re
import shlex
import sys
from pathlib import Path

from qlora_exp.cli import ports
from qlora_exp.cli.failures import full_disk_named
from qlora_exp.cli.parents import RUN, URI, Commands, add_command, add_overrides
from qlora_exp.utils.display import say
from qlora_exp.utils.errors import ConfigError, NoRunsError, TrackingError
from qlora_exp.utils.names import valid_names
from qlora_exp.utils.notice import notice_if_slow
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.secrets import redact

_USUAL_FOLDERS = (Path("outputs"), Path("multirun"))
"""Folders in which `train` writes runs and sweeps."""


def add_parsers(commands: Commands) -> None:
    """Add the six commands."""
    parser = add_command(commands, "runs", list_runs, [URI])
    which = "names of sweeps; run ids, run keys, names or output folders of runs; default: all runs"
    parser.add_argument("chosen", nargs="*", metavar="SWEEP|RUN", help=which)
    parser.add_argument("--experiment", metavar="NAME", help="list runs of this MLflow experiment only")
    parser.add_argument("--filter", help='list only runs that match this MLflow filter, such as "metrics.steps > 10"')
    shown = "config keys, tags or metrics to show too; also run_id, and user, which is shown if there are several"
    parser.add_argument("--columns", default="", metavar="KEY,...", help=shown)
    parser.add_argument("--sort", metavar="KEY", help="config key, tag or metric to sort by, the smallest first")
    parser.add_argument("--reverse", action="store_true", help="list in the reverse order")
    parser.add_argument("--limit", type=int, default=50, metavar="N", help="most runs to list; 0: all; default: 50")

    parser = add_command(commands, "compare", compare, [URI])
    chosen = "names of sweeps; run ids, run keys, names or output folders of runs; default: the newest sweep"
    parser.add_argument("chosen", nargs="*", metavar="SWEEP|RUN", help=chosen)
    parser.add_argument(
        "--experiment", metavar="NAME", help="compare runs of this MLflow experiment; without SWEEP|RUN: all its runs"
    )
    parser.add_argument(
        "--filter", help="compare only runs that match this MLflow filter, such as \"params.`method.name` = 'lora'\""
    )
    baseline = "row to compare with, by a part of its name, such as method=lora; default: the first row"
    parser.add_argument("--baseline", metavar="ROW", help=baseline)
    metrics = (
        "metric to compare: loss (default), rougeL, exact_match, task_score, unrelated_loss, source_loss/NAME (of one "
        "source of a mixture), lm_eval/TASK/METRIC, or metric/NAME of an installed package"
    )
    parser.add_argument("--metric", default="loss", help=metrics)
    parser.add_argument(
        "--preset",
        default="all",
        help="columns: all (default), cost (parameters, memory, time, quality), short, or shortest (only quality)",
    )
    rows = "most rows to print, of more the best and the worst; 0: all; default: 40"
    parser.add_argument("--rows", type=int, default=40, metavar="N", help=rows)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder to write the table to as well, as .csv, .json, .md and .html"
    )
    parser.add_argument("--log", action="store_true", help="also save the table with the sweep's run in MLflow")

    parser = add_command(commands, "ui", ui, [URI])
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; default: this machine only")
    parser.add_argument("--port", type=int, default=5000, help="port to serve on; default: 5000")

    parser = add_command(commands, "reproduce", reproduce, [URI])
    parser.add_argument(
        "run",
        metavar="RUN|BUNDLE",
        help="run id, run key, name or output folder of a run; or a file or folder that `bundle` wrote",
    )
    add_overrides(parser, "keys to change for this machine, such as dataset.path=FILE")
    parser.add_argument("--check-only", action="store_true", help="only list what differs from the recorded run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="output folder; default: outputs/reproduced/RUN_ID")

    parser = add_command(commands, "bundle", bundle, [RUN, URI])
    parser.add_argument("--out", type=Path, metavar="PATH", help="folder or .zip file to write; default: RUN_ID.zip")

    parser = add_command(commands, "sync", sync)
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="folders to search for runs; default: outputs and multirun",
    )
    uri = (
        "MLflow tracking URI; default: the one each run was started with, if you have sent runs there before (also if "
        "MLFLOW_TRACKING_URI is another)"
    )
    parser.add_argument("--uri", help=uri)


def compare(options: argparse.Namespace) -> None:
    """Compare runs: what differs, cost, quality, statistical significance.

    Prints a row for each configuration, averaged over seeds, and tests whether its
    difference from the baseline row is more than chance. Repetitions made by
    `reproduce` appear only if named.

    examples:
      qlora-exp compare                                  the newest sweep
      qlora-exp compare rank_scaling --metric rougeL --out report
      qlora-exp compare --experiment smollm2_faq         every run of an experiment
    """
    quiet()
    from qlora_exp.results import compare as comparing
    from qlora_exp.results import records, report

    if options.metric not in comparing.METRICS and not re.fullmatch(
        r"lm_eval/.+/.+|source_loss/.+|metric/.+", options.metric
    ):
        metrics = ", ".join(comparing.METRICS)
        others = "source_loss/NAME, lm_eval/TASK/METRIC or metric/NAME"
        raise ConfigError(f"--metric {options.metric}: choose one of {metrics}, {others}")
    if options.preset not in report.PRESETS:
        raise ConfigError(f"--preset {options.preset}: choose one of {', '.join(report.PRESETS)}")
    runs = records.find(options.uri, options.chosen, options.experiment, options.filter)
    metric = valid_names([options.metric])[options.metric]  # as a run names it
    comparison = comparing.compare(runs, metric, options.baseline)
    report.show(comparison, options.preset, options.rows)
    for file in report.write(comparison, options.out, options.preset) if options.out else ():
        say(f"file  {file}")
    if options.log:
        if (parent := report.log(comparison, options.uri, options.preset)) is None:
            raise ConfigError("--log: these runs do not belong to one sweep")
        print(f"report saved with run {parent} in MLflow")


def list_runs(options: argparse.Namespace) -> None:
    """List recorded runs, newest first, or show everything of one.

    Lists also runs that failed, and repetitions. In notebooks, `qlora_exp.runs()` gives
    them as a pandas DataFrame.

    examples:
      qlora-exp runs                                     the last 50
      qlora-exp runs --sort after/loss --columns method.r,training.learning_rate
      qlora-exp runs --filter "tags.outcome = 'oom'"
      qlora-exp runs RUN_ID                              config, metrics, how it ended
    """
    quiet()
    from qlora_exp.results import listing, records

    found = records.every(options.uri, options.chosen, options.experiment, options.filter)
    if not found:
        chosen = ", ".join([*options.chosen, options.filter or ""]).strip(", ")
        raise TrackingError(f"MLflow has no runs of {chosen or 'this tool'} there")
    if options.chosen and len(found) == 1:
        listing.show_one(found[0])
    else:
        columns = list(filter(None, options.columns.split(",")))
        listing.show_list(found, columns, options.sort, options.reverse, options.limit)


def ui(options: argparse.Namespace) -> None:
    """Start MLflow's web page for the runs recorded here.

    Serves the MLflow store in ./mlruns until Ctrl-C and prints the page's address. If
    --uri is a tracking server, only prints the address of its page.
    """
    from qlora_exp.tracking.stores import sqlite_store, uris

    address = uris.store_uri(options.uri)
    file = sqlite_store.sqlite_file(address)
    if file is not None and not file.is_file():
        raise NoRunsError(f"no runs yet: {file} does not exist; run `qlora-exp train` here first, or give --uri")
    if not address.startswith("http"):
        ports.require_free(options.host, options.port)
    quiet()
    from qlora_exp.results import records

    if address.startswith("http"):
        say(f"MLflow's UI: {records.page(options.uri, address)}")
        return
    page = records.page(options.uri, f"http://{options.host}:{options.port}")
    say(f"MLflow's UI for {address} starts in a few seconds (Ctrl-C stops it):", page)
    sys.stdout.flush()
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | dict(os.environ)
    if file is not None and not os.access(file, os.W_OK):
        address = sqlite_store.read_only_uri(file)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", address, "--workers", "1"]
    # Replace this process by the server, so that whatever ends the process ends the server.
    os.execve(sys.executable, [*command, "--host", options.host, "--port", str(options.port)], environment)


def reproduce(options: argparse.Namespace) -> None:
    """Repeat a recorded run and check that the result is the same.

    First lists what differs from the recorded run: config, data, base model, code,
    libraries, threads. Fails if the new result is not the same and the difference is
    larger than between recorded runs with other seeds.

    examples:
      qlora-exp reproduce RUN_ID --check-only
      qlora-exp reproduce RUN_ID dataset.path=here/rows.jsonl
      qlora-exp reproduce RUN_ID.zip                     written by `bundle`; needs no MLflow store
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    quiet()
    from qlora_exp.config.untrusted import given
    from qlora_exp.results import records
    from qlora_exp.results import reproduce as reproducing

    record = reproducing.find_run(options.uri, options.run)
    config = reproducing.recorded_config(record, given(options.overrides), options.uri, to_run=not options.check_only)
    say(f"run {record.run_id} {record.name}")
    differences = reproducing.differences(record, config)
    say(*(f"differs  {line}" for line in differences))
    if not differences:
        print("nothing that was recorded differs: config, data, base model, code, libraries, threads")
    if options.check_only:
        return
    folder = options.out or reproducing.repetition_folder(record)
    with full_disk_named(folder):
        run_id = reproducing.start(record, config, folder)
    (repeated,) = records.find(options.uri, [run_id])
    verdict = reproducing.judge(record, repeated, config)
    say(f"files  {folder}", f"run    {run_id}", f"{verdict.grade}: {verdict.why}")
    if verdict.grade == reproducing.DRIFTED:
        raise TrackingError(f"run {run_id} does not reproduce run {record.run_id}")


def bundle(options: argparse.Namespace) -> None:
    """Pack a recorded run into one file that `reproduce` can repeat.

    The bundle holds config, library versions, fingerprints of data and model, metrics
    and samples, but no weights. It needs no MLflow store.
    """
    quiet()
    from qlora_exp.config.sections.dataset import looks_local
    from qlora_exp.results import bundle as bundles
    from qlora_exp.results import reproduce as reproducing

    record = reproducing.find_run(options.uri, options.run)
    target = options.out or Path(f"{record.run_id}.zip")
    bundles.write(record, target)
    say(f"{target}: run {record.run_id} {record.name}")
    repeat = shlex.join(["qlora-exp", "reproduce", str(target)])
    files = {
        key: path
        for key, path in record.params.items()
        if re.fullmatch(r"(dataset|unrelated)\.(sources\..+\.)?(eval_)?path", key) and looks_local(path)
    }
    repeat = " ".join([repeat, *(f"{key}=FILE" for key in files)])
    if record.outcome == "ok":
        say(f"to repeat the run on any machine: {repeat}")
    else:
        say(f"the outcome of this run is {record.outcome}, so only differences can be listed: {repeat} --check-only")
    if files:
        say(f"rows are not in it: whoever repeats the run needs a copy of {', '.join(dict.fromkeys(files.values()))}")


def sync(options: argparse.Namespace) -> None:
    """Send MLflow what it lacks of recorded runs, and check that it has them.

    Marks runs whose process died as killed, and skips runs that are still running.
    Sends a run again if the store has lost it. Fails, after sending the other runs,
    if MLflow lacks a part of a run, or if a run cannot be read.
    """
    from qlora_exp.tracking import journal

    if options.uri is not None:
        from qlora_exp.tracking.stores.uris import store_uri

        options.uri = store_uri(options.uri)  # what was sent is noted under the complete URI
    existing = [folder for folder in _USUAL_FOLDERS if folder.is_dir()]
    folders: list[Path] = options.folders or existing or [_USUAL_FOLDERS[0]]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ConfigError(f"no folder {', '.join(map(str, missing))} in {Path.cwd()}")
    unread: list[str] = []
    walk = (entry for root in folders for entry in os.walk(root, onerror=lambda error: unread.append(str(error))))
    runs = {Path(os.path.abspath(path)) for path, below, files in walk if journal.FILE in (*below, *files)}
    runs |= {run.parent for run in runs if (run.parent / journal.FILE).is_file()}  # the sweep of a job
    sent, problems = 0, []
    still = where = ""
    if runs:
        quiet()
        from qlora_exp.tracking.sync import settle

        with notice_if_slow("waiting for MLflow"):
            settled = settle(runs, options.uri)
        sent = settled.sent
        where = f" ({', '.join(map(redact, settled.stores))})" * bool(settled.stores)
        unread += settled.unread
        for run, lacks in settled.lacks.items():
            for line in lacks:
                say(f"warning: MLflow lacks a part of {run}: {line}", file=sys.stderr)
        problems += [f"MLflow lacks a part of {len(settled.lacks)} runs (see the warnings)"] * bool(settled.lacks)
        problems += [f"{why}; try again later, {count} runs here may not be there completely"
                     for why, count in settled.away.items()]  # fmt: skip
        still = f"; {settled.running} are still running and were left alone" if settled.running else ""
    for line in unread:
        say(f"warning: cannot be read completely: {line}", file=sys.stderr)
    problems[:0] = [f"{len(unread)} runs or folders could not be read completely (see the warnings)"] * bool(unread)
    if problems:
        raise TrackingError(f"{sent} runs sent; {'; '.join(problems)}{still}")
    say(f"{sent} runs sent; MLflow has everything of all runs under {', '.join(map(str, folders))}{where}{still}")
