"""Wrap Hydra's private parts. Checked on Hydra 1.3.8.

Must not import torch: this module composes and checks configs, which must be fast.
"""

from collections.abc import Callable, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.core.singleton import Singleton
from hydra.core.utils import setup_globals
from omegaconf import DictConfig


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
