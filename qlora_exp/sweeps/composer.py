"""Compose the jobs of a sweep without doing the shared work for each."""

import pickle
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from qlora_exp.config.hydra_compose import plain
from qlora_exp.libraries.hydra import apply_overrides, is_group


class Composer:
    """Composes the jobs of a sweep: what Hydra does for each is done once for what they share.

    Hydra applies `key=value`, in order, to what the chosen options gave, after everything else; so may we (hydra 1.3).
    """

    def __init__(self, loader: Any, master: DictConfig) -> None:
        self._loader, self._master = loader, master
        self._parser = OverridesParser.create()
        self._begun: dict[tuple[str, ...], _Begun] = {}

    def __call__(self, fixed: Sequence[str], chosen: Sequence[str]) -> Any:
        """The config of one job, plain, without the `hydra` node: of overrides that others share, then its own.

        Raises:
            ConfigError: a value is missing, or cannot be worked out.
        """
        own = [self._parser.parse_override(word) for word in chosen]
        values = [one for one in own if self._is_value(one)]
        shared = (*fixed, *(str(one.input_line) for one in own if one not in values))
        if shared not in self._begun:
            self._begun[shared] = _Begun(self._begin(shared))
        return self._begun[shared].with_values(values)

    def _begin(self, words: Sequence[str]) -> DictConfig:
        found = self._loader.load_sweep_config(self._master, list(words))
        rest = OmegaConf.masked_copy(found, [key for key in found if key != "hydra"])
        OmegaConf.set_struct(rest, True)
        return rest

    def _is_value(self, override: Override) -> bool:
        if override.is_delete() or override.is_hydra_override() or override.package:
            return False
        return not is_group(self._loader, override.key_or_group)


class _Begun:
    """A config that jobs share, to which each adds values of its own."""

    def __init__(self, composed: DictConfig) -> None:
        self._pickled = pickle.dumps(composed)
        self._plain = b""
        """The same as plain dictionaries, which are much faster; if no value is worked out from others, or missing."""
        values = OmegaConf.to_container(composed)
        if "${" not in (text := str(values)) and "???" not in text:
            self._plain = pickle.dumps(values)

    def with_values(self, values: Sequence[Override]) -> Any:
        """Plain."""
        if self._plain:
            found = pickle.loads(self._plain)
            if all(_put(found, one) for one in values):
                return found
        composed = pickle.loads(self._pickled)
        apply_overrides(values, composed)
        return plain(composed)


def _put(found: Any, override: Override) -> bool:
    """Set one value that is there, to another that is no more than a value; whether that is all there is to do."""
    value, *path = override.value(), *override.key_or_group.split(".")
    is_value = isinstance(value, bool | int | float | str) and "$" not in str(value) and value != "???"
    if override.type is not OverrideType.CHANGE or not is_value:
        return False
    for name in path[:-1]:
        found = found.get(name)
        if not isinstance(found, dict):
            return False
    if path[-1] not in found or isinstance(found[path[-1]], dict | list):
        return False
    found[path[-1]] = value
    return True
