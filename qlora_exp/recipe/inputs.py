"""Read and check the inputs of a run: rows, tasks, the device, then the model without weights.

An error here leaves no run behind. Rows are read first, before the slow imports.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qlora_exp.config import crosschecks, plugins
from qlora_exp.config.plugins import Facts
from qlora_exp.config.schema import Config
from qlora_exp.config.sections.dataset import looks_local
from qlora_exp.config.sections.mixture import twice
from qlora_exp.config.sections.model import ModelConfig
from qlora_exp.config.tables.optimizers import check_package
from qlora_exp.distributed import group
from qlora_exp.environment import data_files, hub, likely
from qlora_exp.environment.device import Resolved, detect, resolve, take
from qlora_exp.libraries.imports import import_quickly
from qlora_exp.models import files as model_files
from qlora_exp.tracking.stores import uris
from qlora_exp.utils.env_file import load_env_file
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.files import check_source

if TYPE_CHECKING:
    from datasets import Dataset

    from qlora_exp.data.rows import Rows
    from qlora_exp.recipe.saved import FirstAdapter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Inputs that the stages of a run use."""

    rows: "Rows"
    """Training and held-out rows, as text."""
    unrelated: "Dataset | None"
    """Rows of text unrelated to the training data; None if forgetting is not measured."""
    lm_eval_tasks: dict[str, Any]
    """Loaded tasks of lm-eval."""
    score: Callable[[str, dict[str, Any]], float] | None
    """The dataset's own function that scores an answer, 0 to 1; None if it has none."""
    first_adapter: "FirstAdapter | None"
    """Adapter to train on from; None for a new one."""
    plugin_facts: dict[str, Facts]
    """What is known of metrics and losses of installed packages, by tag: `metric.NAME`, `loss.NAME`."""
    resolved: Resolved
    """Values that the settings `auto` take on this device."""


def check_config(config: Config) -> None:
    """Check all that needs no slow import, so that such mistakes are reported within two seconds.

    Raises:
        ConfigError: the config contradicts itself, or names a store that cannot be used.
        DataError: a file is missing.
        ModelError: the model's files cannot be used.
    """
    if config.distributed.engine == "deepspeed_zero3" and find_spec("deepspeed") is None:
        raise ConfigError("distributed=deepspeed_zero3 needs an extra package: pip install 'qlora-exp[deepspeed]'")
    check_package(config.optimizer.optim)
    for remark in likely.check(config):
        log.warning("%s", remark)
    # A `Config` may be made without `compose`.
    if problems := [*crosschecks.problems(config), *plugins.problems(config)]:
        raise ConfigError("\n".join(problems))
    if same := twice(config.dataset):
        raise ConfigError(f"dataset.sources: {' and '.join(same)} read the same rows in the same way; remove one")
    for section, source in config.sections_of_rows.items():
        for path in filter(looks_local, source.paths):
            data_files.check(path, f"{section}.path")
    load_env_file()
    store = uris.store_uri(config.tracking.uri)
    uris.check_driver(store)
    uris.check_files(store)
    uris.experiment_name(config.tracking.experiment_name)
    if hub.is_needed(config):
        hub.go_offline_if_unreachable()  # must come before huggingface_hub is imported
    model_files.check(config)
    if config.model.adapter:
        check_source(config.model.adapter, "model.adapter: ")


def read_inputs(config: Config) -> Inputs:
    """Check the config, read rows and tasks, and choose the device.

    Raises:
        ConfigError: the device is not available, or the adapter does not fit.
        DataError: a file is missing or damaged, no row is left, or a row has a token that the model lacks.
        ModelError: the model or its tokenizer cannot be loaded or used.
    """
    check_config(config)
    from qlora_exp.data import tokenization
    from qlora_exp.data.reading import sources
    from qlora_exp.data.rows import load_heldout, load_rows

    rows = load_rows(config.dataset, config.unrelated)
    unrelated = load_heldout(config.unrelated) if config.unrelated.paths else None
    score = sources.scorer(config.dataset)
    facts = _plugins(config, rows)
    # Imported after the rows are read: these modules import torch, which takes seconds.
    import_quickly()
    from qlora_exp.models import builtin
    from qlora_exp.models.checks import check_model
    from qlora_exp.recipe.saved import first_adapter
    from qlora_exp.training import lm_eval

    family = config.model.model_name_or_path.removeprefix("random:")
    if family in builtin.TINY:
        builtin.check_fields("model.random_config", family, dict(config.model.random_config))
    tasks = lm_eval.load_tasks(config.evaluation) if config.evaluation.lm_eval_tasks else {}
    resolved = resolve(config, detect(config.device, bitsandbytes=config.quantization.bitsandbytes))
    take(resolved)

    def tokenize(tokenizer: Any) -> dict[str, "Dataset"]:
        parts = {"training": rows.train, "held-out": rows.heldout}
        tokens = {name: tokenization.tokenize(part, config, tokenizer) for name, part in parts.items()}
        return (
            tokens
            if unrelated is None
            else tokens | {"unrelated": tokenization.unrelated(unrelated, config, tokenizer)[1]}
        )

    check_model(config, resolved, tokenize)
    if config.training.packing or config.training.padding == "free":
        _check_packing_of_family(config, resolved)
    return Inputs(rows, unrelated, tasks, score, first_adapter(config), facts, resolved)


def check_packing(model: Any, config: Config) -> None:
    """Check that a model keeps rows in one sequence apart.

    Args:
        model: the model that is to be trained, or one that computes as it does.
        config: the run, for messages.

    Raises:
        ConfigError: it does not.
    """
    from qlora_exp.training.evaluation import isolates_packed_rows

    instead = "training.packing=false" if config.training.packing else "training.padding=batch"
    if not isolates_packed_rows(model, instead):
        raise ConfigError(
            f"{instead.partition('=')[0]}: {config.model.model_name_or_path} does not keep packed rows apart, so the "
            f"result would differ from training on single rows; use {instead}"
        )


def _check_packing_of_family(config: Config, resolved: Resolved) -> None:
    """Check packing on a tiny model of the same family, if there is one, before the weights are loaded.

    Which kernels compute convolutions and state spaces depends on the device, so models that have them are checked here
    on a CPU only. Every model is checked once more when it is loaded.

    Raises:
        ConfigError: packed rows are not kept apart.
    """
    from torch.nn import Conv1d

    from qlora_exp.models import base, builtin

    family = base.skeleton(config.model).config.get_text_config().model_type
    implementation = config.model.attn_implementation
    if family not in builtin.TINY or implementation not in (None, "eager", "sdpa"):
        return
    tiny = base.load_unquantized(ModelConfig(model_name_or_path=f"random:{family}", attn_implementation=implementation))
    if resolved.device == "cpu" or not any(isinstance(module, Conv1d) for module in tiny.modules()):
        check_packing(tiny, config)


def _plugins(config: Config, rows: "Rows") -> dict[str, Facts]:
    """Try out the metrics and the loss of installed packages, and return what is known of them.

    Raises:
        ConfigError: one cannot be used.
    """
    from qlora_exp.training.plugins import user_metrics

    facts: dict[str, Facts] = {}
    if names := user_metrics.of_config(config.evaluation):
        both = [rows.heldout[0], rows.heldout[len(rows.heldout) - 1]]
        # Only the main process scores, and metrics may take memory.
        metrics = group.call_on_main(user_metrics.try_out, names, both)
        facts |= {f"metric.{name}": declared for name, declared in metrics.items()}
    if (name := config.training.loss_type) not in plugins.BUILT_IN["loss"]:
        from qlora_exp.training.plugins import user_losses  # imports torch, which takes seconds

        facts[f"loss.{name}"] = user_losses.load(name).facts
    return facts
