"""Compose the configs of a sweep's jobs, doing the work that jobs share only once."""

import pickle
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from qlora_exp.config.hydra_compose import plain, refuse_missing_options, without_hydra
from qlora_exp.libraries.hydra import apply_overrides, is_group
from qlora_exp.utils.errors import ConfigError


class Composer:
    """Composes the jobs of a sweep: Hydra composes what the jobs share once instead of once per job.

    This is valid because Hydra 1.3 applies `key=value` overrides last and in order, after it has composed the chosen
    options of config groups.
    """

    def __init__(self, loader: Any, master: DictConfig) -> None:
        self._loader, self._master = loader, master
        self._parser = OverridesParser.create()
        self._shared_configs: dict[tuple[str, ...], _SharedConfig] = {}

    def __call__(self, fixed: Sequence[str], chosen: Sequence[str]) -> Any:
        """Compose the config of one job as plain dictionaries, without the `hydra` node.

        Args:
            fixed: overrides that the job shares with others; applied first.
            chosen: the job's own overrides.

        Raises:
            ConfigError: a value is missing, or cannot be resolved.
        """
        own = [self._parser.parse_override(word) for word in chosen]
        values = [override for override in own if self._is_value(override)]
        shared = (*fixed, *(str(override.input_line) for override in own if override not in values))
        if shared not in self._shared_configs:
            self._shared_configs[shared] = _SharedConfig(self._compose(shared))
        return self._shared_configs[shared].with_values(values)

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        composed = self._loader.load_sweep_config(self._master, list(overrides))
        refuse_missing_options(composed.hydra.runtime.choices)
        for key in ("sweeper", "launcher", "sweep"):
            if composed.hydra[key] != self._master.hydra[key]:
                raise ConfigError(
                    f"hydra.{key}: must be the same for all jobs, but an option that is swept sets it; "
                    f"set it on the command line, or do not sweep over that option"
                )
        config = without_hydra(composed)
        OmegaConf.set_struct(config, True)
        return config

    def _is_value(self, override: Override) -> bool:
        if override.is_delete() or override.is_hydra_override() or override.package:
            return False
        return not is_group(self._loader, override.key_or_group)


class _SharedConfig:
    """A config that several jobs share; each job adds values of its own."""

    def __init__(self, composed: DictConfig) -> None:
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
