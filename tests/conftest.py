"""Shared by all tests: no network, no files outside temporary folders, tiny models, one MLflow store."""

import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of two processes slow each other tenfold
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import QUICK

from qlora_exp.tracking.journal import metrics
from qlora_exp.utils.quiet import quiet

quiet()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _caches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Converted models are kept between test runs; datasets are not."""
    os.environ["QLORA_EXP_CACHE"] = str(request.config.cache.mkdir("models").absolute())
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of one MLflow store for all tests: creating one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlruns') / 'mlflow.db'}"


@pytest.fixture
def config() -> Callable[..., Any]:
    """Compose a quick run's config, changed by the given overrides."""
    from qlora_exp.config.hydra_compose import compose

    return lambda *overrides: compose([*QUICK, *overrides])


@pytest.fixture(scope="session")
def _imported() -> None:
    """What a run imports is looked at by no garbage collection: half of a tiny run's time otherwise."""
    import qlora_exp.sweeps.launchers.preload  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture
def run(store: str, tmp_path: Path, _imported: None) -> Callable[..., Any]:
    """Run a quick configuration, changed by the given overrides; in a new folder, or in one that is named."""
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.recipe.finetune import run

    counter = iter(range(100))

    def start(*overrides: str, folder: str | None = None) -> Any:
        checked = compose([*QUICK, f"tracking.uri={store}", *overrides])
        return run(checked, tmp_path / (folder or f"run{next(counter)}"))

    return start


SAVED = ("method=lora", "training.learning_rate=1e-2", "tracking.log_adapter=false", "evaluation=loss_only")


@pytest.fixture(scope="session")
def adapters(store: str, tmp_path_factory: pytest.TempPathFactory, _imported: None) -> Callable[..., Path]:
    """Folders that runs saved, by their overrides; each is trained once."""
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.recipe.finetune import run

    made: dict[tuple[str, ...], Path] = {}

    def saved(*words: str) -> Path:
        if words not in made:
            folder = tmp_path_factory.mktemp("run")
            run(compose([*QUICK, f"tracking.uri={store}", *SAVED, *words]), folder)
            made[words] = folder / "model"
        return made[words]

    return saved


@pytest.fixture(scope="session")
def _quanto() -> None:
    """Quanto unpacks its 4 bits in Python: it would compile a kernel for it first, for a minute on a new machine."""
    from types import SimpleNamespace

    import torch
    from optimum.quanto.library.extensions.cpp import ext

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    ext._lib = SimpleNamespace(unpack=unpack)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The byte-level tokenizer of the tiny models."""
    from qlora_exp.config.sections.model import ModelConfig
    from qlora_exp.models.base import load_tokenizer

    return load_tokenizer(ModelConfig(model_name_or_path="random:llama"))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows to a JSONL file and give its path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    return write


@pytest.fixture
def losses() -> Callable[[Any], list[float]]:
    """The training losses that a run left on disk, step by step."""

    def read(result: Any) -> list[float]:
        return [record["train/loss"] for record in metrics(result.output_dir) if "train/loss" in record]

    return read


@pytest.fixture(autouse=True)
def _garbage_is_collected() -> Iterator[None]:
    """The command line turns it off until it has something to run."""
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def _no_stray_handlers() -> Iterator[None]:
    """A run takes its log handler away again."""
    import logging

    before = list(logging.getLogger().handlers)
    yield
    after = logging.getLogger().handlers
    assert [handler for handler in after if isinstance(handler, logging.FileHandler)] == [
        handler for handler in before if isinstance(handler, logging.FileHandler)
    ]
