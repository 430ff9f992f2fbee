"""Evaluate a model on held-out rows: loss and perplexity, generated answers, latency.

Evaluation restores the model's state (mode, cache setting) and draws no random numbers, so that it does not change
training.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import GenerationConfig, StoppingCriteria
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qlora_exp.config import plugins
from qlora_exp.config.sections.evaluation import EvaluationConfig
from qlora_exp.data.end_of_turn import before_end
from qlora_exp.data.rows import sources_of
from qlora_exp.distributed import group
from qlora_exp.environment.ranks import hides_bars, ranks
from qlora_exp.models.base import (
    keep_router_setting,
    learned_positions,
    own_settings_alone,
    stop_strings,
    stop_tokens,
)
from qlora_exp.models.sharding.fsdp import is_sharded
from qlora_exp.training.plugins import user_metrics
from qlora_exp.utils.errors import ConfigError, first_line

log = logging.getLogger(__name__)

Score = Callable[[str, dict[str, Any]], float]


@dataclass(frozen=True)
class Answers:
    """Answers to one batch of prompts."""

    texts: list[str]
    tokens: int
    """Number of generated tokens, of all answers together."""
    seconds: float
    first_token_seconds: float
    step_seconds: list[float]
    """Seconds of each token after the first."""


Generate = Callable[[list[list[int]]], Answers]
"""Function that answers a batch of prompts; a prompt is a list of token ids."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and the values of single rows that they were computed from."""

    metrics: dict[str, float]
    losses: list[dict[str, Any]]
    """For each held-out row: `nll` (negative log-likelihood, sum over tokens, in nats), `tokens` (supervised), and
    `source` where there are several."""
    unrelated: list[dict[str, float]]
    """The same values for each row of unrelated text."""
    samples: list[dict[str, Any]]
    """Each generated answer with its prompt, reference and scores."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why metrics of packages are missing, by name."""


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    tokens: Dataset,
    config: EvaluationConfig,
    *,
    batch_size: int,
    unrelated: Dataset | None = None,
    score: Score | None = None,
    label: str = "",
    on_unrelated: AbstractContextManager[Any] | None = None,
    generating: AbstractContextManager[Any] | None = None,
) -> Evaluation:
    """Measure `model` on held-out rows.

    Args:
        model: a model with TRL's fused LM head (SFTTrainer adds it), which needs no memory for full logits.
        tokenizer: the model's tokenizer.
        rows: held-out rows as text.
        tokens: the same rows as tokens, as returned by `data.tokenization.cut`.
        config: what to measure.
        batch_size: rows in one forward pass of the loss.
        unrelated: tokens of text unrelated to the training data.
        score: the dataset's own function that scores an answer, 0..1.
        label: text shown in the progress bars.
        on_unrelated: context entered while unrelated text is measured.
        generating: context entered while answers are generated.
    """
    with _evaluating(model):
        losses = _row_losses(model, tokenizer, tokens, batch_size, label)
        supervised, loss = sum(row["tokens"] for row in losses), _mean_loss(losses)
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "supervised_tokens": supervised}
        metrics |= _loss_of_each(rows, losses)
        unrelated_losses: list[dict[str, Any]] = []
        if unrelated is not None:
            with on_unrelated or nullcontext():
                unrelated_losses = _row_losses(model, tokenizer, unrelated, 1, label)
            metrics["unrelated_loss"] = _mean_loss(unrelated_losses)
        samples: list[dict[str, Any]] = []
        failed: dict[str, str] = {}
        if config.generate_rows:
            answering = generator(model, tokenizer, config)
            with generating or nullcontext():
                samples, latency = _answer(answering, tokenizer, rows, tokens, config, label)
            scores, failed = _scored(samples, rows, config, score)
            metrics |= scores | latency
    return Evaluation(metrics, losses, unrelated_losses, samples, failed)


def _mean_loss(losses: list[dict[str, Any]]) -> float:
    return sum(row["nll"] for row in losses) / sum(row["tokens"] for row in losses)


def _loss_of_each(rows: Dataset, losses: list[dict[str, Any]]) -> dict[str, float]:
    """Write the source of each row beside its loss, and return the mean loss of each source; none for a single one."""
    names = sources_of(rows)
    for row, name in zip(losses if names else (), names, strict=True):
        row["source"] = name
    return {
        f"source_loss/{name}": _mean_loss([row for row in losses if row["source"] == name]) for name in sorted({*names})
    }


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training, use_cache = model.training, model.config.use_cache
    model.eval()
    try:
        with torch.no_grad(), keep_router_setting(model, inside=False):
            yield
    finally:
        model.train(training)
        model.config.use_cache = use_cache


def _row_losses(model: Any, tokenizer: Any, tokens: Dataset, batch_size: int, label: str) -> list[dict[str, Any]]:
    """Return the loss of each row; rows of similar length are in a batch together, for little padding."""
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    losses = []
    order = np.argsort([len(ids) for ids in tokens["input_ids"]], kind="stable")
    starts = range(0, len(tokens), batch_size)
    for start in tqdm(group.own_share(starts), desc=f"{label}loss", unit="batch", leave=False, disable=hides_bars()):
        rows = [
            {"input_ids": row["input_ids"], "labels": row["labels"]}
            for row in tokens.select(order[start : start + batch_size])
        ]
        batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
        # trl 1.16: `log_probs` has the shape (batch, length - 1), and is zero where `label_mask` is false.
        outputs = model(**batch, fused_lm_head=True)
        nll = -outputs.log_probs.float().cpu().double().sum(dim=1)
        count = outputs.label_mask.sum(dim=1)
        losses.append([{"nll": n, "tokens": c} for n, c in zip(nll.tolist(), count.tolist(), strict=True)])
    by_length = [row for batch in group.joined_shares(losses, len(starts)) for row in batch]
    return [by_length[place] for place in np.argsort(order)]


class _Clock(StoppingCriteria):
    """Stopping criterion that never stops generation: it records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generator(model: Any, tokenizer: Any, config: EvaluationConfig) -> Generate:
    """Return a function that answers prompts with `model`: greedy decoding, all prompts in one batch."""
    stops = stop_strings(model)
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        eos_token_id=stop_tokens(model, tokenizer),
        stop_strings=stops or None,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    most, said = learned_positions(model), list[int]()

    def room_for(prompts: list[list[int]]) -> int:
        return config.max_new_tokens if most is None else most - _prefix(model) - max(map(len, prompts))

    def generate(prompts: list[list[int]]) -> Answers:
        cut = room_for(prompts) < config.max_new_tokens
        parts = [[prompt] for prompt in prompts] if cut else [prompts]  # a long prompt must not cut answers to others
        if not is_sharded(model) or not any(group.gather(cut)):
            return _joined([answer(part) for part in parts])
        # All run as many forward passes. A process that has finished and waits would run out of positions, so that
        # each process answers the prompts of all.
        shares = group.gather(parts)
        begin = sum(map(len, shares[: ranks().rank]))
        return _joined([answer(part) for share in shares for part in share][begin : begin + len(parts)])

    def answer(prompts: list[list[int]]) -> Answers:
        room = room_for(prompts)
        if room < config.max_new_tokens and not said:
            said.append(room)
            log.warning(
                "answers are cut where the model's %d positions end: for a prompt of %d tokens to %d new ones "
                "(evaluation.max_new_tokens=%d)",
                most,
                len(prompts[0]),
                room,
                config.max_new_tokens,
            )
        settings.max_new_tokens = min(room, config.max_new_tokens)
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        clock, begin = _Clock(), time.perf_counter()
        with own_settings_alone(model):
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                generation_config=settings,
                stopping_criteria=[clock],
                tokenizer=tokenizer,
                synced_gpus=is_sharded(model),  # else processes whose answers end early would leave the others waiting
            )
        seconds = time.perf_counter() - begin
        new = output[:, batch["input_ids"].shape[1] :]
        texts = [before_end(text, stops) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        generated = int((new != tokenizer.pad_token_id).sum())
        return Answers(texts, generated, seconds, clock.times[0] - begin, np.diff(clock.times).tolist())

    return generate


def _prefix(model: Any) -> int:
    """Return the number of positions that a trained prompt takes."""
    active = getattr(model, "active_peft_config", None)
    return getattr(active, "num_virtual_tokens", None) or 0


def _joined(parts: list[Answers]) -> Answers:
    return Answers(
        [text for part in parts for text in part.texts],
        sum(part.tokens for part in parts),
        sum(part.seconds for part in parts),
        parts[0].first_token_seconds,
        [seconds for part in parts for seconds in part.step_seconds],
    )


def answers(
    generate: Generate,
    tokenizer: Any,
    rows: Dataset,
    tokens: Dataset,
    config: EvaluationConfig,
    *,
    score: Score | None = None,
    label: str = "",
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Generate and score answers, without the losses that `evaluate` measures too; `generate` can be any backend.

    Returns:
        The metrics, and each answer with its prompt, reference and scores.
    """
    samples, latency = _answer(generate, tokenizer, rows, tokens, config, label)
    return _scored(samples, rows, config, score)[0] | latency, samples


def _scored(
    samples: list[dict[str, Any]], rows: Dataset, config: EvaluationConfig, score: Score | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Add the scores to each sample; return the mean of each score, and why metrics of packages are missing."""
    if score:
        for sample, row in zip(samples, rows, strict=False):
            sample["task_score"] = score(sample["answer"], row)
    metrics = {name: float(np.mean([sample[name] for sample in samples])) for name in _scores(samples, config)}
    failed: dict[str, str] = {}
    if names := user_metrics.of_config(config):
        answered = rows.select(range(len(samples)))
        scores, failed = group.call_on_main(user_metrics.score, names, samples, answered)
        for name, values in scores.items():
            key = f"{user_metrics.PREFIX}{name}"
            metrics[key] = float(np.mean(values))
            if isinstance(values, list):
                for sample, value in zip(samples, values, strict=True):
                    sample[key] = value
    return metrics, failed


def _answer(
    generate: Generate, tokenizer: Any, rows: Dataset, tokens: Dataset, config: EvaluationConfig, label: str
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Answer the first `config.generate_rows` prompts; return the samples and the metrics of latency."""
    count, size = min(config.generate_rows, len(tokens)), config.generation_batch_size
    answered: list[tuple[Answers, list[dict[str, Any]]]] = []
    starts = range(0, count, size)
    for start in tqdm(group.own_share(starts), desc=f"{label}answers", unit="batch", leave=False, disable=hides_bars()):
        chosen = range(start, min(start + size, count))
        prompts = [row["input_ids"][: row["prompt_length"]] for row in tokens.select(chosen)]
        prompts = [prompt or [_first_token(tokenizer)] for prompt in prompts]
        batch = generate(prompts)
        samples = [
            {"prompt": tokenizer.decode(prompt), "reference": row["reference"], "answer": text.strip()}
            for prompt, text, row in zip(prompts, batch.texts, tokens.select(chosen), strict=True)
        ]
        answered.append((batch, samples))
    batches, parts = zip(*group.joined_shares(answered, len(starts)), strict=True)
    samples = [sample for part in parts for sample in part]
    latency = {
        "first_token_seconds_p50": float(np.median([batch.first_token_seconds for batch in batches])),
        "generated_tokens_per_second": sum(batch.tokens for batch in batches) / sum(batch.seconds for batch in batches),
    }
    if steps := [seconds for batch in batches for seconds in batch.step_seconds]:
        latency["token_seconds_p50"], latency["token_seconds_p95"] = map(float, np.quantile(steps, [0.5, 0.95]))
    return samples, latency


def _first_token(tokenizer: Any) -> int:
    """Return the token that an empty prompt (of plain text) is replaced with, since a model cannot start from none."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _scores(samples: list[dict[str, Any]], config: EvaluationConfig) -> list[str]:
    """Add each metric to each sample; return the names of the scores."""
    names = ["task_score"] if "task_score" in samples[0] else []
    for metric in (name for name in config.metrics if name in plugins.BUILT_IN["metric"]):
        results = _metric(metric).compute(
            predictions=[sample["answer"] for sample in samples],
            references=[sample["reference"] for sample in samples],
        )
        for name, values in results.items():
            names.append(name)
            for sample, value in zip(samples, values, strict=True):
                sample[name] = value
    return names


@cache
def _metric(name: str) -> Any:
    import evaluate as evaluate_library  # slow (imports scipy and more), and needed for answers only

    return evaluate_library.load(str(Path(__file__).parent / "metrics" / f"{name}.py"))


def isolates_packed_rows(model: Any, instead: str = "training.packing=false") -> bool:
    """Check whether rows packed into one sequence give the same outputs as single rows, which packing relies on.

    The check runs the model itself on a few tokens. TRL marks where a row starts by restarting the position ids, and
    not all architectures use them to keep rows apart (OPT does not). The change caused by packing is compared with the
    change caused by plain concatenation, so that rounding in half precision does not count. Another first row must not
    change the second one either, by more than rounding: states of Mamba layers and short convolutions, passed on from
    row to row, change outputs by less than a hundredth of that. `instead` is the setting without it, for messages.

    Raises:
        ConfigError: the model needs a package for it, which is not installed.
    """
    ids = torch.arange(8, 32, device=model.device)[None] % model.config.vocab_size
    others = torch.cat([ids[:, :12].flip(1) + 1, ids[:, 12:]], dim=1) % model.config.vocab_size
    ends = torch.tensor([0, 12, 24], dtype=torch.int32, device=model.device)
    starts = {  # as TRL's collator gives them
        "position_ids": torch.cat([torch.arange(12), torch.arange(12)]).to(model.device)[None],
        "seq_idx": torch.arange(2, dtype=torch.int32, device=model.device).repeat_interleave(12)[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": 12,
        "max_length_k": 12,
    }
    try:
        with _evaluating(model):
            packed, with_others = (
                model(input_ids=each, **starts, use_cache=False).logits[:, 12:] for each in (ids, others)
            )
            joined = model(input_ids=ids, use_cache=False).logits[:, 12:]
            apart = model(input_ids=ids[:, 12:], use_cache=False).logits
    except ValueError as error:  # transformers 5.23: blocks whose fused kernels are not installed
        if "packed sequences" not in str(error):
            raise
        raise ConfigError(f"{instead.partition('=')[0]}: {first_line(error)} Or use {instead}") from error

    def change(logits: torch.Tensor, others: torch.Tensor = apart) -> float:
        return (logits.float().log_softmax(-1) - others.float().log_softmax(-1)).abs().mean().item()

    # The columns that LLM.int8 keeps exact depend on all rows.
    rounding = 2e-2 if getattr(model, "is_loaded_in_8bit", False) else 1e-4
    return change(packed) < 0.1 * change(joined) and change(packed, with_others) <= rounding * change(joined)
