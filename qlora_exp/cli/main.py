"""Parse a command line and call the handler of its command."""

import argparse
import atexit
import gc
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from qlora_exp.cli import completion, doctor, inference, keys, methods, models, planning, runs, schema, train
from qlora_exp.cli.failures import exit_code
from qlora_exp.cli.parents import Commands
from qlora_exp.utils.display import shown
from qlora_exp.utils.env_file import load_env_file

FAMILIES = {
    "prepare a run": (doctor, keys, planning, methods, schema),
    "run, compare, repeat": (train, runs),
    "use and share trained models": (inference, models),
}
"""Modules that add commands, by the title under which `--help` lists these commands."""

_STORE = "MLFLOW_TRACKING_URI"
_ABOUT = "Run experiments in efficient fine-tuning: compose a configuration, train, measure, track, compare."
_EPILOG = """\
`qlora-exp COMMAND --help` explains a command. Variables of a .env file in the working directory are set first,
except those that the environment sets already. Exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted.

first steps:
  qlora-exp train model=tiny_llama training.max_steps=3   try everything on a tiny random model (half a minute)
  qlora-exp train                                         fine-tune the built-in model with QLoRA
  qlora-exp ui                                            look at the run in MLflow
  qlora-exp chat RUN_ID                                   talk with the trained model
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    if completion.is_asked():
        sys.exit(exit_code(lambda: completion.complete(*_parser())))
    words = list(sys.argv[1:] if argv is None else argv)
    atexit.register(gc.freeze)  # at exit Python would search all imports for garbage, 2 s for nothing
    options = _parse(words)

    def run() -> None:
        load_env_file()
        if getattr(options, "reads_store", False) and options.uri is None and (uri := os.environ.get(_STORE)):
            print(shown(f"MLflow: {uri} ({_STORE})"), file=sys.stderr)
        if folder := getattr(options, "config_dir", None):
            from qlora_exp.config.hydra_compose import own_options

            own_options.set(folder)
        options.handler(options)

    sys.exit(exit_code(run, getattr(options, "less_memory", "")))


def _parse(words: list[str]) -> argparse.Namespace:
    parser, commands = _parser()
    if not words or words[0] not in commands.choices:
        return parser.parse_args(words)  # --help, --version or an error: exits
    command = commands.choices[words[0]]
    options, unknown = command.parse_known_intermixed_args(words[1:])
    if unknown and options.handler is not train.train:  # Hydra reads the remaining words of `train`
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.unknown = unknown
    return options


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command, by its name."""
    return dict(_parser()[1].choices)


def _parser() -> tuple[argparse.ArgumentParser, Commands]:
    parser = argparse.ArgumentParser(
        prog="qlora-exp",
        usage="qlora-exp COMMAND [OPTIONS]",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version("qlora-exp"))
    # argparse cannot group subcommands: they are listed in the description instead.
    commands = parser.add_subparsers(prog="qlora-exp", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    listing = [_ABOUT]
    for title, families in FAMILIES.items():
        already = len(commands.choices)
        for family in families:
            family.add_parsers(commands)
        added = [*commands.choices.items()][already:]
        listing += ["", f"{title}:"]
        listing += [f"  {name:<16}{(made.description or '').splitlines()[0].rstrip('.')}" for name, made in added]
    parser.description = "\n".join(listing)
    return parser, commands
