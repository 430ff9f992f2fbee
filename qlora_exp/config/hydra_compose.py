"""Turn overrides into a checked `Config`: Hydra composes it, `schema` checks it, errors become one clear message.

Imports must stay light: `--help` and `--cfg job` use this module.
"""

import functools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp.config import idle
from qlora_exp.config.composer import Composer, plain
from qlora_exp.config.composition_errors import explain
from qlora_exp.config.conf_folder import conf_dir
from qlora_exp.config.overrides import combinations, of_job, readable
from qlora_exp.config.schema import Config
from qlora_exp.config.validate import OPEN_SECTIONS, from_composed
from qlora_exp.libraries.hydra import initialized
from qlora_exp.utils.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

SWEEPING = {"sweeper": "grid", "launcher": "local"}
"""The default sweeper and launcher, which option files and the command line can change."""
own_options: ContextVar[Path | None] = ContextVar("own_options", default=None)
"""Folder with the user's own groups and options, as `--config-dir` of commands that only compose configs names it."""


@functools.cache
def register() -> None:
    """Register the schema's keys and defaults in Hydra as config `schema`, the root that every group overrides.

    Also make this package's sweeper and launcher Hydra's defaults.
    """
    node = OmegaConf.create(Config().model_dump(mode="json"))
    for section in node.values():
        if isinstance(section, DictConfig):
            for value in section.values():
                if isinstance(value, DictConfig):  # a free mapping, such as tracking.tags
                    OmegaConf.set_struct(value, False)
    for name in OPEN_SECTIONS:
        OmegaConf.set_struct(node[name], False)
    ConfigStore.instance().store(name="schema", node=node)
    # Defaults of Hydra itself, because an `override` in conf/config.yaml would win over those of the user's files.
    defaults: dict[Any, Any] = {"help": "qlora_exp", "job_logging": "stdout", **SWEEPING}
    entries = [
        {group: defaults.get(group, option)} for entry in HydraConf().defaults for group, option in entry.items()
    ]
    ConfigStore.instance().store("config", HydraConf(defaults=entries), group="hydra", provider="hydra")


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Config:
    """Compose and check one run's config, as `qlora-exp train OVERRIDES` does.

    Args:
        overrides: Hydra overrides, e.g. `["method=lora", "method.r=8"]`.
        config_dir: folder with your own groups and options, searched after the shipped ones. Default: `own_options`.

    Raises:
        ConfigError: the config is invalid; the message names the key and the nearest valid spelling. Or an override
            would change nothing.
    """
    config, _ = _compose(overrides, config_dir)
    _refuse_idle_keys(config, overrides, sweeping=True)  # a config may be that of a sweep's job
    return config


def _compose(overrides: Sequence[str], config_dir: str | Path | None) -> tuple[Config, Mapping[str, Any]]:
    """Compose and check a config; return it and the options that were chosen, by group."""
    register()
    config_dir = config_dir or own_options.get()
    if config_dir is not None:
        check_own_options(Path(config_dir))
    with errors_explained(), initialized(conf_dir(), config_dir):
        composer = _shipped() if config_dir is None else _composer()
        values, choices = composer([], readable(overrides))
        return from_composed(values), choices


def _composer() -> Composer:
    """Return a composer of the options that Hydra is initialized with."""
    loader = GlobalHydra.instance().config_loader()
    return Composer(loader, lambda words: hydra_compose("config", overrides=words, return_hydra_config=True))


_shipped = functools.cache(_composer)
"""The composer of the shipped options, which no file changes while a process runs."""


def check_command(overrides: Sequence[str], config_dir: str | None = None, shows_config: bool = False) -> None:
    """Check the config of a single run before anything runs.

    Args:
        overrides: overrides of the command line.
        config_dir: `--config-dir`.
        shows_config: whether the config is only printed.

    Raises:
        ConfigError: the config is invalid; the message lists every problem.
    """
    config, choices = _compose(overrides, config_dir)
    if shows_config or any(
        word.startswith(("sweep=", "hydra.mode=")) for word in overrides
    ):  # a sweep checks its jobs itself
        return
    _refuse_idle_keys(config, overrides, sweeping=False)
    for word in overrides:
        if word.lstrip("+").startswith(("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweep")):
            raise ConfigError(f"{word} would change nothing: {idle.SINGLE_RUN}")
    for group, default in SWEEPING.items():
        if choices[f"hydra/{group}"] != default:  # by a file, which may be for single runs and sweeps
            chosen = f"hydra/{group}={choices[f'hydra/{group}']}"
            log.warning("%s of an option file is not used: %s", chosen, idle.SINGLE_RUN)


@contextmanager
def errors_explained() -> Iterator[None]:
    """Raise errors of composing as `ConfigError`.

    Raises:
        ConfigError: an override, an option or a file is wrong; the message says which.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", r"provider=.* is not\s+available", UserWarning)
            yield
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"an option file is not valid YAML: {' '.join(str(error).split())}") from error
    except UserWarning as error:
        raise ConfigError(
            f"hydra.searchpath: there is no folder {str(error).partition('path=')[2].split()[0]}"
        ) from error


def check_own_options(config_dir: Path) -> None:
    """Check a folder with the user's own options: it must exist; say which of its files are not used.

    Raises:
        ConfigError: the folder does not exist.
    """
    if not config_dir.is_dir():
        raise ConfigError(f"--config-dir: there is no folder {config_dir.absolute()}")
    if "${" in str(config_dir.absolute()):
        raise ConfigError(f"--config-dir: Hydra does not accept a folder with ${{ in its path: {config_dir.absolute()}")
    shipped = conf_dir()
    for file in sorted(config_dir.rglob("*.yaml")):
        other = shipped / file.relative_to(config_dir)
        if other.is_file() and not other.samefile(file) and other.read_bytes() != file.read_bytes():
            log.warning("%s is not used: an option of this name is shipped, and is used instead; rename the file", file)


def _refuse_idle_keys(config: Config, overrides: Sequence[str], sweeping: bool) -> None:
    if problems := [*idle.problems([config], overrides, sweeping)]:
        raise ConfigError("\n".join(problems))


def grid(overrides: Sequence[str]) -> list[list[str]]:
    """List each combination of the values in overrides (`method.r=4,8`) and in a named sweep (`sweep=NAME`).

    Of an interval, which only a search has, the lowest value stands for all.

    Raises:
        ConfigError: an override cannot be read.
    """
    overrides = readable(overrides)
    named, file = _named_sweep(overrides)
    try:
        params = named["hydra"]["sweeper"]["params"] if file else {}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{file}: has no hydra.sweeper.params that can be read") from error
    overridden = {word.split("=", 1)[0] for word in overrides}
    words = [*(f"{key}={value}" for key, value in params.items() if key not in overridden), *overrides]
    with errors_explained(), initialized(conf_dir(), own_options.get()):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        words = [
            f"{each.key_or_group}={cast(Any, each.value()).start}" if each.is_interval_sweep() else str(each.input_line)
            for each in parser.parse_overrides(words)
        ]
        return [of_job(job) for job in combinations(parser.parse_overrides(words))]


def sweeper(overrides: Sequence[str]) -> str:
    """Return the sweeper of a command: that of `hydra/sweeper=NAME`, or of a named sweep.

    Raises:
        ConfigError: there is no such sweep.
    """
    overrides = readable(overrides)
    chosen = [word.partition("=")[2] for word in overrides if word.startswith("hydra/sweeper=")]
    defaults = (_named_sweep(overrides)[0] or {}).get("defaults") or []
    named = [str(each["override /hydra/sweeper"]) for each in defaults if "override /hydra/sweeper" in each]
    return ["grid", *named, *chosen][-1]


def _named_sweep(overrides: Sequence[str]) -> tuple[Any, Path | None]:
    """Return what the file of `sweep=NAME` has, and the file; None if there is no such word.

    Raises:
        ConfigError: there is no such sweep, or it cannot be read.
    """
    name = next((word.split("=", 1)[1] for word in reversed(overrides) if word.startswith("sweep=")), None)
    if name is None:
        return None, None
    found = {file.stem: file for folder in (own_options.get(), conf_dir()) if folder
             for file in sorted((folder / "sweep").glob("*.yaml"))}  # fmt: skip
    if name not in found:
        raise ConfigError(f"sweep: no option '{name}'{did_you_mean(name, found)}")
    try:
        return yaml.safe_load(found[name].read_text("utf-8")), found[name]
    except yaml.YAMLError as error:
        raise ConfigError(f"{found[name]}: cannot be read: {error}") from error


def check(composed: DictConfig) -> Config:
    """Turn a composed config into a typed one.

    Raises:
        ConfigError: the config is invalid; the message lists every problem, one per line.
    """
    return from_composed(plain(composed))


def options(group: str) -> list[str]:
    """List the shipped options of a config group."""
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
