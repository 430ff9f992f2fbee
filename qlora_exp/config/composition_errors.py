"""Turn errors of Hydra and OmegaConf into messages that name the cause and the nearest valid spelling."""

import re
from typing import Any

from hydra.errors import MissingConfigException

from qlora_exp.config.conf_folder import GROUPS
from qlora_exp.config.overrides import no_hydra_values
from qlora_exp.config.schema import Config
from qlora_exp.config.validate import no_such_key
from qlora_exp.utils.errors import ConfigError, did_you_mean

_LATER = ("method", "experiment", "sweep")
"""Groups that can choose options of the groups before them, in the order of `conf/config.yaml`."""


def explain(error: Exception) -> ConfigError:
    """Turn an error raised while Hydra composes a config into a `ConfigError`."""
    text = str(error)
    where = f"{file[1]}.yaml: " if (file := re.match(r"In '([^']+)': ", text)) else ""
    if match := re.search(r"Could not override '([^']+)'", text):
        inner = re.search(r"full_key: (\S+)", str(error.__cause__))  # of a value that is a mapping
        key = inner[1] if inner and inner[1].startswith(f"{match[1]}.") else match[1]
        return ConfigError(f"{where}{_not_overridden(key, where)}")
    if match := re.search(r"Could not delete (?:from config\. )?'([^'=]+)", text):
        return ConfigError(no_such_key(match[1]))
    if match := re.search(r"Multiple values for ([\w/]+)\. To override a value use", text):
        return ConfigError(
            f"{match[1]}: an option is chosen already: write {match[1]}=OPTION without '+' on the command line, or "
            f"`override /{match[1]}: OPTION` in the defaults of a file"
        )
    if match := re.search(r"force-add of config groups is not supported: '\+*([^']+)'", text):
        return ConfigError(f"++{match[1]}: write {match[1]}")
    if match := re.search(r"Could not find '([^']+)'", text):
        return ConfigError(_no_option(match[1], where, error))
    if match := re.search(r"unexpected keyword argument '(\w+)'(?s:.*)full_key: (hydra\.\w+)", text):
        return ConfigError(no_such_key(f"{match[2]}.{match[1]}"))
    if "HydraConfig was not set" in text:
        key = re.search(r"full_key: (\S+)", text)
        return ConfigError(no_hydra_values(key[1] if key else "a key"))
    if match := re.search(r"Cannot merge DictConfig with \w+(?s:.*)full_key: (\S+)", f"{text}\n{error.__cause__}"):
        if isinstance(_default(match[1]), list):
            return ConfigError(f"{match[1]}: must be a list, such as {match[1]}=[VALUE,VALUE]")
        example = "dataset.sources.NAME.path=PATH" if match[1] == "dataset.sources" else f"{match[1]}.NAME=VALUE"
        return ConfigError(f"{match[1]}: must be a mapping of names to values, such as {example}")
    cause = f"\n{error.__cause__}" if error.__cause__ else ""
    return ConfigError(f"{text}{cause}")


def _default(key: str) -> Any:
    """Return the default of a declared key; None for others."""
    section: Any = Config
    default = None
    for name in key.split("."):
        if (field := getattr(section, "model_fields", {}).get(name)) is None:
            return None
        section, default = field.annotation, field.default
    return default


def _not_overridden(name: str, where: str) -> str:
    """Return the message for a key or group that cannot be overridden where it was tried."""
    key = name.split("@")[0].lstrip("+~")
    group = key.rpartition("/")[2]
    if key not in GROUPS and group in GROUPS and where:
        return f"`override {group}` is relative to this file's group: write `override /{group}: OPTION`"
    if key in GROUPS and where:
        own = where.split("/")[0]
        allowed = f"; files of {' and '.join(_LATER)} can choose options of the groups before them"
        return (
            f"a file of {own} cannot choose the option of {key}, which comes after it{allowed}; "
            f"give {key}=OPTION on the command line"
        )
    return no_such_key(key)


def _no_option(path: str, where: str, error: Exception) -> str:
    """Return the message for an option that does not exist."""
    group, _, option = path.rpartition("/")
    inside, _, chosen = group.rpartition("/")
    if inside in GROUPS and chosen in GROUPS:
        return f"{where}there is no {path}.yaml: to choose {chosen}={option}, write `override /{chosen}: {option}`"
    existing = sorted((isinstance(error, MissingConfigException) and error.options) or ())
    if not existing:
        return f"{where}there is no {path}.yaml"
    hub = f"; for a model of the hub: model=hub model.model_name_or_path={option}" if group == "model" else ""
    return f"{group}: no option '{option}'{did_you_mean(option, existing)} Options: {', '.join(existing)}{hub}"
