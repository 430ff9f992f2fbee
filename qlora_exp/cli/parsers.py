"""The options of every command but `train`, whose words Hydra reads. Imports nothing heavy."""

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_exp.cli import commands, models
from qlora_exp.config import compatibility
from qlora_exp.deploy.formats import DEPLOYED, FORMS, GGUF_TYPES, SERVERS
from qlora_exp.planning import gpus

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

STORE = argparse.ArgumentParser(add_help=False)
STORE.add_argument("--uri", help="tracking URI; default: SQLite in ./mlruns")
SOURCE = argparse.ArgumentParser(add_help=False)
SOURCE.add_argument("source", metavar="RUN|MODEL|FOLDER", help="run id, models:/..., or a folder that was saved")


def parser() -> argparse.ArgumentParser:
    """Of the whole command line; what is parsed has a `command` to call with it."""
    made = argparse.ArgumentParser(
        prog="qlora-exp",
        description="Experiments in efficient fine-tuning: compose, train, measure, track.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=version("qlora-exp"))
    known = made.add_subparsers(required=True, metavar="COMMAND")
    known.add_parser("train", help="run one configuration, or with -m a sweep", add_help=False)
    _about_runs(known)
    _about_methods(known)
    _about_models(known)
    return made


def _about_runs(known: Any) -> None:
    keys = known.add_parser("keys", help="what each key of the config means: type, default, what the default run sets")
    what = "model, training, training.max_steps, ...; all if left out"
    keys.add_argument("chosen", nargs="?", metavar="SECTION|KEY", help=what)
    keys.set_defaults(command=lambda options: commands.keys(options.chosen))
    ui = known.add_parser("ui", parents=[STORE], help="open MLflow's UI on the right store")
    ui.add_argument("--host", default="127.0.0.1")
    ui.add_argument("--port", type=int, default=5000)
    ui.set_defaults(command=lambda options: commands.ui(options.uri, options.host, options.port))
    sync = known.add_parser("sync", help="send to MLflow what runs could not, while its server was away")
    sync.add_argument("folders", nargs="*", type=Path, help="default: outputs and multirun, those that are there")
    sync.add_argument("--uri", help="tracking URI; default: that of each run")
    usual = [folder for folder in (Path("outputs"), Path("multirun")) if folder.is_dir()]
    sync.set_defaults(command=lambda options: commands.sync(options.folders or usual or [Path("outputs")], options.uri))
    compare = known.add_parser(
        "compare", parents=[STORE], help="a table of runs: what differs, costs, quality, what is chance"
    )
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
    compare.set_defaults(command=commands.compare)
    again = known.add_parser(
        "reproduce", parents=[STORE], help="run a recorded run again, and say whether the same came out"
    )
    again.add_argument("run", metavar="RUN", help="run id, run key, name of a run, or a bundle")
    again.add_argument(
        "changes", nargs="*", default=[], metavar="KEY=VALUE", help="what is otherwise here, such as dataset.path=FILE"
    )
    again.add_argument("--check-only", action="store_true", help="say what differs from then; run nothing")
    again.add_argument("--out", type=Path, help="output folder; default: outputs/reproduced/RUN_ID")
    again.set_defaults(command=commands.reproduce)
    share = known.add_parser(
        "bundle", parents=[STORE], help="a recorded run as one folder or zip, for `reproduce` without the store"
    )
    share.add_argument("run", metavar="RUN", help="run id, run key or name of a run")
    share.add_argument("--out", type=Path, help="a folder, or a file that ends in .zip; default: RUN_ID.zip")
    share.set_defaults(command=commands.bundle)


def _about_methods(known: Any) -> None:
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
    calibrate = known.add_parser(
        "calibrate", parents=[STORE], help="learn from runs how far off plans are, for each kind of device"
    )
    calibrate.add_argument("--experiment", help="MLflow's; default: all")
    calibrate.set_defaults(command=commands.calibrate)
    for planning in (plan, advise):
        planning.add_argument("--gpu", help=f"one of {', '.join(gpus.GPUS)}")
        planning.add_argument("--vram", type=float, metavar="GIB", help="memory of a GPU that has no name here")
    plan.add_argument("--price", type=float, metavar="PER_HOUR", help="of the GPU: says what max_steps cost")


def _about_models(known: Any) -> None:
    merge = known.add_parser(
        "merge", parents=[SOURCE, STORE], help="an adapter's weights in its base's: a model that needs no adapter"
    )
    merge.set_defaults(command=models.export, to="merged", type="", changes=[])
    export = known.add_parser(
        "export", parents=[SOURCE, STORE], help="a trained model as a GGUF file, or stored in 4 or 8 bits"
    )
    export.add_argument("--to", choices=FORMS, required=True, help="the form")
    export.add_argument("--type", default="q8_0", help=f"of a GGUF file's weights: {', '.join(GGUF_TYPES)}")
    told = "of the rows that gptq is calibrated on, such as dataset.path=FILE"
    export.add_argument("changes", nargs="*", default=[], metavar="KEY=VALUE", help=told)
    export.set_defaults(command=models.export)
    dtypes, bases = ("auto", "float32", "bfloat16", "float16"), ("auto", "files", "trained")
    for making in (merge, export):
        making.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
        making.add_argument("--dtype", choices=dtypes, default="auto", help="of the merged weights; auto: the base's")
        making.add_argument("--base", choices=bases, default="auto", help="of a quantized run: as files, as trained")
    generate = known.add_parser(
        "generate", parents=[SOURCE, STORE], help="answers of a trained model to a prompt or to a file of them"
    )
    generate.add_argument("--prompt", help="a question, in words")
    generate.add_argument("--file", type=Path, help="a prompt a line; .jsonl: {prompt, input} or {messages}, adapter")
    generate.add_argument("--out", type=Path, help="of a file's prompts: a .jsonl file; default: on the screen")
    generate.set_defaults(command=models.generate)
    chat = known.add_parser("chat", parents=[SOURCE, STORE], help="talk with a trained model")
    chat.add_argument("--system", help="a system message, if the format that it was trained with has one")
    chat.set_defaults(command=models.chat)
    for talking in (generate, chat):
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
    serve = known.add_parser(
        "serve", parents=[SOURCE, STORE], help="a trained model behind an OpenAI-compatible endpoint"
    )
    serve.add_argument("--with", dest="server", choices=SERVERS, default="transformers", help="whose server")
    serve.add_argument("--print", action="store_true", help="commands of servers for it; start none")
    serve.add_argument("--out", type=Path, help="where an adapter is merged; default: outputs/served/RUN_ID")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    serve.set_defaults(command=models.serve)
    register = known.add_parser(
        "register", parents=[STORE], help="a run's model in MLflow's registry, with a model card"
    )
    register.add_argument("run", metavar="RUN", help="run id, run key or name of a run")
    register.add_argument("--name", required=True, help="of the registered model")
    register.add_argument("--alias", help="to move to this version, such as champion")
    register.add_argument("--card", type=Path, metavar="FILE", help="write the model card here too")
    register.add_argument("--push", metavar="ORG/NAME", help="upload it to the Hugging Face hub too (HF_TOKEN)")
    register.add_argument("--public", action="store_true", help="of a new repository there; default: private")
    register.set_defaults(command=models.register)
    gap = known.add_parser(
        "deployment-gap", parents=[STORE], help="what merging and quantizing again change, on the same held-out rows"
    )
    gap.add_argument("run", metavar="RUN", help="run id, run key or name of a run")
    gap.add_argument("changes", nargs="*", default=[], metavar="KEY=VALUE", help="such as dataset.path=FILE")
    gap.add_argument("--forms", help=f"of {','.join(DEPLOYED)}; default: all that make sense")
    gap.add_argument("--out", type=Path, help="folder for the forms; default: outputs/deployment/RUN_ID")
    gap.set_defaults(command=models.deployment_gap)
