"""From overrides to a checked `Config`: Hydra composes, `schema` checks, mistakes become one clear message.

Knows where the shipped `conf/` folder is. Must stay light: `--help` and `--cfg job` go through here.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from qlora_exp import peft_registry
from qlora_exp.errors import ConfigError, did_you_mean, nearest
from qlora_exp.schema import Config

OPEN_SECTIONS = ("method", "lora_variant")
"""Sections with PEFT's settings: `method.use_rslora=true` needs no `+`, and `schema` refuses what PEFT has not."""


def conf_dir() -> Path:
    """The shipped config groups: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"no conf/config.yaml beside or inside {package}: the installation is incomplete")


def register() -> None:
    """Give Hydra the schema's keys and defaults as the config `schema`, the root that every group overrides."""
    node = OmegaConf.create(Config().model_dump(mode="json"))
    for section in OPEN_SECTIONS:
        OmegaConf.set_struct(node[section], False)
    ConfigStore.instance().store(name="schema", node=node)


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Config:
    """Compose and check one run's config, as `qlora-exp train OVERRIDES` does.

    Args:
        overrides: Hydra overrides, e.g. `["method=lora", "method.r=8"]`.
        config_dir: a folder of your own groups and options, searched after the shipped ones.

    Raises:
        ConfigError: what is wrong, where, and the nearest valid spelling.
    """
    register()
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return check(hydra_compose("config", overrides=[*search, *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error


def check_command(arguments: Sequence[str]) -> None:
    """Check what a command line would run, before anything runs.

    Args:
        arguments: overrides and Hydra's flags, as after `qlora-exp train`.

    Raises:
        ConfigError: with every problem that was found.
    """
    config_dir = next((later for flag, later in pairwise(arguments) if flag in ("--config-dir", "-cd")), None)
    config_dir = next((word.split("=", 1)[1] for word in arguments if word.startswith("--config-dir=")), config_dir)
    compose([word for word in arguments if "=" in word and not word.startswith("-")], config_dir)


def grid(overrides: Sequence[str]) -> list[list[str]]:
    """Each combination of what overrides list (`method.r=4,8`), of a named sweep's lists too.

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
    given = {word.split("=", 1)[0] for word in overrides}
    words = [*(f"{key}={value}" for key, value in params.items() if key not in given), *overrides]
    try:
        batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    except HydraException as error:
        raise explain(error) from error
    return [list(job) for batch in batches for job in batch]


def check(composed: DictConfig) -> Config:
    """The typed config of a composed one.

    Raises:
        ConfigError: with every problem that was found, one a line.
    """
    return from_dict(plain(composed))


def plain(composed: DictConfig) -> Any:
    """A composed config as nested dictionaries.

    Raises:
        ConfigError: a value is missing, or cannot be worked out.
    """
    try:
        return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explain(error) from error


def from_dict(values: Any) -> Config:
    """The typed config of plain nested values, e.g. of a recorded run.

    Raises:
        ConfigError: with every problem that was found, one a line.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(problem) for problem in error.errors())) from error


def to_yaml(config: Config) -> str:
    """The whole config as YAML, which `from_dict(yaml.safe_load(...))` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


APART = ("tracking", "sweep", "search")
"""Sections that change no run's result."""


def what_counts(values: dict[str, Any]) -> dict[str, Any]:
    """Of a config as plain nested values, what can change a run's result: not how it is tracked, swept or planned."""
    counts = {key: value for key, value in values.items() if key not in APART}
    return counts | {
        "model": {key: value for key, value in dict(counts.get("model") or {}).items() if key != "architecture"}
    }


def flatten(config: Config) -> dict[str, Any]:
    """The config as dotted keys (`method.r`) and plain values; a free mapping or list is one value.

    `model.architecture`, which only plans read, is left out.
    """

    def walk(prefix: str, section: BaseModel) -> Iterator[tuple[str, Any]]:
        for name, value in section:
            if isinstance(value, BaseModel):
                yield from walk(f"{prefix}{name}.", value)
            else:
                yield f"{prefix}{name}", value

    return {key: value for key, value in walk("", config) if key != "model.architecture"}


def known_keys() -> list[str]:
    """Every dotted key that a config can have, PEFT's LoRA settings included."""

    def walk(prefix: str, section: type[BaseModel]) -> Iterator[str]:
        for name, field in section.model_fields.items():
            yield f"{prefix}{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from walk(f"{prefix}{name}.", field.annotation)

    lora = [f"{section}.{name}" for section in OPEN_SECTIONS for name in peft_registry.settings("LORA")]
    return [*walk("", Config), *lora]


def options(group: str) -> list[str]:
    """The shipped options of a config group."""
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))


def explain(error: Exception) -> ConfigError:
    """Hydra's or OmegaConf's error as a `ConfigError` that names the nearest valid spelling."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return ConfigError(_no_such_key(match[1].split("@")[0].lstrip("+~")))
    if match := re.search(r"Could not find '((?:hydra/)?[^'/]+)/([^']+)'", text):
        group, option = match.groups()
        known = options(group)
        hub = f"; a model of the hub: model=hub model.model_name_or_path={option}" if group == "model" else ""
        return ConfigError(
            f"{group}: no option '{option}'{did_you_mean(option, known)} Shipped options: {', '.join(known)}{hub}"
        )
    cause = f"\n{error.__cause__}" if error.__cause__ else ""
    return ConfigError(f"{text}{cause}")


def _no_such_key(key: str) -> str:
    if key.rpartition(".")[2] in ("output_dir", "out", "output"):
        return f"{key}: no such key or group; the output folder is hydra.run.dir=FOLDER"
    if key.startswith("hydra."):
        return f"{key}: no such key of Hydra's (--cfg hydra shows them); +{key}=VALUE adds one that a plugin takes"
    section = key.rpartition(".")[0]
    siblings = [known for known in known_keys() if known.rpartition(".")[0] == section]
    if near := nearest(key, siblings) or nearest(key, known_keys(), cutoff=0.8):
        return f"{key}: no such key or group; did you mean '{near}'?"
    return f"{key}: no such key or group; `{f'qlora-exp keys {section}'.strip()}` lists them"


def _describe(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("literal["))
    if problem["type"] == "extra_forbidden":
        return _no_such_key(where)
    if problem["input"] is None or problem["type"] == "string_too_short":
        return f"{where}: must be given: {where}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message if message.startswith(f"{where}.") or not where else f"{where}: {message}"
    return f"{where}: {message}, got {problem['input']!r:.200}"
