"""Run one fine-tuning from start to end; each stage is a file of this folder.

A mistake in the config or the data is reported before the weights are loaded, wherever that is possible. The trained
model is saved before it is measured.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qlora_exp.config.schema import Config
from qlora_exp.data.reading.recognize import recognized
from qlora_exp.distributed import group
from qlora_exp.environment.ranks import is_launched, ranks, take_place
from qlora_exp.planning.guidance.exhausted import explained
from qlora_exp.recipe.inputs import Inputs, check_config, read_inputs
from qlora_exp.recipe.launch import launch, with_processes
from qlora_exp.recipe.result import RunResult
from qlora_exp.tracking.stores import uris

if TYPE_CHECKING:
    from qlora_exp.recipe.context import RunContext
    from qlora_exp.recipe.tokens import Tokens


def run(
    config: Config,
    output_dir: str | Path,
    tags: Mapping[str, str] = MappingProxyType({}),
    must_reach: bool = True,
    pruning: Mapping[str, Any] | None = None,
) -> RunResult:
    """Train, measure and track one configuration.

    Args:
        config: the config, as returned by `compose`.
        output_dir: folder for the journal, the log, checkpoints and the trained adapter. If it contains an interrupted
            run, that run is resumed from its newest checkpoint.
        tags: tags of the MLflow run, added to those of the config.
        must_reach: refuse to start if MLflow does not answer; if false, MLflow receives the run later.
        pruning: how to ask a search whether to continue (`training.pruning.judge`).

    Raises:
        UserError: the user can correct it; the message says how.
        RankError: another process of the run failed, died or hung.
        DivergedError: a loss or a gradient norm is not finite.
        MemoryExhaustedError: memory ran out; the message says with which settings it would not.
        PrunedError: the search that the run belongs to stops it.
    """
    take_place(config.distributed)
    config = with_processes(recognized(config))
    arguments = {"output_dir": Path(output_dir), "tags": dict(tags), "must_reach": must_reach, "pruning": pruning}
    if config.distributed.engine != "none" and not is_launched():
        check_config(config)
        with explained(config):
            return launch(run, config, **arguments)
    with group.joined(config):
        return _run(config, **arguments)


def _run(config: Config, **arguments: Any) -> RunResult:
    """Run in this process; if the run has several, each of them calls this."""
    if arguments["must_reach"] and ranks().is_main:
        uris.check_answers(config.tracking.uri)
    inputs = read_inputs(config)
    # Imported here, because these modules import torch, which takes seconds.
    from qlora_exp.recipe.tokens import tokenize
    from qlora_exp.recipe.tune import tune

    tokens = tokenize(config, inputs)
    inputs = tune(config, inputs, tokens)
    from qlora_exp.recipe.context import open_run

    pruning = arguments.pop("pruning")
    # What would fit is a part of the record; what the stages hold is freed before it is planned.
    with open_run(config, inputs.resolved, **arguments) as context, explained(config, lambda: tokens.longest):
        return _stages(context, inputs, tokens, pruning)


def _stages(context: "RunContext", inputs: Inputs, tokens: "Tokens", pruning: Any) -> RunResult:
    """Do what is tracked: plan, build, measure, train, save and measure again."""
    from qlora_exp.recipe.measure import log_changes, measure
    from qlora_exp.recipe.save import log_model, model_logged_on_error, save
    from qlora_exp.recipe.setup import build
    from qlora_exp.recipe.tokens import log_data, plan_memory
    from qlora_exp.recipe.train import train

    log_data(context, inputs, tokens)
    plan_memory(context, tokens)
    trainable = build(context, tokens, inputs.first_adapter)
    before = measure(context, inputs, tokens, trainable, "before") if context.config.evaluation.before else None
    train(context, trainable, pruning)
    save(context, tokens, trainable)
    with model_logged_on_error(context, trainable):
        after = measure(context, inputs, tokens, trainable, "after")
        log_changes(context, before, after)
    log_model(context, trainable)
    return context.finish()
