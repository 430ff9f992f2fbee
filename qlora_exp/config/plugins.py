"""Find the metrics and losses of the user's own that installed packages provide as entry points.

A config names them by their short names. Nothing of a package is imported before `load`, and what a record names is
never loaded, unless the user names it too (`untrusted`).
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from qlora_exp.config.schema import Config
from qlora_exp.utils.digests import file_digest, json_digest
from qlora_exp.utils.errors import ConfigError, did_you_mean, type_and_first_line

Kind = Literal["metric", "loss"]
GROUPS: dict[Kind, str] = {"metric": "qlora_exp.metrics", "loss": "qlora_exp.losses"}
"""Groups of entry points."""
KEYS: dict[Kind, str] = {"metric": "evaluation.metrics", "loss": "training.loss_type"}
"""Keys of the config that name them."""
BUILT_IN: dict[Kind, tuple[str, ...]] = {"metric": ("rouge", "exact_match"), "loss": ("nll", "dft")}
"""Names that always mean the metrics and losses of this package."""

LONGEST_UNIT = 40
"""Most characters of a metric's unit."""
_LISTED = 20
"""Most names in a message."""


class Facts(BaseModel):
    """What a run records of a metric or loss, as JSON in its tag `metric.NAME` or `loss.NAME`."""

    package: str
    version: str
    source: str
    """Digest of the package's source files: while one writes a metric, the version stays the same."""
    higher_is_better: bool | None = None
    """None for a loss."""
    unit: Annotated[str, Field(max_length=LONGEST_UNIT)] = ""

    @property
    def origin(self) -> str:
        """Package, version and digest as text."""
        return f"{self.package} {self.version} ({self.source})"


@dataclass(frozen=True)
class Plugin:
    """A metric or a loss of an installed package."""

    kind: Kind
    name: str
    package: str
    version: str
    value: str
    """Where it is: `module:attribute`."""

    def __str__(self) -> str:
        """Name it in messages."""
        return f"{KEYS[self.kind]}: {self.name} of {self.package} {self.version}"

    @property
    def facts(self) -> Facts:
        """What is known without importing it."""
        return Facts(package=self.package, version=self.version, source=_source(self.value))

    def load(self) -> Any:
        """Import it, which runs code of its package.

        Raises:
            ConfigError: it cannot be imported.
        """
        module, _, attribute = self.value.partition(":")
        try:
            return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
        except (Exception, SystemExit) as error:  # it may raise anything
            raise ConfigError(f"{self} cannot be imported ({self.value}): {type_and_first_line(error)}") from error

    def function(self, required: Sequence[str], optional: Sequence[str]) -> tuple[Callable[..., Any], tuple[str, ...]]:
        """Import it, and return it with those of the optional arguments that it takes.

        Args:
            required: names of its arguments by position.
            optional: further arguments, which it gets by name if it names them.

        Raises:
            ConfigError: it cannot be imported, is no function, or takes other arguments.
        """
        function = self.load()
        if inspect.isclass(function) or not callable(function):
            kind = "class" if inspect.isclass(function) else type(function).__name__
            raise ConfigError(f"{self} is of the type {kind}, not a function ({self.value})")
        try:
            signature = inspect.signature(function)
            taken = tuple(name for name in optional if name in signature.parameters)
            signature.bind(*required, **dict.fromkeys(taken))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{self} must take the arguments {', '.join(required)}, and may take {' and '.join(optional)}: {error}"
            ) from error
        return function, taken


def named(config: Config) -> list[tuple[Kind, str]]:
    """List the kind and name of each metric and loss that a config takes from installed packages."""
    names: dict[Kind, list[str]] = {"metric": config.evaluation.metrics, "loss": [config.training.loss_type]}
    return [(kind, name) for kind in names for name in dict.fromkeys(names[kind]) if name not in BUILT_IN[kind]]


def problems(config: Config) -> Iterator[str]:
    """Yield a message for each metric or loss that no installed package has. Imports none of them."""
    for kind, name in named(config):
        try:
            find(kind, name)
        except ConfigError as error:
            yield str(error)


def find(kind: Kind, name: str) -> Plugin:
    """Return the metric or loss with this name, without importing it.

    Raises:
        ConfigError: no package or several packages have it; the message lists those that are installed.
    """
    found = [plugin for plugin in _installed(kind, tuple(sys.path)) if plugin.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        packages = " and ".join(f"{plugin.package} {plugin.version}" for plugin in found)
        raise ConfigError(f"{KEYS[kind]}: several installed packages have a {kind} '{name}', {packages}; keep one")
    others = [plugin.name for plugin in _installed(kind, tuple(sys.path))]
    hint = did_you_mean(name, [*BUILT_IN[kind], *others]).rstrip(".?")
    listed = f"{', '.join(others[:_LISTED]) or 'none'}{', ...' * (len(others) > _LISTED)}"
    raise ConfigError(
        f"{KEYS[kind]}: no {kind} '{name}'{hint}; built in: {', '.join(BUILT_IN[kind])}; entry points "
        f"{GROUPS[kind]} of installed packages: {listed}"
    )


def version(config: Config) -> str:
    """Return which metrics and losses of packages a config uses, with their versions; empty if it uses none."""
    parts = []
    for kind, name in named(config):
        try:
            parts.append(f"{kind} {name}: {find(kind, name).facts.origin}")
        except ConfigError:  # a record of another machine
            parts.append(f"{kind} {name}: missing")
    return "; ".join(parts)


@functools.lru_cache(maxsize=8)
def _installed(kind: Kind, _path: tuple[str, ...]) -> tuple[Plugin, ...]:
    """List all that packages in the folders of `sys.path` provide; reading them takes a tenth of a second."""
    points: list[Any] = [*entry_points(group=GROUPS[kind])]
    return tuple(
        Plugin(kind, point.name, str(point.dist.name), str(point.dist.version), point.value.partition("[")[0].strip())
        for point in points
    )


@functools.lru_cache(maxsize=256)
def _source(value: str) -> str:
    """Return a digest of the source files of the package that contains `module:attribute`, without importing it."""
    top = value.partition(":")[0].partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return "missing"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = {str(file.relative_to(folder)): file for folder in folders for file in sorted(folder.rglob("*.py"))}
    if not files and spec.origin:
        files = {top: Path(spec.origin)}
    return json_digest({name: file_digest(file) for name, file in files.items() if file.is_file()}, 8)
