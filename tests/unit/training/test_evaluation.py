import math

import pytest
import torch
from datasets import Dataset
from helpers.plugins import METRICS, install
from trl.trainer.utils import add_fused_lm_head

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.evaluation import EvaluationConfig
from qlora_exp.data import tokenization
from qlora_exp.models.builtin import folder_of
from qlora_exp.training import evaluation
from qlora_exp.utils.errors import ConfigError

ROWS = [{"prompt": "p" * (3 + 4 * i), "input": "", "completion": "answer " * (i + 1)} for i in range(5)]


def load(family: str = "llama"):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder_of(f"random:{family}"))
    add_fused_lm_head(model)
    return model


def measure(model, tokenizer, batch_size: int = 2, score=None, **settings):
    rows = Dataset.from_list(ROWS)
    tokens = tokenization.tokenize(rows, compose(), tokenizer)
    config = EvaluationConfig(**({"generate_rows": 3, "max_new_tokens": 4, "generation_batch_size": 2} | settings))
    return evaluation.evaluate(model, tokenizer, rows, tokens, config, batch_size=batch_size, score=score)


def test_loss_averages_supervised_tokens_of_all_rows(tiny_tokenizer):
    model = load()
    total = count = 0.0
    for row in tokenization.tokenize(Dataset.from_list(ROWS), compose(), tiny_tokenizer):
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].detach()
        labels = torch.tensor(row["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    found = measure(model, tiny_tokenizer)
    assert found.metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.metrics["supervised_tokens"] == count
    assert sum(row["nll"] for row in found.losses) == pytest.approx(total, rel=1e-5)


def test_loss_does_not_depend_on_the_batch_size(tiny_tokenizer):
    model = load()
    one, five = (measure(model, tiny_tokenizer, batch_size=size, generate_rows=0) for size in (1, 5))
    assert one.metrics["loss"] == pytest.approx(five.metrics["loss"], rel=1e-5)


def test_each_row_has_its_own_loss_though_batches_are_by_length(tiny_tokenizer):
    model, mixed = load(), [ROWS[place] for place in (3, 0, 4, 1, 2)]
    config, found = EvaluationConfig(generate_rows=0), []
    for rows in (Dataset.from_list(mixed), *(Dataset.from_list([row]) for row in mixed)):
        tokens = tokenization.tokenize(rows, compose(), tiny_tokenizer)
        found.append(evaluation.evaluate(model, tiny_tokenizer, rows, tokens, config, batch_size=2).losses)
    together, alone = found[0], [losses[0] for losses in found[1:]]
    assert [row["tokens"] for row in together] == [row["tokens"] for row in alone]
    assert [row["nll"] for row in together] == pytest.approx([row["nll"] for row in alone], rel=1e-5)


def test_generated_answers_do_not_depend_on_padding(tiny_tokenizer):
    model = load()
    together = measure(model, tiny_tokenizer, generation_batch_size=3)
    alone = measure(model, tiny_tokenizer, generation_batch_size=1)
    assert [sample["answer"] for sample in together.samples] == [sample["answer"] for sample in alone.samples]


def test_each_answer_has_its_scores_and_latency(tiny_tokenizer):
    found = measure(load(), tiny_tokenizer, score=lambda answer, row: 0.5)
    assert len(found.samples) == 3
    assert {"prompt", "reference", "answer", "rougeL", "exact_match", "task_score"} <= found.samples[0].keys()
    assert found.metrics["task_score"] == 0.5
    assert 0 < found.metrics["token_seconds_p50"] <= found.metrics["token_seconds_p95"]


def test_answers_have_the_scores_of_packages_and_metrics_that_fail_are_missing(tiny_tokenizer, monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "a", "own_metrics", METRICS, "length away")
    model = load()
    for failed in ({}, {"away": "ConnectionError: the judge"}):
        found = measure(model, tiny_tokenizer, metrics=["exact_match", "away", "length"])
        scores = [sample["metric/length"] for sample in found.samples]
        assert found.metrics["metric/length"] == pytest.approx(sum(scores) / 3)
        assert found.failed == failed
        assert found.metrics.get("metric/away", 0.0) == (not failed)
        assert not any("metric/away" in sample for sample in found.samples)  # one score for all
        assert "rougeL" not in found.metrics
        assert "exact_match" in found.metrics


def test_nothing_is_generated_without_generate_rows(tiny_tokenizer):
    found = measure(load(), tiny_tokenizer, generate_rows=0)
    assert found.samples == []
    assert "rougeL" not in found.metrics


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_model_and_random_state_unchanged(training: bool, tiny_tokenizer):
    model = load().train(training)
    model.config.use_cache = False
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    measure(model, tiny_tokenizer)
    assert model.training is training
    assert model.config.use_cache is False
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("answer", "rouge", "exact"),
    [("The cat sat.", 1.0, 1.0), ("the  CAT sat.", 1.0, 1.0), ("a dog ran", 0.0, 0.0)],
)
def test_text_metrics_work_offline(answer: str, rouge: float, exact: float):
    samples = [{"answer": answer, "reference": "The cat sat."}]
    evaluation._scores(samples, EvaluationConfig())
    assert samples[0]["rougeL"] == rouge
    assert samples[0]["exact_match"] == exact


@pytest.mark.parametrize(("family", "isolated"), [("llama", True), ("qwen2", True), ("opt", False), ("jamba", False)])
def test_isolation_of_packed_rows_is_detected(family: str, isolated: bool):
    assert evaluation.isolates_packed_rows(load(family)) is isolated


def test_loss_of_each_source_is_measured(tiny_tokenizer):
    rows = Dataset.from_list(ROWS).add_column("source", ["a", "b", "a", "b", "b"])
    tokens = tokenization.tokenize(rows.remove_columns("source"), compose(), tiny_tokenizer)
    config = EvaluationConfig(generate_rows=0)
    found = evaluation.evaluate(load(), tiny_tokenizer, rows, tokens, config, batch_size=2)
    of_a = [found.losses[0], found.losses[2]]
    assert [row["source"] for row in found.losses] == ["a", "b", "a", "b", "b"]
    assert found.metrics["source_loss/a"] == sum(row["nll"] for row in of_a) / sum(row["tokens"] for row in of_a)
    counts = {name: sum(row["tokens"] for row in found.losses if row["source"] == name) for name in "ab"}
    together = sum(found.metrics[f"source_loss/{name}"] * count for name, count in counts.items())
    assert found.metrics["loss"] == pytest.approx(together / sum(counts.values()))
    assert not [name for name in measure(load(), tiny_tokenizer, generate_rows=0).metrics if "source" in name]


def test_packing_that_needs_a_package_names_it():
    with pytest.raises(ConfigError, match=r"training.packing: .* Install `causal_conv1d` .* training.packing=false"):
        evaluation.isolates_packed_rows(load("lfm2"))
