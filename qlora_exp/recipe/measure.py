"""Measure the model before and after training: on held-out rows, on unrelated text and on tasks of lm-eval."""

import json
import logging
import math
from typing import Literal

from qlora_exp.config.tables.peft_methods import moves_base_weights
from qlora_exp.environment.device import autocast
from qlora_exp.models.adapters import base_alone
from qlora_exp.recipe.context import RunContext
from qlora_exp.recipe.inputs import Inputs
from qlora_exp.recipe.setup import Trainable
from qlora_exp.recipe.tokens import Tokens
from qlora_exp.training import evaluation, lm_eval
from qlora_exp.utils.errors import DivergedError

log = logging.getLogger(__name__)

Moment = Literal["before", "after"]


def measure(
    run: RunContext, inputs: Inputs, tokens: Tokens, trainable: Trainable, moment: Moment
) -> evaluation.Evaluation:
    """Evaluate the model and log its metrics as `MOMENT/...`, with the losses of each row as artifacts."""
    answered = min(run.config.evaluation.generate_rows, len(tokens.heldout))
    answers = f", {answered} answers" if answered else ""
    log.info("evaluating %s training: the loss of %d rows%s", moment, len(tokens.heldout), answers)
    run.tracker.deliver_now()
    model, config = trainable.trainer.model, run.config
    # If the initialization moved a part of the base into the adapter, only both together are the base model.
    is_base = config.model.adapter is None and not moves_base_weights(config.lora_start)
    without_adapter = moment == "before" and is_base
    with run.memory.phase(f"evaluate_{moment}"), autocast(run.resolved), trainable.trainer.beside_others():
        measured = evaluation.evaluate(
            model,
            tokens.tokenizer,
            tokens.heldout_rows,
            tokens.heldout,
            config.evaluation,
            batch_size=config.training.per_device_eval_batch_size,
            unrelated=tokens.unrelated,
            score=inputs.score,
            label=f"{moment} training: ",
            on_unrelated=base_alone(model) if without_adapter else None,
            generating=run.memory.phase(f"generate_{moment}"),
        )
    if not math.isfinite(measured.metrics["loss"]):
        raise DivergedError(f"the held-out loss {moment} training is {measured.metrics['loss']}")
    run.log_metrics({f"{moment}/{key}": value for key, value in measured.metrics.items()})
    run.tracker.tags({f"metric_failed.{moment}.{name}": why for name, why in measured.failed.items()})
    if inputs.lm_eval_tasks:
        _run_lm_eval(run, inputs, tokens, trainable, moment)
    for name, losses in (("losses", measured.losses), ("unrelated_losses", measured.unrelated)):
        if losses:
            lines = "".join(json.dumps(row) + "\n" for row in losses)
            run.tracker.text(lines, f"evaluation/{moment}_{name}.jsonl")
    return measured


def _run_lm_eval(run: RunContext, inputs: Inputs, tokens: Tokens, trainable: Trainable, moment: Moment) -> None:
    config, tasks = run.config, inputs.lm_eval_tasks
    log.info("lm-eval: %s", ", ".join(config.evaluation.lm_eval_tasks))
    batch_size = config.training.per_device_eval_batch_size
    with run.memory.phase(f"lm_eval_{moment}"), autocast(run.resolved):
        scores, items = lm_eval.evaluate(
            trainable.trainer.model, tokens.tokenizer, tasks, config.evaluation, batch_size
        )
    run.log_metrics({f"{moment}/{key}": value for key, value in scores.items()})
    run.tracker.params({"data.lm_eval_fingerprint": lm_eval.fingerprint(items["items"])})
    run.tracker.json(items, f"evaluation/{moment}_lm_eval.json")


def log_changes(run: RunContext, before: evaluation.Evaluation | None, after: evaluation.Evaluation) -> None:
    """Log what training changed: forgetting, and the answers to the same prompts before and after."""
    if before and "unrelated_loss" in after.metrics:
        run.log_metrics({"forgetting": after.metrics["unrelated_loss"] - before.metrics["unrelated_loss"]})
    empty = sum(not sample["answer"].strip() for sample in after.samples)
    if 2 * empty > len(after.samples):
        log.warning(
            "%d of %d answers after training are empty (evaluation/answers.json): the model ends at once. See the row "
            "in label_audit.json: is there a mark between question and answer, and is the answer what carries loss?",
            empty,
            len(after.samples),
        )
    if after.samples:
        columns = {key: [sample[key] for sample in after.samples] for key in ("prompt", "reference")}
        if before:
            columns["before"] = [sample["answer"] for sample in before.samples]
        run.tracker.table(columns | {"after": [sample["answer"] for sample in after.samples]}, "samples.json")
        answers = {"before": before.samples if before else [], "after": after.samples}
        run.tracker.json(answers, "evaluation/answers.json")
