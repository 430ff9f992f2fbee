"""Hydra's private parts. Checked on Hydra 1.3.8. Must not import torch: configs are composed and checked with it."""

from collections.abc import Callable, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.core.singleton import Singleton
from hydra.core.utils import setup_globals
from omegaconf import DictConfig


def every_combination(overrides: Sequence[Override]) -> list[list[str]]:
    """Every combination of what overrides list, as overrides of one job (`BasicSweeper.split_arguments`).

    The basic sweeper is Hydra's own reading of `key=a,b`; it lives in `hydra._internal`.
    """
    return [list(job) for job in BasicSweeper.split_arguments(list(overrides), None)[0]]


def apply_overrides(overrides: Sequence[Override], config: DictConfig) -> None:
    """Set values in a composed config as Hydra would (`ConfigLoaderImpl._apply_overrides_to_config`).

    Hydra does this last, after the options are chosen, so that a sweep may compose once what its jobs share. The public
    `load_sweep_config` gives the same, but does the shared work again for each job.
    """
    ConfigLoaderImpl._apply_overrides_to_config(list(overrides), config)


def is_group(loader: Any, key: str) -> bool:
    """Whether an override's key is a config group, not a value (`ConfigLoaderImpl.repository`)."""
    return bool(loader.repository.group_exists(key))


def as_written(value: Any) -> str:
    """An override's value as it is written on a command line (`Override._get_value_element_as_str`)."""
    return Override._get_value_element_as_str(value)


def singletons() -> Callable[[], None]:
    """Hydra's state in this process, as what restores it in another one (`Singleton`, `setup_globals`).

    Hydra's own launchers do so; its documentation for writers of launchers does not say how.
    """
    return _State(Singleton.get_state())


class _State:
    """Restores the state; a class, so that it can be pickled."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __call__(self) -> None:
        setup_globals()
        Singleton.set_state(self.state)
