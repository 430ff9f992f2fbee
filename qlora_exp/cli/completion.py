"""Complete command lines in a shell, through argcomplete's protocol.

A shell starts `qlora-exp` with the line that is being typed in its environment; it must answer in half a second.
"""

import argparse
import os

from qlora_exp.cli.parents import Commands, add_overrides
from qlora_exp.utils.errors import UserError

_FLAGS_OF_TRAIN = (("--multirun", "-m"), ("--help", "-h"), ("--hydra-help",))
"""Hydra's flags, which the parser of `train` leaves to it."""
_WITH_VALUE = ("--cfg", "--config-dir", "--info")
"""Those with a value."""


def is_asked() -> bool:
    """Return whether a shell started this process to complete a command line."""
    return "_ARGCOMPLETE" in os.environ


def complete(parser: argparse.ArgumentParser, commands: Commands) -> None:
    """Write what the line may continue with, and exit.

    Raises:
        UserError: argcomplete is not installed.
    """
    try:
        import argcomplete
    except ImportError as error:
        raise UserError(
            "shell completion needs the package argcomplete: pip install 'qlora-exp[completion]'"
        ) from error
    train = commands.choices["train"]
    for names in _FLAGS_OF_TRAIN:
        train.add_argument(*names, action="store_true")
    for name in _WITH_VALUE:
        train.add_argument(name)
    add_overrides(train, "")
    argcomplete.autocomplete(parser, always_complete_options=False)
