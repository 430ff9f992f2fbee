"""Define the parsers and arguments that several commands share."""

import argparse
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Handler = Callable[[argparse.Namespace], None]

DEVICES = ("auto", "cpu", "cuda", "mps")

URI = argparse.ArgumentParser(add_help=False)
URI.add_argument("--uri", help="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in ./mlruns")
URI.set_defaults(reads_store=True)
RUN = argparse.ArgumentParser(add_help=False)
RUN.add_argument("run", metavar="RUN", help="run id, run key, name or output folder of a recorded run")
OWN_OPTIONS = argparse.ArgumentParser(add_help=False)
OWN_OPTIONS.add_argument("--config-dir", type=Path, metavar="FOLDER", help="folder with your own groups and options")
SOURCE = argparse.ArgumentParser(add_help=False)
SOURCE.add_argument(
    "source",
    metavar="RUN|MODEL|FOLDER",
    help="id, key or name of a run; models:/NAME@ALIAS in MLflow's registry; or a folder with a saved adapter or model",
)


def add_command(
    commands: Commands,
    name: str,
    handler: Handler,
    parents: Sequence[argparse.ArgumentParser] = (),
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Add a command whose help text is its handler's docstring."""
    parser = commands.add_parser(
        name,
        parents=parents,
        description=inspect.getdoc(handler),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=add_help,
    )
    parser.set_defaults(handler=handler)
    return parser


def add_overrides(parser: argparse.ArgumentParser, purpose: str, nargs: str = "*") -> None:
    """Let a command accept KEY=VALUE words anywhere among its options, as `options.overrides`."""
    words = parser.add_argument("overrides", nargs=nargs, type=_key_value, metavar="KEY=VALUE", help=purpose)
    words.completer = completed  # type: ignore[attr-defined]


def completed(prefix: str, **_: Any) -> list[str]:
    """List what an override that is being typed may become, as argcomplete asks."""
    from qlora_exp.config.describe.complete import overrides

    return [*overrides(prefix)]


def _key_value(word: str) -> str:
    if "=" not in word:
        raise argparse.ArgumentTypeError(f"'{word}' has no '='")
    return word
