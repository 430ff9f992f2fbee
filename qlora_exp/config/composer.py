"""Compose configs, doing the work that several configs share only once.

Hydra takes a tenth of a second to compose a config. Must not import torch.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp.config.composition_errors import explain
from qlora_exp.config.conf_folder import GROUPS
from qlora_exp.config.overrides import OPTIONAL, no_option
from qlora_exp.libraries.hydra import apply_overrides, is_group
from qlora_exp.utils.errors import ConfigError


class Composer:
    """Composes configs that choose the same options: Hydra composes what they share once.

    This is valid because Hydra 1.3 applies `key=value` overrides last and in order, after it has composed the chosen
    options of config groups.
    """

    def __init__(self, loader: Any, compose: Callable[[list[str]], DictConfig]) -> None:
        """Remember how to compose a config.

        Args:
            loader: Hydra's config loader, which knows the config groups.
            compose: composes a config with overrides, with its node `hydra`.
        """
        self._loader, self._compose = loader, compose
        self._parser = OverridesParser.create()
        self._shared_configs: dict[tuple[str, ...], _SharedConfig] = {}

    def __call__(self, fixed: Sequence[str], chosen: Sequence[str]) -> tuple[Any, Mapping[str, Any]]:
        """Compose a config.

        Args:
            fixed: overrides that the config shares with others; applied first.
            chosen: the config's own overrides.

        Returns:
            The config as plain dictionaries without the node `hydra`, and the chosen options by group.

        Raises:
            ConfigError: a value is missing, or cannot be resolved; or a group has no option.
        """
        own = [self._parser.parse_override(word) for word in chosen]
        values = [] if any(map(Override.is_delete, own)) else [item for item in own if self._is_value(item)]
        shared = (*fixed, *(str(override.input_line) for override in own if override not in values))
        if shared not in self._shared_configs:
            composed = self._compose(list(shared))
            _refuse_missing_options(composed.hydra.runtime.choices)
            self._shared_configs[shared] = _SharedConfig(composed)
        found = self._shared_configs[shared]
        return found.with_values(values), found.choices

    def _is_value(self, override: Override) -> bool:
        if override.is_sweep_override() or override.is_hydra_override() or override.package:
            return False
        return not is_group(self._loader, override.key_or_group)


def _refuse_missing_options(choices: Mapping[str, Any]) -> None:
    """Refuse a config without an option of each group: the schema's defaults would silently replace the option."""
    if missing := [group for group in GROUPS if group not in OPTIONAL and choices.get(group) is None]:
        raise ConfigError(no_option(missing[0]))


class _SharedConfig:
    """What several configs share; each adds values of its own."""

    def __init__(self, composed: DictConfig) -> None:
        self.choices: dict[str, Any] = OmegaConf.to_container(composed.hydra.runtime.choices)  # type: ignore[assignment]
        composed = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        OmegaConf.set_struct(composed, True)
        self._pickled = pickle.dumps(composed)
        self._plain = b""
        """The config as plain dictionaries, which are much faster. Empty if it has interpolations or missing values."""
        values = OmegaConf.to_container(composed)
        if "${" not in (text := str(values)) and "???" not in text:
            self._plain = pickle.dumps(values)

    def with_values(self, values: Sequence[Override]) -> Any:
        """Return the config with these overrides applied, as plain dictionaries."""
        if self._plain:
            config = pickle.loads(self._plain)
            if all(_set_value(config, override) for override in values):
                return config
        composed = pickle.loads(self._pickled)
        apply_overrides(values, composed)
        return plain(composed)


def _set_value(node: Any, override: Override) -> bool:
    """Replace an existing value by another plain value.

    Returns:
        Whether the override could be applied in this simple way; if not, Hydra's own code must apply it.
    """
    value, *key_path = override.value(), *override.key_or_group.split(".")
    is_value = isinstance(value, bool | int | float | str) and "$" not in str(value) and value != "???"
    if override.type is not OverrideType.CHANGE or not is_value:
        return False
    for name in key_path[:-1]:
        node = node.get(name)
        if not isinstance(node, dict):
            return False
    if key_path[-1] not in node or isinstance(node[key_path[-1]], dict | list):
        return False
    node[key_path[-1]] = value
    return True


def plain(composed: DictConfig) -> Any:
    """Turn a composed config into nested dictionaries.

    Raises:
        ConfigError: a value is missing, or an interpolation cannot be resolved.
    """
    try:
        return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explain(error) from error
