"""Whole trainings of tiny models: what changes them, and what must not."""

import json
from types import SimpleNamespace

import optuna
import pytest
import torch
from safetensors.torch import load_file
from trl.trainer import utils as trl_utils

from qlora_exp.libraries import trl
from qlora_exp.models.layers import tiling
from qlora_exp.planning import tuning
from qlora_exp.recipe.finetune import run
from qlora_exp.sweeps import search
from qlora_exp.tracking.journal import metrics
from qlora_exp.training import trainer
from qlora_exp.utils.errors import ConfigError, DivergedError


@pytest.mark.parametrize(
    "choice",
    [
        ["method=qlora"],
        ["method=full"],
        pytest.param(["method=lora"], marks=pytest.mark.thorough),
        pytest.param(["method=qlora", "quantization=int8"], marks=pytest.mark.thorough),
    ],
)
def test_repeated_run_has_bit_identical_losses(choice: list[str], shared_run, run_quick, read_losses):
    first, again = shared_run(*choice), run_quick(*choice)
    assert read_losses(first) == read_losses(again)
    assert len(read_losses(first)) == 3
    assert first.metrics["after/loss"] == again.metrics["after/loss"]


def test_other_seed_gives_other_losses(shared_run, run_quick, read_losses):
    assert read_losses(run_quick("method=qlora", "seed=1")) != read_losses(shared_run("method=qlora"))


def test_evaluation_before_training_does_not_change_losses(shared_run, run_quick, read_losses):
    with_it = shared_run("method=qlora")
    without = run_quick("method=qlora", "evaluation.before=false", "evaluation.generate_rows=0")
    assert read_losses(with_it) == read_losses(without)


def test_evaluation_during_training_does_not_change_losses(shared_run, run_quick, read_losses):
    quiet = shared_run("method=qlora")
    loud = run_quick("method=qlora", "training.eval_strategy=steps", "training.eval_steps=1")
    assert read_losses(loud) == read_losses(quiet)


def test_gradient_accumulation_equals_the_whole_batch(run_quick, read_losses):
    still = ["method.lora_dropout=0.0", "training.train_sampling_strategy=sequential", "method=lora"]
    whole = run_quick(*still, "training.per_device_train_batch_size=4")
    parts = run_quick(*still, "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4")
    assert read_losses(whole) == pytest.approx(read_losses(parts), rel=1e-4)


@pytest.mark.parametrize(("recomputed", "padding"), [(1, "by_length"), (None, "free")])
def test_tuned_run_learns_the_same(recomputed, padding, run_quick, shared_run, read_losses, monkeypatch, caplog):
    still = ["method.lora_dropout=0.0", "training.per_device_train_batch_size=4", "method=lora"]
    recomputes = recomputed is not None
    choice = tuning.Choice(2, 2, recomputes, False, 1.0, 2**30, True, recomputed_layers=recomputed, padding=padding)
    monkeypatch.setattr("qlora_exp.recipe.tune._choice", lambda *_: choice)
    tuned = run_quick(*still, "training.tune=auto")
    assert read_losses(tuned) == pytest.approx(read_losses(shared_run(*still)), rel=1e-4)
    chosen = f"per_device_train_batch_size=2 gradient_accumulation_steps=2 gradient_checkpointing={recomputes}".lower()
    assert f"training.tune: {chosen}" in caplog.text


def test_run_that_cannot_be_planned_is_computed_as_configured(run_quick, shared_run, read_losses, monkeypatch, caplog):
    def refuse(*_):
        raise ConfigError("cannot be planned")

    monkeypatch.setattr("qlora_exp.recipe.tune._choice", refuse)
    assert read_losses(run_quick("method=lora", "training.tune=auto")) == read_losses(shared_run("method=lora"))
    assert "training.tune: computed as configured: cannot be planned" in caplog.text


def test_scoring_supervised_tokens_only_gives_the_same_loss(run_quick, read_losses, monkeypatch):
    kernel, scored = trl_utils._ChunkedLogProbFunction.apply, []

    def spy(hidden, *args):
        scored.append(len(hidden))
        return kernel(hidden, *args)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=spy))
    monkeypatch.setattr(trl_utils, "_use_triton", trl_utils._use_triton)  # put back afterwards
    still = ["method=full", "dataset.max_train_rows=2", "evaluation=loss_only"]
    few = run_quick(*still)
    few_scored, scored[:] = scored[:], []
    assert few_scored[:3] == 3 * [few.metrics["labels/supervised_tokens"]]  # then the evaluation
    monkeypatch.setattr(trl, "score_supervised_tokens_only", lambda: None)
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: False)
    every = run_quick(*still)
    assert min(scored[:3]) > few_scored[0]
    assert read_losses(few) == pytest.approx(read_losses(every), rel=1e-5)


def test_packed_rows_train_like_separate_rows(run_quick, read_losses):
    """All rows in one packed sequence against all rows in one batch: the same loss and the same next step."""
    still = [
        "method=lora", "method.lora_dropout=0.0", "dataset.max_train_rows=4", "training.max_steps=2",
        "training.train_sampling_strategy=sequential", "training.warmup_steps=0",
    ]  # fmt: skip
    rows = run_quick(*still, "training.per_device_train_batch_size=4", "training.max_length=2000")
    packed = run_quick(
        *still, "training.per_device_train_batch_size=1", "training.packing=true", "training.max_length=2000"
    )
    assert read_losses(packed) == pytest.approx(read_losses(rows), rel=1e-4)


MIXTURE = ["model.model_name_or_path=random:mixtral", "method.lora_dropout=0.0"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=tiny_opt", "training.padding=free"], "training.padding: random:opt does not keep packed rows apart"),
        (
            [*MIXTURE, "training.padding=by_length", "training.gradient_accumulation_steps=2"],
            "the experts' router depends on which rows make a batch",
        ),
        (
            ["training.gradient_checkpointing=true", "training.recomputed_layers=3"],
            "training.recomputed_layers=3: this model has 2 layers",
        ),
    ],
)
def test_computing_that_a_model_cannot_do_is_rejected(words, message, run_quick):
    with pytest.raises(ConfigError, match=message):
        run_quick("method=lora", *words)


def test_packing_without_isolated_attention_is_rejected_before_weights_load(run_quick, tiny_model, monkeypatch):
    own = f"model.model_name_or_path={tiny_model('opt')}"
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="does not keep packed rows apart"):
        patched.setattr("qlora_exp.models.base.load_model", None)
        run_quick("model=hub", own, "training.packing=true")
    monkeypatch.setattr("qlora_exp.models.builtin.TINY", {})  # a family of which there is no tiny model
    with pytest.raises(ConfigError, match="does not keep packed rows apart"):
        run_quick("model=hub", own, "training.packing=true")


@pytest.mark.parametrize(
    "words",
    [
        ["method=qlora", "training.gradient_accumulation_steps=2", "training.gradient_checkpointing=true"],
        pytest.param(["method=full", "training.packing=true", "training.bf16=true"], marks=pytest.mark.thorough),
        pytest.param(["method=lora", "lora_variant=dora", "training.eval_strategy=epoch"], marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_tiles_do_not_change_losses(words: list[str], run_quick, read_losses, monkeypatch):
    still = [*words, *([] if words[0] == "method=full" else ["method.lora_dropout=0"])]
    plain = run_quick(*still)
    monkeypatch.setattr(tiling, "LEAST", 32)
    tiled = run_quick(*still, "training.tiled_mlp=true")
    assert read_losses(tiled) == pytest.approx(read_losses(plain), rel=1e-2 if "training.bf16=true" in words else 1e-4)
    assert tiled.metrics["after/loss"] == pytest.approx(plain.metrics["after/loss"], rel=1e-2)


def test_models_without_mlps_are_refused_before_they_are_loaded(run_quick, monkeypatch):
    monkeypatch.setattr("qlora_exp.models.base.load_model", None)
    with pytest.raises(ConfigError, match="training.tiled_mlp: layer 0 of this model .opt. has no MLP"):
        run_quick("model=tiny_opt", "training.tiled_mlp=true")


def test_gradient_checkpointing_does_not_change_losses(run_quick, read_losses):
    plain = run_quick("training.gradient_checkpointing=false")
    assert read_losses(run_quick("training.gradient_checkpointing=true")) == pytest.approx(read_losses(plain), rel=1e-4)


STOPPED = (
    "method=full", "training.max_steps=6", "training.eval_strategy=steps", "training.eval_steps=1",
    "training.save_strategy=steps", "training.save_steps=1", "training.load_best_model_at_end=true",
    "training.early_stopping_patience=1", "training.early_stopping_threshold=100",
)  # fmt: skip


def test_early_stopping_ends_a_run_without_improvement(shared_run):
    assert shared_run(*STOPPED).metrics["steps"] == 2


def test_saved_models_and_checkpoints_have_the_names_of_transformers_4(shared_run):
    folder = shared_run(*STOPPED).output_dir
    for saved in (folder / "model", *(folder / "checkpoints").glob("checkpoint-*")):
        assert json.loads((saved / "config.json").read_text())["rope_theta"] == 10000.0
        values = json.loads((saved / "tokenizer_config.json").read_text())
        assert values["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_run_with_two_visible_gpus_trains_on_one(run_quick, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    assert run_quick("evaluation=loss_only").metrics["steps"] == 3


def test_divergence_stops_the_run(run_quick):
    with pytest.raises(DivergedError, match="at step"):
        run_quick("method=full", "training.learning_rate=1e30", "training.max_steps=6", "training.max_grad_norm=0")


def test_adapters_of_a_quantized_base_stay_in_float32(shared_run):
    from safetensors import safe_open

    result = shared_run("method=qlora")
    with safe_open(result.output_dir / "model" / "adapter_model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float32}  # noqa: SIM118


def test_throughput_excludes_the_first_step(shared_run, run_quick):
    metrics = shared_run("method=qlora").metrics
    assert metrics["tokens_per_second"] > metrics["supervised_tokens_per_second"] > 0
    assert metrics["samples_per_second"] == pytest.approx(2 / metrics["step_seconds_mean"])
    assert "tokens_per_second" not in run_quick("training.max_steps=1").metrics


@pytest.mark.parametrize(
    "optimizer", ["adamw_torch_fused", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_bnb_8bit", "sgd"]
)
def test_every_optimizer_trains(optimizer: str, run_quick, read_losses):
    assert len(read_losses(run_quick(f"optimizer={optimizer}", "training.max_steps=1", "evaluation=loss_only"))) == 1


@pytest.mark.parametrize(
    "change",
    [
        "training.learning_rate=1e-2",
        "training.loss_type=dft",
        "training.completion_only_loss=false",
        pytest.param("training.max_length=200", marks=pytest.mark.thorough),
        "training.bf16=true",
        pytest.param("lora_variant=dora", marks=pytest.mark.thorough),
        pytest.param("quantization=fp4", marks=pytest.mark.thorough),
        "quantization.bnb_4bit_compute_dtype=bfloat16",
        pytest.param("model.dtype=bfloat16", marks=pytest.mark.thorough),
        "method.adapter_dtype=bfloat16",
        pytest.param("model=tiny_qwen2", marks=pytest.mark.thorough),
        pytest.param("dataset.format=chat", marks=pytest.mark.thorough),
    ],
)
def test_key_changes_the_losses(change: str, shared_run, run_quick, read_losses):
    settings = ["training.learning_rate=5e-3", "evaluation=loss_only", "evaluation.before=false"]
    assert read_losses(run_quick(*settings, change)) != read_losses(shared_run(*settings))


def test_metrics_are_on_disk_for_each_step(run_quick):
    result = run_quick("training.eval_strategy=steps", "training.eval_steps=2", "training.max_steps=4")
    records = metrics(result.output_dir)
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2, 3, 4]
    assert [record["step"] for record in records if "eval/loss" in record] == [2, 4]


LONG, SHORT = (1.0, 2.0, 3.0), (3.0, 1.0, 0.5)
"""Loss of each token of the long held-out row, and of the short ones, after each step. The mean over tokens is lowest
after the first step; the mean over batches of one row falls from step to step."""


@pytest.fixture
def faked_losses(monkeypatch, write_jsonl):
    """Fake the losses of a long and of two short held-out rows.

    Returns:
        The overrides that read the rows and measure them after each step, and the weights of each measured step.
    """
    weights: dict[int, torch.Tensor] = {}
    measure = trainer.Trainer.prediction_step

    def faked(self, model, inputs, *others, **options):
        step = self.state.global_step
        weights[step] = next(each for each in model.parameters() if each.requires_grad).detach().clone()

        def answer(labels, **_):
            mask = labels[:, 1:] != -100
            losses = torch.where(mask.sum(dim=1) > 50, LONG[step - 1], SHORT[step - 1])
            return SimpleNamespace(log_probs=-losses[:, None] * mask, is_top1=mask, label_mask=mask)

        return measure(self, answer, inputs, *others, **options)

    monkeypatch.setattr(trainer.Trainer, "prediction_step", faked)
    train = write_jsonl([{"prompt": f"{i}?", "completion": "yes"} for i in range(6)], "train.jsonl")
    heldout = write_jsonl([{"prompt": f"no. {i}", "completion": "no" * count} for i, count in enumerate((1, 99, 1))])
    words = ["dataset=own", f"dataset.path={train}", f"dataset.eval_path={heldout}", "evaluation=loss_only"]
    steps = ["training.eval_strategy=steps", "training.eval_steps=1", "training.per_device_eval_batch_size=1"]
    return [*words, *steps, "method=full"], weights


def test_held_out_loss_of_all_tokens_chooses_the_best_model_and_stops_early(faked_losses, run_quick):
    words, weights = faked_losses
    words += ["training.load_best_model_at_end=true", "training.save_strategy=steps", "training.save_steps=1"]
    result = run_quick(*words, "training.early_stopping_patience=1")
    assert result.metrics["steps"] == 2  # not 3
    saved = load_file(result.output_dir / "model" / "model.safetensors")
    (embedding,) = [tensor for name, tensor in saved.items() if "embed_tokens" in name]
    assert torch.equal(embedding, weights[1])
    assert not torch.equal(embedding, weights[2])


def test_held_out_loss_of_all_tokens_is_what_a_search_judges(faked_losses, make_config, mlflow_uri, tmp_path):
    file = tmp_path / search.STUDY_FILE
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    study = optuna.create_study(storage=storage, study_name="after/loss")
    for _ in range(4):
        trial = study.ask()
        for step in (1, 2, 3):
            trial.report(1.5, step)
        study.tell(trial, 1.5)
    trial = study.ask()
    config = make_config(*faked_losses[0], f"tracking.uri={mlflow_uri}")
    run(config, tmp_path / "run", pruning={"file": str(file), "trial": trial.number, "pruner": "median"})
    first, second, third = study.trials[-1].intermediate_values.values()
    assert 1 < first < 1.1  # the mean over batches would be 2.3, and pruned
    assert 1.9 < second < 2
    assert 2.9 < third < 3


TALK = [{"chat": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": f"hi {n}"}]}
        for n in range(20)]  # fmt: skip
MIXED = ("dataset=own", "dataset.format=chat", "dataset.sources.talk.messages_column=chat",
         "dataset.sources.story.format=text", "method=lora", "evaluation.generate_rows=0")  # fmt: skip


@pytest.fixture
def mixture(write_jsonl) -> list[str]:
    story = [{"text": f"Story {n} is about {n * 3} dwarfs and their king."} for n in range(30)]
    paths = {"talk": write_jsonl(TALK, "talk.jsonl"), "story": write_jsonl(story, "story.jsonl")}
    return [*MIXED, *(f"dataset.sources.{name}.path={path}" for name, path in paths.items())]


def test_losses_of_a_mixture_are_measured_for_each_source(mixture, run_quick):
    """Before, during and after training, with packed rows grouped by length and general text replayed."""
    result = run_quick(*mixture, "unrelated=python_docs", "dataset.replay=0.2", "training.eval_strategy=steps",
                       "training.eval_steps=3", "training.packing=true",
                       "training.train_sampling_strategy=group_by_length")  # fmt: skip
    measured = result.metrics
    for moment in ("before", "after"):
        story, talk = (measured[f"{moment}/source_loss/{name}"] for name in ("story", "talk"))
        assert min(story, talk) < measured[f"{moment}/loss"] < max(story, talk)
        assert f"{moment}/unrelated_loss" in measured
    (during,) = [line for line in metrics(result.output_dir) if "eval/loss" in line]
    for name in ("story", "talk"):
        assert during[f"eval/source_loss/{name}"] == pytest.approx(measured[f"after/source_loss/{name}"], rel=1e-5)
    report = json.loads((result.output_dir / "sources.json").read_text())
    trained = {name: (values["rows"], values["trained"], values["heldout"]) for name, values in report.items()}
    assert trained == {"story": (16, 16, 3), "talk": (16, 16, 2), "replay": (310, 8, 0)}
    assert sum(values["share_of_supervised_tokens"] for values in report.values()) == pytest.approx(1)
    lines = (result.output_dir / "evaluation" / "after_losses.jsonl").read_text().splitlines()
    assert {json.loads(line)["source"] for line in lines} == {"story", "talk"}


@pytest.mark.thorough
def test_one_source_trains_like_a_path(mixture, run_quick, read_losses, write_jsonl):
    words = ["dataset=own", "dataset.format=chat", "dataset.messages_column=chat", "method=lora"]
    path = write_jsonl(TALK, "talk.jsonl")
    one, other = run_quick(*words, f"dataset.path={path}"), run_quick(*words, f"dataset.sources.talk.path={path}")
    assert read_losses(one) == read_losses(other)
    assert one.metrics["after/loss"] == other.metrics["after/loss"]


@pytest.mark.thorough
def test_mixture_resumes_in_its_order(mixture, run_quick, read_losses):
    weights = ["dataset.sources.talk.weight=0.3", "dataset.sources.story.weight=0.7", "dataset.stopping=all_exhausted"]
    saving = ["training.save_strategy=steps", "training.save_steps=2", "training.max_steps=4"]
    whole = run_quick(*mixture, *weights, *saving)
    checkpoint = whole.output_dir / "checkpoints" / "checkpoint-2"
    resumed = run_quick(*mixture, *weights, *saving, f"training.resume_from_checkpoint={checkpoint}")
    assert read_losses(resumed) == read_losses(whole)[2:]
    assert resumed.metrics["after/source_loss/talk"] == whole.metrics["after/source_loss/talk"]
