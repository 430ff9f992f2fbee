"""Train the model, from the newest checkpoint if the run was interrupted."""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import set_seed

from qlora_exp.distributed import group
from qlora_exp.environment import efficiency, turns
from qlora_exp.environment.device import computes_in
from qlora_exp.environment.ranks import ranks
from qlora_exp.models.adapters import missing_tensors
from qlora_exp.models.base import named
from qlora_exp.recipe.context import RunContext
from qlora_exp.recipe.setup import Trainable
from qlora_exp.training import trainer
from qlora_exp.training.checkpoints import checkpoint_to_resume
from qlora_exp.training.own_optimizers import state_bytes
from qlora_exp.utils.errors import ConfigError

log = logging.getLogger(__name__)


def train(run: RunContext, trainable: Trainable, pruning: Mapping[str, Any] | None) -> None:
    """Train to the end, and log speed, energy and the utilization of the device.

    Args:
        run: the run in progress.
        trainable: the model and trainer that `setup.build` returned.
        pruning: how to ask a search whether to continue (`training.pruning.judge`); None without a search.

    Raises:
        ConfigError: there is no checkpoint where `training.resume_from_checkpoint` says, or it lacks tensors.
        DivergedError: a loss or a gradient norm is not finite.
        PrunedError: the search stops this job.
    """
    set_seed(run.config.seed + ranks().rank)  # else the dropout of all processes would be the same
    trained, total, share = (
        run.metrics[name] for name in ("trainable_parameters", "total_parameters", "trainable_share")
    )
    log.info("training %s of %s parameters (%.3g%%)", f"{trained:,.0f}", f"{total:,.0f}", 100 * share)
    resumed, same_start = run.tracker.resumed, trainable.same_start
    checkpoint = group.call_on_main(checkpoint_to_resume, run.config, run.output_dir, resumed, same_start)
    if checkpoint:
        log.info("resuming from %s", checkpoint)
        # A sharded model has no whole tensors to compare with.
        missing = [] if run.config.distributed.shards else missing_tensors(trainable.trainer.model, checkpoint)
        if missing:
            raise ConfigError(
                f"{checkpoint} lacks {len(missing)} tensors that this run trains: {named(missing)}; resume with the "
                "method and the target modules that the checkpoint was trained with, or train from the start"
            )
    judge = None
    if pruning is not None:
        from qlora_exp.training import pruning as search  # needs the extra `optuna`

        judge = search.judge(pruning)
    run.tracker.deliver_now()
    with efficiency.EnergyMeter() as energy:
        run.log_metrics(trainer.train(trainable.trainer, run.tracker.metrics, checkpoint, judge))
    precision = run.resolved.device, computes_in(run.resolved)
    first = efficiency.peak_flops(*precision)  # not before training, whose first step would be later
    if (others := turns.current()) is not None:
        others.keep("base").check()
    _log_optimizer(run, trainable.trainer)
    used = group.gather(energy.joules if ranks().is_first_of_machine else 0.0)  # it measures the complete machine
    # Of a resumed run only a part is measured, and with several runs in this process not which took what.
    joules = None if checkpoint or None in used or turns.current() else sum(used)
    # The best of two moments: in one alone the machine may be busy with something else.
    peak = sum(group.gather(max(first, efficiency.peak_flops(*precision))))
    steady = [peaks.get("steady", {}) for peaks in group.gather(run.memory.peaks)]
    together = {source: sum(peaks[source] for peaks in steady) for source in steady[0]}
    run.log_metrics(efficiency.of_training(run.metrics, {"steady": together}, peak, joules))


def _log_optimizer(run: RunContext, trained: trainer.Trainer) -> None:
    """Log which optimizer ran, and the bytes of its states in this process; DeepSpeed has its own."""
    if run.config.distributed.engine == "deepspeed_zero3":
        return
    optimizer: Any = getattr(trained.optimizer, "optimizer", trained.optimizer)  # inside accelerate's
    run.tracker.params({"resolved.optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}"})
    run.log_metrics({"optimizer_state_bytes": state_bytes(optimizer)})
