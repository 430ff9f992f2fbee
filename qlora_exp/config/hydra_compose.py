"""Turn overrides into a checked `Config`: Hydra composes it, `schema` checks it, errors become one clear message.

The place of the shipped `conf/` folder is defined here. Imports must stay light: `--help` and `--cfg job` use this
module.
"""

import functools
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp.config import idle
from qlora_exp.config.schema import Config
from qlora_exp.config.validate import OPEN_SECTIONS, from_dict, no_such_key
from qlora_exp.libraries.hydra import every_combination
from qlora_exp.utils.errors import ConfigError, did_you_mean


def conf_dir() -> Path:
    """Return the folder of the shipped config groups: next to the package in a checkout, inside it in a wheel.

    Raises:
        ConfigError: there is no such folder.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"no conf/config.yaml next to or inside {package}: the installation is incomplete")


@functools.cache
def register() -> None:
    """Register the schema's keys and defaults in Hydra as config `schema`, the root that every group overrides."""
    node = OmegaConf.create(Config().model_dump(mode="json"))
    for section in node.values():
        if isinstance(section, DictConfig):
            for value in section.values():
                if isinstance(value, DictConfig):  # a free mapping, such as tracking.tags
                    OmegaConf.set_struct(value, False)
    for name in OPEN_SECTIONS:
        OmegaConf.set_struct(node[name], False)
    ConfigStore.instance().store(name="schema", node=node)


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Config:
    """Compose and check one run's config, as `qlora-exp train OVERRIDES` does.

    Args:
        overrides: Hydra overrides, e.g. `["method=lora", "method.r=8"]`.
        config_dir: folder with your own groups and options, searched after the shipped ones.

    Raises:
        ConfigError: the config is invalid; the message names the key and the nearest valid spelling. Or an override
            would change nothing.
    """
    config = _compose(overrides, config_dir)
    _refuse_idle_keys(config, overrides, sweeping=True)  # a config may be that of a sweep's job
    return config


def _compose(overrides: Sequence[str], config_dir: str | Path | None) -> Config:
    register()
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return check(hydra_compose("config", overrides=[*search, *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error


def check_command(arguments: Sequence[str]) -> None:
    """Check the config of a command line before anything runs.

    Args:
        arguments: overrides and Hydra's flags, as after `qlora-exp train`.

    Raises:
        ConfigError: the config is invalid; the message lists every problem.
    """
    config_dir = next((later for flag, later in pairwise(arguments) if flag in ("--config-dir", "-cd")), None)
    config_dir = next((word.split("=", 1)[1] for word in arguments if word.startswith("--config-dir=")), config_dir)
    words = [word for word in arguments if "=" in word and not word.startswith("-")]
    config = _compose(words, config_dir)
    if not any(word.startswith(("sweep=", "hydra.mode=")) for word in words):  # a sweep checks its jobs itself
        _refuse_idle_keys(config, words, sweeping=False)
        shows_config = any(word in ("-c", "--cfg") or word.startswith("--cfg=") for word in arguments)
        for word in [] if shows_config else words:
            if word.lstrip("+").startswith(("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweep")):
                raise ConfigError(f"{word} would change nothing: {idle.SINGLE_RUN}")


def _refuse_idle_keys(config: Config, overrides: Sequence[str], sweeping: bool) -> None:
    if problems := [*idle.problems([config], overrides, sweeping)]:
        raise ConfigError("\n".join(problems))


def grid(overrides: Sequence[str]) -> list[list[str]]:
    """List each combination of the values in overrides (`method.r=4,8`) and in a named sweep (`sweep=NAME`).

    Raises:
        ConfigError: an override cannot be read.
    """
    name = next((word.split("=", 1)[1] for word in reversed(overrides) if word.startswith("sweep=")), None)
    params: dict[str, str] = {}
    if name is not None:
        if name not in options("sweep"):
            raise ConfigError(f"sweep: no option '{name}'{did_you_mean(name, options('sweep'))}")
        values = yaml.safe_load((conf_dir() / "sweep" / f"{name}.yaml").read_text("utf-8"))
        params = values["hydra"]["sweeper"]["params"]
    overridden = {word.split("=", 1)[0] for word in overrides}
    words = [*(f"{key}={value}" for key, value in params.items() if key not in overridden), *overrides]
    try:
        return every_combination(OverridesParser.create().parse_overrides(words))
    except HydraException as error:
        raise explain(error) from error


def check(composed: DictConfig) -> Config:
    """Turn a composed config into a typed one.

    Raises:
        ConfigError: the config is invalid; the message lists every problem, one per line.
    """
    return from_dict(plain(composed))


def plain(composed: DictConfig) -> Any:
    """Turn a composed config into nested dictionaries.

    Raises:
        ConfigError: a value is missing, or an interpolation cannot be resolved.
    """
    try:
        return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explain(error) from error


def options(group: str) -> list[str]:
    """List the shipped options of a config group."""
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))


def explain(error: Exception) -> ConfigError:
    """Turn an error of Hydra or OmegaConf into a `ConfigError` that names the nearest valid spelling."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return ConfigError(no_such_key(match[1].split("@")[0].lstrip("+~")))
    if match := re.search(r"Could not find '((?:hydra/)?[^'/]+)/([^']+)'", text):
        group, option = match.groups()
        shipped = options(group)
        hub = f"; for a model of the hub: model=hub model.model_name_or_path={option}" if group == "model" else ""
        return ConfigError(
            f"{group}: no option '{option}'{did_you_mean(option, shipped)} Shipped options: {', '.join(shipped)}{hub}"
        )
    cause = f"\n{error.__cause__}" if error.__cause__ else ""
    return ConfigError(f"{text}{cause}")
