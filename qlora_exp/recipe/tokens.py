"""Turn rows into tokens, audit the labels, record the data, and plan the memory that they will take."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset

from qlora_exp.data import dataset, label_audit
from qlora_exp.models.base import load_tokenizer
from qlora_exp.planning import calibration
from qlora_exp.recipe.context import RunContext
from qlora_exp.recipe.inputs import Inputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """What is trained and measured on: `input_ids` and `labels` of each row."""

    tokenizer: Any
    train: Dataset
    """Uncut: the trainer cuts to `training.max_length`."""
    heldout: Dataset
    """Cut, without rows that have no answer token left."""
    heldout_rows: Dataset
    """The same rows as text."""
    unrelated: Dataset | None
    """None if forgetting is not measured."""


def tokenize(run: RunContext, inputs: Inputs) -> Tokens:
    """Tokenize all rows; log the label audit, leaks, and a fingerprint of each part of the data.

    Raises:
        ModelError: the tokenizer cannot be loaded.
        DataError: no token carries loss, or no held-out row is left within `training.max_length`.
    """
    config, max_length = run.config, run.config.training.max_length
    tokenizer = load_tokenizer(config.model)
    train = dataset.tokenize(inputs.rows.train, config, tokenizer)
    audit = label_audit.audit(train, max_length, tokenizer)
    heldout_tokens = dataset.tokenize(inputs.rows.heldout, config, tokenizer)
    heldout_rows, heldout = dataset.cut(inputs.rows.heldout, heldout_tokens, max_length)
    _log_labels(run, inputs, audit)
    parts = [("training", config.dataset, inputs.rows.train), ("evaluation", config.dataset, heldout_rows)]
    unrelated = None
    if inputs.unrelated is not None:
        unrelated_rows, unrelated = dataset.unrelated(inputs.unrelated, config, tokenizer)
        parts.append(("unrelated", config.unrelated, unrelated_rows))
    for part, source, rows in parts:
        digest = dataset.fingerprint(rows)
        run.tracker.params({f"data.{part}_rows": len(rows), f"data.{part}_fingerprint": digest})
        run.tracker.dataset(f"{source.name}-{part}", digest, source.path, part, len(rows))
    return Tokens(tokenizer, train, heldout, heldout_rows, unrelated)


def _log_labels(run: RunContext, inputs: Inputs, audit: label_audit.LabelAudit) -> None:
    """Log what the labels teach, what was left out, and which rows give a held-out row away."""
    leaks, dropped = inputs.rows.leaks, inputs.rows.dropped
    run.tracker.json(asdict(audit) | {"left_out": dropped}, "label_audit.json")
    counts = {kind: sum(leak.kind == kind for leak in leaks) for kind in ("exact", "near")}
    if leaks:
        log.warning(
            "leaks: %d training rows ask what a held-out row asks, %d more are like one (leaks.json); %d left out",
            len(leaks) - counts["near"],
            counts["near"],
            dropped["leaks"],
        )
        run.tracker.json([asdict(leak) for leak in leaks], "leaks.json")
    run.log_metrics({f"leaks/{kind}": count for kind, count in counts.items()})
    log.info(
        "labels: %.0f%% of %s tokens carry loss; %.0f%% of rows are cut, EOS is learned in %.0f%%",
        100 * audit.supervised_share,
        f"{audit.tokens:,}",
        100 * audit.truncated_rows_share,
        100 * audit.eos_learned_share,
    )
    run.log_metrics({f"labels/{key}": value for key, value in asdict(audit).items() if not isinstance(value, str)})


def plan_memory(run: RunContext, tokens: Tokens) -> None:
    """Log what the run is planned to take, if `tracking.plan` is set; measuring starts here."""
    if run.config.tracking.plan:
        longest, evaluated = (max(map(len, part["input_ids"])) for part in (tokens.train, tokens.heldout))
        run.log_metrics(calibration.plan_run(run.config, run.resolved, longest, evaluated))
    run.memory.mark_baseline()
