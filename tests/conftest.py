"""Shared by all tests: no network, no files outside temporary folders, tiny models, one MLflow store."""

import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of two processes slow each other tenfold
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"

import json
import multiprocessing
import pickle
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from helpers.lm_eval_tasks import write_task
from support import QUICK

from qlora_exp.tracking.journal import metrics
from qlora_exp.utils.quiet import quiet

if TYPE_CHECKING:
    from mlflow import MlflowClient

quiet()
hypothesis.settings.register_profile("busy", deadline=None)  # other tests use the machine at the same time
hypothesis.settings.load_profile("busy")
# Whichever test starts the fork server: all others fork from it too, and would load the libraries themselves.
multiprocessing.get_context("forkserver").set_forkserver_preload(["qlora_exp.recipe.preload"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none. Begin with what takes long, so that no worker ends with it."""
    import torch

    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _caches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep converted models between test runs, but no datasets."""
    os.environ["QLORA_EXP_CACHE"] = str(request.config.cache.mkdir("models").absolute())
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_disks() -> Iterator[None]:
    """Do not wait until files are on the disk, half a second in each run: tests kill processes, but not the machine."""
    from sqlalchemy import Engine, event

    def connected(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            with suppress(sqlite3.DatabaseError):  # a damaged file, which the test is about
                connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", connected)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        yield
    event.remove(Engine, "connect", connected)


@pytest.fixture(autouse=True, scope="session")
def _stores_are_copied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let MLflow create one store, which takes seconds, and copy it for all others."""
    if (mlflow_store := sys.modules.get("qlora_exp.tracking.mlflow_store")) is None:  # no test here imports it
        yield
        return
    from sqlalchemy import make_url

    create, made = mlflow_store.create_tables, tmp_path_factory.mktemp("store") / "mlflow.db"

    def copy(uri: str) -> None:
        if not made.exists():
            create(f"sqlite:///{made}")
        shutil.copy(made, str(make_url(uri).database))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mlflow_store, "create_tables", copy)
        yield


@pytest.fixture(autouse=True, scope="session")
def _yaml_is_parsed_once() -> Iterator[None]:
    """Parse each option file once: Hydra parses all that it composes again for each config, a sixth of that time."""
    from omegaconf import OmegaConf

    load, parsed = OmegaConf.load, dict[str, bytes]()

    def load_once(file: Any) -> Any:
        if not hasattr(file, "read"):
            return load(file)
        text = file.read()
        if text not in parsed:
            file.seek(0)  # an error names the file
            parsed[text] = pickle.dumps(load(file))
        return pickle.loads(parsed[text])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(OmegaConf, "load", load_once)
        yield


@pytest.fixture(autouse=True, scope="session")
def _rough_peak() -> Iterator[None]:
    """Measure the device's peak only roughly, which takes milliseconds instead of a tenth of a second, twice a run."""
    from qlora_exp.environment import efficiency

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(efficiency, "PEAK_SECONDS", 0.0)
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test in its own folder, with the default MLflow store there."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give the URI of one MLflow store for all tests: creating one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlruns') / 'mlflow.db'}"


@pytest.fixture(scope="session")
def _empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an MLflow store that is only copied."""
    from qlora_exp.tracking import mlflow_store

    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mlflow_store._create_store(file)
    return file


@pytest.fixture
def make_store(_empty_store: Path, tmp_path: Path) -> Callable[[str], str]:
    """Make an empty MLflow store in the test's folder and give its URI; a copy, as creating one takes seconds."""

    def make(name: str) -> str:
        return f"sqlite:///{shutil.copy(_empty_store, tmp_path / name)}"

    return make


@pytest.fixture
def mlflow_client(mlflow_uri: str) -> "MlflowClient":
    """Give a client of the store of all tests."""
    from qlora_exp.tracking.mlflow_store import client

    return client(mlflow_uri)


@pytest.fixture
def make_config() -> Callable[..., Any]:
    """Compose a quick run's config, changed by the given overrides."""
    from qlora_exp.config.hydra_compose import compose

    return lambda *overrides: compose([*QUICK, *overrides])


@pytest.fixture(scope="session")
def _imported() -> Iterator[None]:
    """Import what a run imports, and hide it from garbage collection; read built-in rows once for all runs."""
    import qlora_exp.recipe.preload  # noqa: F401
    from qlora_exp.data import rows

    gc.collect()
    gc.freeze()
    load, kept = rows.load_rows, dict[str, Any]()

    def load_once(config: Any, general: Any = None) -> Any:
        both = [each for each in (config, general) if each is not None]
        if not all(path.startswith("embedded:") for each in both for path in each.paths):  # a file may change
            return load(config, general)
        key = " ".join(each.model_dump_json() for each in both)
        if key not in kept:
            kept[key] = load(config, general)
        return kept[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rows, "load_rows", load_once)
        yield


@pytest.fixture(autouse=True, scope="module")
def _kept_objects_are_not_garbage() -> None:
    """Hide what is imported so far from garbage collection, which takes a fifth of all time otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def run_quick(mlflow_uri: str, tmp_path: Path, _imported: None) -> Callable[..., Any]:
    """Run a quick configuration, changed by the given overrides; in a new folder, or in one that is named."""
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.recipe.finetune import run

    counter = iter(range(100))

    def start(*overrides: str, folder: str | None = None) -> Any:
        checked = compose([*QUICK, f"tracking.uri={mlflow_uri}", *overrides])
        return run(checked, tmp_path / (folder or f"run{next(counter)}"))

    return start


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Give the folder of a tiny model of a family, with the fields of `helpers.tiny_models.save`; each is made once."""
    from helpers import tiny_models

    folders: dict[str, str] = {}

    def folder(kind: str, tokenizer: Any = None, **fields: Any) -> str:
        key = json.dumps([kind, str(tokenizer and id(tokenizer)), fields])
        if key not in folders:
            made = tiny_models.tokenizer() if tokenizer is None else tokenizer
            folders[key] = tiny_models.save(tmp_path_factory.mktemp(kind), kind, made, **fields)
        return folders[key]

    return folder


@pytest.fixture(scope="session")
def shared_run(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory, _imported: None) -> Callable[..., Any]:
    """Give the result of a quick run with the given overrides, for tests that only read it; each is trained once."""
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.recipe.finetune import run

    results: dict[tuple[str, ...], Any] = {}

    def result(*overrides: str) -> Any:
        if overrides not in results:
            words = [*QUICK, f"tracking.uri={mlflow_uri}", *overrides]
            results[overrides] = run(compose(words), tmp_path_factory.mktemp("run"))
        return results[overrides]

    return result


SAVED = ("method=lora", "training.learning_rate=1e-2", "tracking.log_adapter=false", "evaluation=loss_only")


@pytest.fixture(scope="session")
def trained_adapters(shared_run: Callable[..., Any]) -> Callable[..., Path]:
    """Give the folder of a model that was trained with the given overrides; each is trained once."""

    def saved(*overrides: str) -> Path:
        folder: Path = shared_run(*SAVED, *overrides).output_dir / "model"
        return folder

    return saved


@pytest.fixture(scope="session")
def recorded_run(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory, _imported: None) -> Any:
    """Give the record of a run, whose experiment has two more seeds of it."""
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.recipe.finetune import run
    from qlora_exp.results.reproduce import find_run

    words = [*QUICK, f"tracking.uri={mlflow_uri}", "tracking.experiment_name=recorded", "method=lora"]
    folder = tmp_path_factory.mktemp("recorded")
    seeds = {seed: run(compose([*words, f"seed={seed}"]), folder / str(seed)) for seed in (2, 3, 1)}
    return find_run(mlflow_uri, seeds[1].run_id)


@pytest.fixture(params=["shared", "shared.zip"])
def bundle_path(request: pytest.FixtureRequest, recorded_run: Any, tmp_path: Path) -> Path:
    """Write the recorded run as a bundle: a folder, or a zip file."""
    from qlora_exp.results import bundle

    bundle.write(recorded_run, tmp_path / request.param)
    return tmp_path / request.param


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """Write a task of lm-eval with ten items."""
    return write_task(tmp_path / "tasks")


@pytest.fixture(scope="session")
def _quanto() -> None:
    """Unpack Quanto's 4 bits in Python: it would compile a kernel for it first, for a minute on a new machine."""
    from types import SimpleNamespace

    import torch
    from optimum.quanto.library.extensions.cpp import ext

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    ext._lib = SimpleNamespace(unpack=unpack)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Load the byte-level tokenizer of the tiny models."""
    from qlora_exp.config.sections.model import ModelConfig
    from qlora_exp.models.base import load_tokenizer

    return load_tokenizer(ModelConfig(model_name_or_path="random:llama"))


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows to a JSONL file and give its path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    return write


@pytest.fixture
def read_losses() -> Callable[[Any], list[float]]:
    """Read the training losses that a run left on disk, step by step."""

    def read(result: Any) -> list[float]:
        return [record["train/loss"] for record in metrics(result.output_dir) if "train/loss" in record]

    return read


@pytest.fixture(autouse=True)
def _garbage_collection_is_on() -> Iterator[None]:
    """Turn on what the command line turns off until it has something to run."""
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def _no_log_handler_is_left() -> Iterator[None]:
    """Fail a test whose run leaves its log handler behind."""
    import logging

    before = list(logging.getLogger().handlers)
    yield
    after = logging.getLogger().handlers
    assert [handler for handler in after if isinstance(handler, logging.FileHandler)] == [
        handler for handler in before if isinstance(handler, logging.FileHandler)
    ]
