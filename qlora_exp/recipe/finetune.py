"""One run from start to end; each stage is a file of this folder.

Whatever can be refused is refused before the weights are loaded; what training made is saved before it is measured.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qlora_exp.config.schema import Config
from qlora_exp.recipe.inputs import read_inputs
from qlora_exp.recipe.result import RunResult


def run(
    config: Config,
    output_dir: str | Path,
    tags: Mapping[str, str] = MappingProxyType({}),
    must_reach: bool = True,
    pruning: Mapping[str, Any] | None = None,
) -> RunResult:
    """Train, measure and track one configuration.

    Args:
        config: from `compose`.
        output_dir: folder for the journal, the log, checkpoints and the trained adapter. A run that was cut off there
            is resumed from its newest checkpoint.
        tags: tags of the MLflow run, added to those of the config.
        must_reach: refuse to begin while MLflow does not answer; if false, MLflow gets the run later.
        pruning: how to ask a search whether to go on (`training.pruning.judge`).

    Raises:
        UserError: the user can correct it; the message says how.
        DivergedError: the loss is not a number any more.
        PrunedError: the search that the run belongs to stops it.
    """
    inputs = read_inputs(config)
    # These import torch, which takes seconds.
    from qlora_exp.recipe.context import open_run
    from qlora_exp.recipe.measure import log_changes, measure
    from qlora_exp.recipe.save import log_model, model_logged_on_error, save
    from qlora_exp.recipe.setup import build
    from qlora_exp.recipe.tokens import plan_memory, tokenize
    from qlora_exp.recipe.train import train

    with open_run(config, inputs.resolved, output_dir, tags, must_reach) as context:
        tokens = tokenize(context, inputs)
        plan_memory(context, tokens)
        trainable = build(context, tokens)
        before = measure(context, inputs, tokens, trainable, "before") if config.evaluation.before else None
        train(context, trainable, pruning)
        save(context, tokens, trainable)
        with model_logged_on_error(context, trainable):
            after = measure(context, inputs, tokens, trainable, "after")
            log_changes(context, before, after)
        log_model(context, trainable)
        return context.finish()
