"""Wrap Hydra's private parts. Checked on Hydra 1.3.8.

Must not import torch: this module composes and checks configs, which must be fast.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir, version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.singleton import Singleton
from hydra.core.utils import setup_globals
from omegaconf import DictConfig

_VERSION_BASE = "1.3"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line of Hydra, with its flags anywhere among the overrides (`get_args_parser`).

    Hydra 1.3 itself takes overrides only in one place (facebookresearch/hydra#3053).
    """
    return get_args_parser().parse_intermixed_args([*words])


def main(arguments: argparse.Namespace, job: Callable[[DictConfig], None], folder: Path, name: str) -> None:
    """Do what a parsed command line says, as `hydra.main` does for the one that it parses (`_run_hydra`).

    Args:
        arguments: what `parse` returned.
        job: function that runs one composed config.
        folder: folder with the config groups.
        name: name of the root config.
    """
    version.setbase(_VERSION_BASE)
    _run_hydra(arguments, get_args_parser(), job, str(folder), name)


@contextmanager
def initialized(folder: Path, own: str | Path | None) -> Iterator[None]:
    """Initialize Hydra to compose configs of `folder` and `own`, whose path may have any characters.

    `hydra.searchpath`, the public way to add a folder, reads it in Hydra's override grammar.
    """
    with initialize_config_dir(str(folder), version_base=_VERSION_BASE):
        if own is not None:
            search_path = create_config_search_path(str(folder))
            before_schema = SearchPathQuery(provider="schema")
            search_path.prepend("command-line", f"file://{Path(own).absolute()}", before_schema)
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2("app", search_path)
        yield


def every_combination(overrides: Sequence[Override]) -> list[list[str]]:
    """Return every combination of the values that overrides list, as one job's overrides each.

    This is `BasicSweeper.split_arguments`, Hydra's own parser of `key=a,b`, which is in `hydra._internal`.
    """
    return [list(job) for job in BasicSweeper.split_arguments(list(overrides), None)[0]]


def apply_overrides(overrides: Sequence[Override], config: DictConfig) -> None:
    """Set values in a composed config as Hydra does (`ConfigLoaderImpl._apply_overrides_to_config`).

    Hydra does this last, after it has chosen the options. So a sweep can compose once what its jobs share. The public
    `load_sweep_config` has the same result, but repeats the shared work for each job.
    """
    ConfigLoaderImpl._apply_overrides_to_config(list(overrides), config)


def is_group(loader: Any, key: str) -> bool:
    """Return whether an override's key is a config group, not a value (`ConfigLoaderImpl.repository`)."""
    return bool(loader.repository.group_exists(key))


def as_written(value: Any) -> str:
    """Return an override's value as written on a command line (`Override._get_value_element_as_str`)."""
    return Override._get_value_element_as_str(value)


def singletons() -> Callable[[], None]:
    """Return a function that restores Hydra's state of this process in another one (`Singleton`, `setup_globals`).

    Hydra's own launchers do this, but its documentation for authors of launchers does not describe it.
    """
    return _State(Singleton.get_state())


class _State:
    """A function that restores the state; a class, so that it can be pickled."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __call__(self) -> None:
        setup_globals()
        Singleton.set_state(self.state)
