"""The commands. Imports nothing heavy until it must: `--help`, `--cfg job` and a wrong config take about a second."""

import argparse
import atexit
import errno
import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import qlora_exp
from qlora_exp import commands, compatibility, gpus
from qlora_exp.errors import ConfigError, TimeLimitError, UserError
from qlora_exp.quiet import quiet
from qlora_exp.secrets import redact

_EPILOG = """\
examples:
  qlora-exp train                        QLoRA of the embedded model on the embedded data
  qlora-exp train --help                 groups, options, examples
  qlora-exp train method=lora method.r=8 --cfg job
  qlora-exp keys training                what each key means
  qlora-exp compare                      a table of the newest sweep
  qlora-exp ui                           compare runs in MLflow's UI
  qlora-exp plan model=llama3_8b         will it fit? memory by phase, without weights or a GPU
  qlora-exp advise model=llama3_8b --vram 24  which method, batch and length fit a card
  qlora-exp probe method=loha            does it work with the versions installed here?
  qlora-exp quantize-error               what NF4, FP4, INT4 and INT8 lose on a model's weights
  qlora-exp chat RUN                     talk with what a run trained
  qlora-exp export RUN --to gguf --out X  a GGUF file with a Modelfile; --to nf4, int8, ...
  qlora-exp sync                         send MLflow what it missed while its server was away
"""


# Flags with which Hydra runs nothing and composes no run.
_SHOWS_SOMETHING_ELSE = {"--help", "-h", "--hydra-help", "--version", "--shell-completion", "-sc", "--info", "-i"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    atexit.register(gc.freeze)  # at its end Python looks for garbage in all that was imported: 2 s for nothing
    if arguments[:1] == ["train"]:  # Hydra reads the rest by itself
        gc.disable()  # until there is something to run: a fifth of the imports' time
        sys.exit(_guard(lambda: _train(arguments[1:])))
    parser = argparse.ArgumentParser(
        prog="qlora-exp",
        description="Experiments in efficient fine-tuning: compose, train, measure, track.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=qlora_exp.__version__)
    known = parser.add_subparsers(required=True, metavar="COMMAND")
    known.add_parser("train", help="run one configuration, or with -m a sweep", add_help=False)
    keys = known.add_parser("keys", help="what each key of the config means, its type and default")
    keys.add_argument("section", nargs="?", help="model, method, training, ...; all if left out")
    keys.set_defaults(command=lambda options: commands.keys(options.section))
    ui = known.add_parser("ui", help="open MLflow's UI on the right store")
    ui.add_argument("--uri", help="tracking URI; default: SQLite in ./mlruns")
    ui.add_argument("--host", default="127.0.0.1")
    ui.add_argument("--port", type=int, default=5000)
    ui.set_defaults(command=lambda options: commands.ui(options.uri, options.host, options.port))
    sync = known.add_parser("sync", help="send to MLflow what runs could not, while its server was away")
    sync.add_argument("folders", nargs="*", type=Path, help="default: outputs and multirun, those that are there")
    sync.add_argument("--uri", help="tracking URI; default: that of each run")
    usual = [folder for folder in (Path("outputs"), Path("multirun")) if folder.is_dir()]
    sync.set_defaults(command=lambda options: commands.sync(options.folders or usual or [Path("outputs")], options.uri))
    compare = known.add_parser("compare", help="a table of runs: what differs, costs, quality, what is chance")
    compare.add_argument(
        "chosen", nargs="*", metavar="SWEEP|RUN", help="sweeps, runs (id, key, name); default: the newest sweep"
    )
    compare.add_argument("--experiment", help="MLflow's; without names of runs: all that are in it")
    compare.add_argument(
        "--filter", help="MLflow's own, of all runs unless a sweep is named: \"params.`method.name` = 'lora'\""
    )
    compare.add_argument("--baseline", help="part of a row's name, such as method.name=lora; default: the first row")
    metrics = "loss, rougeL, exact_match, task_score, unrelated_loss, lm_eval/TASK/METRIC"
    compare.add_argument("--metric", default="loss", help=metrics)
    compare.add_argument("--preset", default="all", help="which columns: all, seed1, short, shortest")
    compare.add_argument("--out", type=Path, help="folder for comparison_TIME.csv, .json, .md, .html")
    compare.add_argument("--log", action="store_true", help="keep the report with the sweep's MLflow run")
    compare.add_argument("--uri", help="tracking URI; default: SQLite in ./mlruns")
    compare.set_defaults(command=commands.compare)
    again = known.add_parser("reproduce", help="run a recorded run again, and say whether the same came out")
    again.add_argument("run", metavar="RUN", help="run id, run key, name of a run, or a bundle")
    again.add_argument(
        "changes", nargs="*", default=[], metavar="KEY=VALUE", help="what is otherwise here, such as dataset.path=FILE"
    )
    again.add_argument("--check-only", action="store_true", help="say what differs from then; run nothing")
    again.add_argument("--out", type=Path, help="output folder; default: outputs/reproduced/RUN_ID")
    again.add_argument("--uri", help="tracking URI; default: SQLite in ./mlruns")
    again.set_defaults(command=commands.reproduce)
    share = known.add_parser("bundle", help="a recorded run as one folder or zip, for `reproduce` without the store")
    share.add_argument("run", metavar="RUN", help="run id, run key or name of a run")
    share.add_argument("--out", type=Path, help="a folder, or a file that ends in .zip; default: RUN_ID.zip")
    share.add_argument("--uri", help="tracking URI; default: SQLite in ./mlruns")
    share.set_defaults(command=commands.bundle)
    probe = known.add_parser("probe", help="try whether a method works with the versions that are installed here")
    probe.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="method=NAME and more, as for train")
    probe.add_argument(
        "--base", action="append", choices=tuple(compatibility.BASES), help="default: plain; may be given again"
    )
    probe.set_defaults(command=commands.probe)
    lab = known.add_parser("quantize-error", help="what 4 and 8 bits lose: on weights, on normal samples, in loss")
    lab.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="model=NAME, unrelated=NAME, as for train")
    sizes = [64 * 2**power for power in range(7)]  # those of bitsandbytes
    lab.add_argument("--blocksize", type=int, default=64, choices=sizes, help="weights that share a scale; default: 64")
    lab.add_argument("--out", type=Path, default=Path("outputs/quantize_error"), help="folder for table and picture")
    lab.set_defaults(command=commands.quantize_error)
    plan = known.add_parser("plan", help="memory by phase and the time of a step, before anything runs")
    plan.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train; lists are tried one by one")
    plan.set_defaults(command=commands.plan)
    advise = known.add_parser("advise", help="which method, batch, length and model fit a card, LoRA or QLoRA and why")
    advise.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="model=NAME, training.max_length=N, ...")
    advise.add_argument("--models", action="store_true", help="the largest model for each card instead")
    advise.set_defaults(command=commands.advise)
    merge = known.add_parser("merge", help="an adapter's weights in its base's: a model that needs no adapter")
    merge.set_defaults(command=commands.export, to="merged", type="")
    export = known.add_parser("export", help="a trained model as a GGUF file, or stored in 4 or 8 bits")
    forms = ("gguf", "merged", "nf4", "nf4_double", "fp4", "fp4_double", "int8", "gptq", "awq")
    export.add_argument("--to", choices=forms, required=True, help="the form")
    export.add_argument("--type", default="q8_0", help="of a GGUF file's weights: f32, f16, bf16, q8_0, ..., q4_0")
    export.set_defaults(command=commands.export)
    dtypes, bases = ("auto", "float32", "bfloat16", "float16"), ("auto", "files", "trained")
    for making in (merge, export):
        making.add_argument("source", metavar="RUN|MODEL|FOLDER", help="run id, models:/..., or a saved folder")
        making.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
        making.add_argument("--dtype", choices=dtypes, default="auto", help="of the merged weights; auto: the base's")
        making.add_argument("--base", choices=bases, default="auto", help="of a quantized run: as files, as trained")
        making.add_argument("--uri", help="tracking URI; default: SQLite in ./mlruns")
    generate = known.add_parser("generate", help="answers of a trained model to a prompt or to a file of them")
    generate.add_argument("--prompt", help="a question, in words")
    generate.add_argument("--file", type=Path, help="a prompt a line; .jsonl: {prompt, input} or {messages}, adapter")
    generate.add_argument("--out", type=Path, help="of a file's prompts: a .jsonl file; default: on the screen")
    generate.set_defaults(command=commands.generate)
    chat = known.add_parser("chat", help="talk with a trained model")
    chat.add_argument("--system", help="a system message, if the format that it was trained with has one")
    chat.set_defaults(command=commands.chat)
    for talking in (generate, chat):
        talking.add_argument("source", metavar="RUN|MODEL|FOLDER", help="run id, models:/..., or a folder")
        talking.add_argument(
            "--adapter", action="append", default=[], metavar="NAME=SOURCE", help="one more on the same base"
        )
        talking.add_argument("--quantization", help="of the base: nf4_double, int8, none, ...; default: as trained")
        talking.add_argument("--max-new-tokens", type=int, default=256)
        talking.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest token, always")
        talking.add_argument("--top-p", type=float, default=1.0)
        talking.add_argument("--top-k", type=int, default=0)
        talking.add_argument("--repetition-penalty", type=float, default=1.0)
        talking.add_argument("--seed", type=int)
        talking.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
        talking.add_argument("--uri", help="tracking URI; default: SQLite in ./mlruns")
    serve = known.add_parser("serve", help="a trained model behind an OpenAI-compatible endpoint")
    serve.add_argument(
        "source", metavar="RUN|MODEL|FOLDER", help="run id, models:/..., or a folder; adapters are merged"
    )
    servers = ("transformers", "mlflow", "vllm", "llama.cpp")
    serve.add_argument("--with", dest="server", choices=servers, default="transformers", help="whose server")
    serve.add_argument("--print", action="store_true", help="the commands of all servers; start none")
    serve.add_argument("--out", type=Path, help="where an adapter is merged; default: outputs/served/RUN_ID")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    serve.add_argument("--uri", help="tracking URI; default: SQLite in ./mlruns")
    serve.set_defaults(command=commands.serve)
    register = known.add_parser("register", help="a run's model in MLflow's registry, with a model card")
    register.add_argument("run", metavar="RUN", help="run id, run key or name of a run")
    register.add_argument("--name", required=True, help="of the registered model")
    register.add_argument("--alias", help="to move to this version, such as champion")
    register.add_argument("--card", type=Path, metavar="FILE", help="write the model card here too")
    register.add_argument("--push", metavar="ORG/NAME", help="upload it to the Hugging Face hub too (HF_TOKEN)")
    register.add_argument("--public", action="store_true", help="of a new repository there; default: private")
    register.add_argument("--uri", help="tracking URI; default: SQLite in ./mlruns")
    register.set_defaults(command=commands.register)
    gap = known.add_parser("deployment-gap", help="what merging and quantizing again change, on the same held-out rows")
    gap.add_argument("run", metavar="RUN", help="run id, run key or name of a run")
    gap.add_argument("changes", nargs="*", default=[], metavar="KEY=VALUE", help="such as dataset.path=FILE")
    gap.add_argument("--forms", help="of trained,merged,merged_trained,nf4,int8,gptq,gguf_q8_0,...")
    gap.add_argument("--out", type=Path, help="folder for the forms; default: outputs/deployment/RUN_ID")
    gap.add_argument("--uri", help="tracking URI; default: SQLite in ./mlruns")
    gap.set_defaults(command=commands.deployment_gap)
    calibrate = known.add_parser("calibrate", help="learn from runs how far off plans are, for each kind of device")
    calibrate.add_argument("--experiment", help="MLflow's; default: all")
    calibrate.add_argument("--uri", help="tracking URI; default: SQLite in ./mlruns")
    calibrate.set_defaults(command=commands.calibrate)
    for planning in (plan, advise):
        planning.add_argument("--gpu", help=f"one of {', '.join(gpus.GPUS)}")
        planning.add_argument("--vram", type=float, metavar="GIB", help="memory of a GPU that has no name here")
    plan.add_argument("--price", type=float, metavar="PER_HOUR", help="of the GPU: says what max_steps cost")
    if arguments[:1] in (["plan"], ["advise"]):  # --vram 24, or as Hydra's overrides are written
        arguments = [f"--{word}" if word.startswith(("vram=", "gpu=", "price=")) else word for word in arguments]
    options, rest = parser.parse_known_args(arguments)
    if rest and hasattr(options, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        options.overrides += rest  # what comes after an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    sys.exit(_guard(lambda: options.command(options)))


def _guard(command: Callable[[], None]) -> int:
    """The exit code of `command`; what the user can mend is shown without a traceback."""
    try:
        command()
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except TimeLimitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except Exception as error:  # ours to mend: shown whole, but for secrets
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            print(f"error: no space left on the disk of {error.filename or Path.cwd()}", file=sys.stderr)
        elif type(error).__name__ in ("DivergedError", "OutOfMemoryError"):
            print(f"error: {type(error).__name__}: {redact(str(error))}", file=sys.stderr)
        else:
            print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
        return 1
    return 0


def _train(overrides: list[str]) -> None:
    """Hand over to Hydra, which composes and calls `_job`, for a sweep once for each combination."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from qlora_exp import config

    overrides = ["sweep.dry_run=true" if word == "--dry-run" else word for word in overrides]
    if not (_SHOWS_SOMETHING_ELSE | {"-m", "--multirun"}) & set(overrides):
        config.check_command(overrides)  # a sweep checks all its jobs by itself
    config.register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra lets its errors through, and we explain them
    sys.argv = ["qlora-exp train", *overrides]
    try:
        hydra.main(config_path=str(config.conf_dir()), config_name="config", version_base="1.3")(_job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise config.explain(error) from error
    except OSError as error:
        if hasattr(error, "__notes__"):  # the job's own
            raise
        raise ConfigError(
            f"cannot write to the output folder: {error}; choose another: hydra.run.dir=FOLDER"
        ) from error


def _job(composed: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from qlora_exp import config, jobs

    output_dir = Path(HydraConfig.get().runtime.output_dir)
    try:
        checked = config.check(composed)
    except UserError:
        _remove_if_empty(output_dir)
        raise
    quiet()
    if (output_dir / jobs.JOB_FILE).is_file():
        jobs.run_job(checked, output_dir)
        return
    if checked.sweep.dry_run:
        print("nothing is wrong with this run; add -m for a sweep, or --cfg job to see the whole config")
        _remove_if_empty(output_dir)
        return
    logging.getLogger(__name__).info("starting: loading the libraries takes a few seconds")
    from qlora_exp.run import run
    from qlora_exp.summary import show

    try:
        show(run(checked, output_dir), checked.tracking.uri)
    except OSError as error:
        error.add_note("raised by the job")  # not by Hydra before it
        raise
    finally:
        _remove_if_empty(output_dir)


def _remove_if_empty(folder: Path) -> None:
    """A refused run leaves nothing behind."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
