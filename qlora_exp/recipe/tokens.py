"""Tokenize the rows, audit their labels, log the data, and plan the memory of the run."""

import logging
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from qlora_exp.config.schema import Config
from qlora_exp.config.sections.dataset import DatasetConfig
from qlora_exp.data import label_audit, mixture, tokenization
from qlora_exp.data.columns import lengths, lists
from qlora_exp.data.end_of_turn import end_of_turn
from qlora_exp.data.prompts import chat_template
from qlora_exp.data.rows import SOURCE, fingerprint, sources_of
from qlora_exp.environment.device import Resolved
from qlora_exp.environment.ranks import ranks
from qlora_exp.models.base import load_tokenizer
from qlora_exp.planning import calibration, gpus
from qlora_exp.planning.cost import rows_of_step, steps_of
from qlora_exp.planning.fit import is_too_much, outside
from qlora_exp.recipe.context import RunContext
from qlora_exp.recipe.inputs import Inputs
from qlora_exp.utils.units import GIB, MIB

log = logging.getLogger(__name__)

_MANY_STEPS = 200
_LOOKED_AT = 200
_GLUED = re.compile(r"[\w.?!,;]\0\w")
"""The end of a prompt and the beginning of its answer, if there is neither space nor mark between them."""


@dataclass(frozen=True)
class Tokens:
    """Tokenized rows for training and measuring: `input_ids` and `labels` of each row."""

    tokenizer: Any
    train: Dataset
    """Training rows, not truncated: the trainer truncates them to `training.max_length`."""
    heldout: Dataset
    """Held-out rows, truncated, without rows that have no answer token left."""
    heldout_rows: Dataset
    """The rows of `heldout` as text."""
    unrelated: Dataset | None
    """Rows of unrelated text; None if forgetting is not measured."""
    unrelated_rows: Dataset | None
    """The rows of `unrelated` as text."""
    audits: dict[str, label_audit.LabelAudit]
    """Which tokens of the training rows carry loss, for each source."""

    @property
    def heldout_sources(self) -> list[str]:
        """The source of each held-out row; empty if all have the same."""
        return sources_of(self.heldout_rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(int(lengths(part).max()) for part in (self.train, self.heldout))

    @property
    def audit(self) -> label_audit.LabelAudit:
        """Which tokens of all training rows carry loss."""
        audits = self.audits
        return label_audit.together(audits) if len(audits) > 1 else next(iter(audits.values()))


def tokenize(config: Config, inputs: Inputs) -> Tokens:
    """Tokenize all rows and audit their labels. An error here leaves no run behind.

    Raises:
        ModelError: the tokenizer cannot be loaded.
        DataError: no token carries loss, or no held-out row is left within `training.max_length`.
    """
    max_length = config.training.max_length
    tokenizer = load_tokenizer(config.model)
    train = inputs.rows.epoch(tokenization.tokenize(inputs.rows.train, config, tokenizer))
    audits = _audits(config, inputs, train, tokenizer)
    heldout_tokens = tokenization.tokenize(inputs.rows.heldout, config, tokenizer)
    heldout_rows, heldout = tokenization.cut(inputs.rows.heldout, heldout_tokens, max_length)
    unrelated_rows = unrelated = None
    if inputs.unrelated is not None:
        unrelated_rows, unrelated = tokenization.unrelated(inputs.unrelated, config, tokenizer)
    return Tokens(tokenizer, train, heldout, heldout_rows, unrelated, unrelated_rows, audits)


def _audits(config: Config, inputs: Inputs, train: Dataset, tokenizer: Any) -> dict[str, label_audit.LabelAudit]:
    """Audit the labels of each source, whose prompt format says what ends an answer."""
    rows, audits = inputs.rows, {}
    sources = rows.epoch(rows.train).with_format(None)[SOURCE][:] if rows.portions else []
    saved = config.dataset.format  # what ends the saved model's answers is said of all rows
    for name, part in sorted(config.parts.items(), key=lambda item: item[1].format != saved):
        own = train.select([place for place, source in enumerate(sources) if source == name]) if sources else train
        end = end_of_turn(tokenizer, chat_template(part, tokenizer))
        audits[name] = label_audit.audit(
            own, config.training.max_length, tokenizer, end, source=name if sources else None
        )
    return audits


def describe(config: Config, inputs: Inputs, tokens: Tokens) -> None:
    """Say how many rows there are, which of them were left out and why, and what of them is learned."""
    _log_rows(inputs, tokens, config)
    leaks, audit = Counter(leak.kind for leak in inputs.rows.leaks), tokens.audit
    if leaks:
        log.warning(
            "leaks: %d training rows have the question of a held-out row, %d more are similar to one (leaks.json of "
            "a run lists them); %d were left out (dataset.drop_leaks=none keeps them)",
            leaks["exact"],
            leaks["near"],
            inputs.rows.report.dropped["leaks"],
        )
    log.info(
        "labels: %.0f%% of %s tokens carry loss; %.0f%% of rows are truncated; %s carries loss in %.0f%% of rows",
        100 * audit.supervised_share,
        f"{audit.tokens:,}",
        100 * audit.truncated_rows_share,
        audit.end_token or (audit.end_text and repr(audit.end_text)) or "EOS",
        100 * audit.eos_learned_share,
    )
    if not config.training.packing:
        _log_steps(config, round(audit.rows * (1 - audit.dropped_rows_share)))


def _log_steps(config: Config, rows: int) -> None:
    """Log how many steps there are, and which part of the rows they see; warn of many steps without a checkpoint."""
    most, together = config.training.max_steps, rows_of_step(config)
    steps = most if most > 0 else steps_of(config, rows)
    seen = steps * together
    part = f", so {seen:,} of {rows:,}" if seen < rows else ""
    more = ": training.max_steps=-1 trains on all" if part and most > 0 else ""
    log.info("%s steps of %s rows%s%s", f"{steps:,}", f"{min(together, rows):,}", part, more)
    if together > rows:
        keys = "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
        log.warning(
            "%s rows are asked for in a step, and there are only %s, so that each step is a whole epoch; lower %s",
            f"{together:,}",
            f"{rows:,}",
            keys[config.training.per_device_train_batch_size <= rows],
        )
    if steps >= _MANY_STEPS and config.training.save_strategy == "no":
        log.warning(
            "no checkpoint is saved in %s steps, so the run begins again if it is interrupted: set "
            "training.save_strategy=steps training.save_steps=%d",
            f"{steps:,}",
            _MANY_STEPS,
        )


def log_data(run: RunContext, inputs: Inputs, tokens: Tokens) -> None:
    """Log the label audit, the rows that were left out, leaks, and a fingerprint of each part of the data."""
    config = run.config
    describe(config, inputs, tokens)
    _record_labels(run, inputs, tokens.audit)
    facts = inputs.plugin_facts.items()
    run.tracker.tags({name: declared.model_dump_json(exclude_defaults=True) for name, declared in facts})
    train = inputs.rows.epoch(inputs.rows.train)
    parts: list[tuple[str, DatasetConfig, Dataset]] = [
        ("training", config.dataset, train),
        ("evaluation", config.dataset, tokens.heldout_rows),
    ]
    if tokens.unrelated_rows is not None:
        parts.append(("unrelated", config.unrelated, tokens.unrelated_rows))
    for part, source, rows in parts:
        digest = fingerprint(rows)
        run.tracker.params({f"data.{part}_rows": len(rows), f"data.{part}_fingerprint": digest})
        path = ", ".join(each.path for each in source.parts.values())
        run.tracker.dataset(f"{source.name}-{part}", digest, path, part, len(rows))
    _log_mixture(run, inputs, tokens)


def _log_mixture(run: RunContext, inputs: Inputs, tokens: Tokens) -> None:
    """Log how much of each source is trained on."""
    if not (portions := inputs.rows.portions):
        return
    learned = {name: audit.supervised_tokens for name, audit in tokens.audits.items()}
    log.info("%s: %s", run.config.dataset.name, mixture.line(portions, learned))
    report = {
        name: asdict(portion)
        | {"passes": portion.passes, "share_of_supervised_tokens": learned[name] / sum(learned.values())}
        for name, portion in portions.items()
    }
    run.tracker.params(
        {f"data.sources.{name}.{key}": value for name, values in report.items() for key, value in values.items()}
    )
    labels = {
        name: {key: value for key, value in asdict(audit).items() if key not in ("rows", "sample")}
        for name, audit in tokens.audits.items()
    }
    run.tracker.json({name: values | labels[name] for name, values in report.items()}, "sources.json")
    measured = {*tokens.heldout_rows.with_format(None)[SOURCE][:]}
    for name in [name for name, portion in portions.items() if portion.heldout and name not in measured]:
        log.warning("%s: no held-out row has an answer token within training.max_length: it has no held-out loss", name)


def _log_rows(inputs: Inputs, tokens: Tokens, config: Config) -> None:
    """Log how many rows there are, how many were left out or changed, and why."""
    for level, line in inputs.rows.report.lines(config.dataset.name):
        log.log(level, "%s", line)
    unused = round(tokens.audit.dropped_rows_share * tokens.audit.rows)
    train, heldout = f"{len(tokens.train) - unused:,}", f"{len(tokens.heldout):,}"
    log.info("%s: %s training rows in an epoch, %s held-out rows", config.dataset.name, train, heldout)
    found = lengths(tokens.train)
    log.info(
        "lengths: the longest training row has %s tokens, 95%% at most %s, half at most %s; training.max_length=%s",
        *(f"{round(value):,}" for value in np.quantile(found, (1, 0.95, 0.5), method="inverted_cdf")),
        f"{config.training.max_length:,}",
    )
    if unseen := _unseen(config, tokens):
        log.warning(
            "model.new_tokens: no training row has %s within training.max_length, so that its embedding is not trained",
            ", ".join(unseen),
        )
    _warn_of_glued(inputs.rows.train, config)
    too_long = len(inputs.rows.heldout) - len(tokens.heldout_rows)
    for kind, count in (("held-out", too_long), ("training", unused)):
        if count:
            log.warning(
                "%s: %d %s rows have no answer token within training.max_length=%d, so they are not used; raise it",
                config.dataset.name,
                count,
                kind,
                config.training.max_length,
            )


def _warn_of_glued(rows: Dataset, config: Config) -> None:
    """Warn of prompts that are followed by their answers with nothing between them; looks at the first rows."""
    parts = {name: part for name, part in config.dataset.parts.items() if part.format == "prompt_completion"}
    seen = [
        row for row in rows.select(range(min(len(rows), _LOOKED_AT))) if row.get(SOURCE) is None or row[SOURCE] in parts
    ]
    if not parts or not seen:
        return
    glued = [row for row in seen if _GLUED.search(f"{row['prompt']}\0{row['completion']}")]
    if 2 * len(glued) > len(seen):
        example = f"{glued[0]['prompt'][-20:]}{glued[0]['completion'][:20]}"
        log.warning(
            "%s: nothing stands between prompt and answer (such as %r), so a model hardly learns where to answer: use "
            "dataset.format=chat, which is the model's chat template, or alpaca, or end prompts with a mark",
            config.dataset.name,
            example,
        )


def _unseen(config: Config, tokens: Tokens) -> list[str]:
    """List the new tokens that are in no training row."""
    texts = config.model.new_tokens
    numbers = dict(zip(tokens.tokenizer.convert_tokens_to_ids(texts), texts, strict=True)) if texts else {}
    for (ids,) in lists(tokens.train, "input_ids") if numbers else ():
        for number in numbers.keys() & {*ids.values[ids.places() < config.training.max_length].tolist()}:
            del numbers[number]
        if not numbers:
            break
    return [*numbers.values()]


def _record_labels(run: RunContext, inputs: Inputs, audit: label_audit.LabelAudit) -> None:
    """Record which tokens carry loss, and which training rows leak a held-out row."""
    leaks, report = inputs.rows.leaks, inputs.rows.report
    left_out = {"left_out": report.dropped, "left_out_examples": report.examples, "changed": report.notes}
    run.tracker.json(asdict(audit) | left_out, "label_audit.json")
    if leaks:
        run.tracker.json([asdict(leak) for leak in leaks], "leaks.json")
    run.log_metrics({f"leaks/{kind}": sum(leak.kind == kind for leak in leaks) for kind in ("exact", "near")})
    run.log_metrics({f"labels/{key}": value for key, value in asdict(audit).items() if isinstance(value, int | float)})


def plan_memory(run: RunContext, tokens: Tokens) -> None:
    """Log the planned memory if `tracking.plan` is set; then mark the baseline of memory measurements."""
    if ranks().is_main:
        run.log_metrics(planned(run.config, run.resolved, tokens))
    run.memory.mark_baseline()


def planned(config: Config, resolved: Resolved, tokens: Tokens) -> dict[str, float]:
    """Return the planned memory if `tracking.plan` is set, and say how much that is, and if the device has less."""
    if not config.tracking.plan:
        return {}
    longest, longest_heldout = (int(lengths(part).max()) for part in (tokens.train, tokens.heldout))
    plan = calibration.plan_run(config, resolved, longest, longest_heldout)
    _warn_of(plan.get("plan/peak_mib", 0.0), config)
    return plan


def _warn_of(peak_mib: float, config: Config) -> None:
    """Warn if a run is planned to take more memory than its device has, or its process may take."""
    device = gpus.here(config, None)
    if device.type == "cpu":  # whose memory is shared by the processes of a machine
        device = replace(device, memory_gib=device.memory_gib / ranks().local_size)
    if device.memory_gib and is_too_much(peak_mib * MIB, device, ranks().size):
        log.warning(
            "this run is planned to take %.1f GiB, and %.1f more for %s, and has only %s, so it may run out of memory: "
            "`qlora-exp plan` with the same keys says what would fit",
            peak_mib * MIB / GIB,
            outside(ranks().size),
            "libraries" if device.type == "cpu" else "the driver",
            device.where,
        )
