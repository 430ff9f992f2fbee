"""Save the trained adapter or model, and log it to MLflow as a model."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

import torch

from qlora_exp.config.values import values_to_yaml, without_places
from qlora_exp.data import prompts
from qlora_exp.environment.ranks import ranks
from qlora_exp.models import adapters, lora_init, transformers_4
from qlora_exp.recipe.context import RunContext
from qlora_exp.recipe.setup import Trainable
from qlora_exp.recipe.tokens import Tokens
from qlora_exp.tracking import lifecycle, run_key
from qlora_exp.tracking.journal import CONFIG_FILE
from qlora_exp.training.checkpoints import checkpoints
from qlora_exp.utils.errors import DivergedError, JournalError
from qlora_exp.utils.files import size_on_disk

log = logging.getLogger(__name__)


def save(run: RunContext, tokens: Tokens, trainable: Trainable) -> None:
    """Write the adapter or model, the tokenizer and the config to `model/`, before anything else can fail."""
    config, folder = run.config, run.saved_model
    with run.memory.phase("save"):
        trainable.trainer.save_model(str(folder))
        if not ranks().is_main:
            return
        if run.first_adapter.is_dir():
            lora_init.save_difference(trainable.trainer.model, folder, run.first_adapter)
        tokenizer = copy(tokens.tokenizer)  # the evaluation after training must use it unchanged, as the one before
        if (template := prompts.served_template(config.dataset, tokenizer)) is not None:
            tokenizer.chat_template = template  # so that users of the model prompt it in the format of its training
        tokenizer.save_pretrained(folder)
    shared = without_places(config.model_dump(mode="json"))
    adapters.make_portable(folder, shared["model"]["model_name_or_path"])
    transformers_4.add_old_names(folder)
    (folder / CONFIG_FILE).write_text(values_to_yaml(shared), "utf-8")
    if trainable.peft_config is not None:
        version = run_key.model_version(config.model.model_name_or_path, config.model.revision)
        (folder / run_key.BASE_FILE).write_text(json.dumps({"version": version}) + "\n", "utf-8")
    for file in folder.iterdir():  # safetensors makes its files readable by their owner only
        file.chmod((folder / CONFIG_FILE).stat().st_mode)
    _log_sizes(run, trainable)


def _log_sizes(run: RunContext, trainable: Trainable) -> None:
    sizes = {"model_bytes": size_on_disk(run.saved_model)}
    if trainable.peft_config is not None:  # computed, since merging would take the memory of a second model
        bytes_each = getattr(torch, run.resolved.dtype).itemsize
        sizes["merged_model_bytes_computed"] = trainable.base_parameters * bytes_each
    if kept := checkpoints(run.checkpoints):
        sizes["checkpoint_bytes"] = size_on_disk(kept[-1])
    run.log_metrics(sizes)


@contextmanager
def model_logged_on_error(run: RunContext, trainable: Trainable) -> Iterator[None]:
    """Log the saved model even if the `with` block fails, unless the model diverged.

    An interrupted run, and one that diverged, has it on disk only.
    """
    try:
        yield
    except DivergedError:
        raise
    except Exception:
        log.warning("the evaluation after training failed; the trained model is in %s", run.saved_model)
        try:
            log_model(run, trainable)
        except (OSError, JournalError) as second:  # must not hide the first error, which says how the run failed
            log.error("the trained model is not logged to MLflow: %s", second)  # noqa: TRY400
        raise
    if ranks().is_main:
        shutil.rmtree(run.first_adapter, ignore_errors=True)  # a run interrupted before here needs it again


def log_model(run: RunContext, trainable: Trainable) -> None:
    """Log the saved model to MLflow, with the metrics after training, if the config asks for it."""
    config = run.config
    is_adapter = trainable.peft_config is not None
    if not (config.tracking.log_adapter if is_adapter else config.tracking.log_full_model):
        return
    settings = {f"method.{key}": value for key, value in (config.method.parts | config.peft_settings).items()}
    settings |= {"model.model_name_or_path": config.model.model_name_or_path}
    params = {key.partition(".")[2]: value for key, value in without_places(settings).items()}
    params |= {"quantization": config.quantization.name}
    name = lifecycle.run_name(config)
    run.tracker.model(run.saved_model.name, name, params, trainable.trainer.state.global_step)
