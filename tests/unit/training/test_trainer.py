from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trl.trainer import utils as trl_utils

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import Device, resolve
from qlora_exp.libraries import trl
from qlora_exp.tracking.journal import metrics
from qlora_exp.training import trainer
from qlora_exp.training.trainer import arguments
from qlora_exp.utils.errors import ConfigError, DivergedError

CPU = Device("cpu", "CPU", bf16=False, paging=False)
GPU = Device("cuda", "GPU", bf16=True, paging=True, visible_gpus=2)


def test_trl_decides_nothing_by_itself():
    config = compose(["training.weight_decay=0.01", "optimizer.adam_beta2=0.95", "training.warmup_steps=0.03"])
    found = arguments(config, resolve(config, CPU), Path("out"))
    assert (found.bf16, found.fp16, found.gradient_checkpointing) == (False, False, False)
    assert (found.weight_decay, found.adam_beta2, found.warmup_steps) == (0.01, 0.95, 0.03)
    assert found.report_to in ([], ["none"])
    assert (found.seed, found.data_seed) == (42, 42)


@pytest.mark.parametrize(
    "choice", [["method=lora"], ["method=qlora"], ["method=full"], ["method=qlora", "quantization=int8"]]
)
def test_the_same_run_twice_gives_the_same_losses_bit_for_bit(choice: list[str], run, losses):
    first, again = run(*choice), run(*choice)
    assert losses(first) == losses(again)
    assert len(losses(first)) == 3
    assert first.metrics["after/loss"] == again.metrics["after/loss"]


def test_another_seed_gives_other_losses(run, losses):
    assert losses(run("seed=1")) != losses(run("seed=2"))


def test_measuring_before_training_does_not_change_it(run, losses):
    with_it = run("method=qlora")
    without = run("method=qlora", "evaluation.before=false", "evaluation.generate_rows=0")
    assert losses(with_it) == losses(without)


def test_evaluating_during_training_does_not_change_it(run, losses):
    quiet = run("training.eval_strategy=no")
    assert losses(run("training.eval_strategy=steps", "training.eval_steps=1")) == losses(quiet)


def test_accumulation_trains_like_the_whole_batch(run, losses):
    still = ["method.lora_dropout=0.0", "training.train_sampling_strategy=sequential", "method=lora"]
    whole = run(*still, "training.per_device_train_batch_size=4")
    parts = run(*still, "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4")
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-4)


def test_only_tokens_with_loss_are_scored_and_the_loss_is_that_of_scoring_all(run, losses, monkeypatch):
    kernel, scored = trl_utils._ChunkedLogProbFunction.apply, []

    def spy(hidden, *args):
        scored.append(len(hidden))
        return kernel(hidden, *args)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=spy))
    monkeypatch.setattr(trl_utils, "_use_triton", trl_utils._use_triton)  # put back afterwards
    still = ["method=full", "dataset.max_train_rows=2", "evaluation=loss_only"]
    few = run(*still)
    few_scored, scored[:] = scored[:], []
    assert few_scored[:3] == 3 * [few.metrics["labels/supervised_tokens"]]  # then the evaluation
    monkeypatch.setattr(trl, "score_supervised_tokens_only", lambda: None)
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: False)
    every = run(*still)
    assert min(scored[:3]) > few_scored[0]
    assert losses(few) == pytest.approx(losses(every), rel=1e-5)


def test_packing_trains_like_the_rows_themselves(run, losses):
    """All rows in one packed sequence against all rows in one batch: the same loss and the same next step."""
    still = [
        "method=lora", "method.lora_dropout=0.0", "dataset.max_train_rows=4", "training.max_steps=2",
        "training.train_sampling_strategy=sequential", "training.warmup_steps=0",
    ]  # fmt: skip
    rows = run(*still, "training.per_device_train_batch_size=4", "training.max_length=2000")
    packed = run(*still, "training.per_device_train_batch_size=1", "training.packing=true", "training.max_length=2000")
    assert losses(packed) == pytest.approx(losses(rows), rel=1e-4)


def test_packing_is_refused_where_rows_would_mix(run):
    with pytest.raises(ConfigError, match="does not keep packed rows apart"):
        run("model=tiny_opt", "training.packing=true")


def test_checkpointing_changes_nothing_but_memory(run, losses):
    plain = run("training.gradient_checkpointing=false")
    assert losses(run("training.gradient_checkpointing=true")) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.parametrize("words", [[], pytest.param(["device=cuda", "method=qlora"], marks=pytest.mark.gpu)])
def test_a_resumed_run_ends_like_an_uninterrupted_one(words: list[str], run, losses):
    saving = ["training.save_strategy=steps", "training.save_steps=2", "training.max_steps=4", *words]
    whole = run(*saving)
    checkpoints = whole.output_dir / "checkpoints"
    assert whole.metrics["checkpoint_bytes"] > whole.metrics["model_bytes"]
    resumed = run(*saving, f"training.resume_from_checkpoint={checkpoints / 'checkpoint-2'}")
    assert losses(resumed) == losses(whole)[2:]
    assert resumed.metrics["after/loss"] == whole.metrics["after/loss"]


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_an_output_folder_is_resumed_from_its_newest_whole_checkpoint(order: str, run, losses):
    """In the second epoch, too."""
    saving = ["training.save_strategy=steps", "training.save_steps=2", "training.save_total_limit=9"]
    saving.append(f"training.train_sampling_strategy={order}")
    whole = run(*saving, "training.max_steps=12")
    (whole.output_dir / "checkpoints" / "checkpoint-12" / "trainer_state.json").unlink()  # as a kill would leave it
    resumed = run(*saving, "training.max_steps=12", f"training.resume_from_checkpoint={whole.output_dir}")
    assert losses(resumed) == losses(whole)[10:]


CONSTANT = (
    "training.lr_scheduler_type=constant", "training.learning_rate=5e-3", "training.warmup_steps=0", "method=lora",
    "evaluation.before=false",
)  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["training.max_steps=4", "training.save_strategy=steps", "training.save_steps=2"],
        ["training.max_steps=5", "training.save_strategy=steps", "training.save_steps=2", "method=full"],
        ["training.max_steps=4", "training.save_strategy=steps", "training.lr_scheduler_type=linear"],
        ["training.max_steps=-1", "training.num_train_epochs=0.5", "training.save_strategy=steps"],
        ["training.max_steps=-1", "training.num_train_epochs=1", "training.save_strategy=epoch"],
        ["training.max_steps=4", "training.save_strategy=steps", "training.eval_strategy=epoch"],
        [
            "training.max_steps=6", "training.save_strategy=steps", "training.save_steps=1",
            "training.eval_strategy=steps", "training.eval_steps=1", "training.load_best_model_at_end=true",
            "training.early_stopping_patience=2", "training.early_stopping_threshold=100",
        ],
    ],
)  # fmt: skip
def test_a_run_cut_off_after_its_last_checkpoint_is_not_trained_further(words, run, losses, tmp_path, monkeypatch):
    from qlora_exp.training import evaluation

    whole = run(*CONSTANT, *words)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evaluation, "evaluate", interrupt)
        run(*CONSTANT, *words, folder="cut")
    trained = [one for one in metrics(tmp_path / "cut") if "step_seconds_mean" in one]
    monkeypatch.setattr(trainer.Trainer, "training_step", lambda *_, **__: pytest.fail("a step was trained"))
    again = run(*CONSTANT, *words, folder="cut")
    assert losses(again) == losses(whole)
    held_out = [[(one["step"], one["eval/loss"]) for one in metrics(each.output_dir) if "eval/loss" in one]
                for each in (again, whole)]  # fmt: skip
    assert held_out[0] == held_out[1]
    assert again.metrics["after/loss"] == whole.metrics["after/loss"]
    assert again.metrics["steps"] == whole.metrics["steps"]
    of_training = {"train_loss", "tokens_per_second", "memory/steady/rss_peak_mib", "memory/rss_peak_mib"}
    assert of_training <= whole.metrics.keys()
    assert not of_training & again.metrics.keys()
    assert [one for one in metrics(again.output_dir) if "step_seconds_mean" in one] == trained


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_an_evaluation_that_was_cut_off_behind_the_last_checkpoint_is_made_up_for(run, tmp_path, monkeypatch):
    words = [*CONSTANT, "training.save_strategy=steps", "training.eval_strategy=epoch", "training.max_steps=2"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer.Trainer, "evaluate", interrupt)
        run(*words, folder="cut")
    run(*words, folder="cut")
    assert [one["step"] for one in metrics(tmp_path / "cut") if "eval/loss" in one] == [2]


def test_a_resumed_run_goes_on_counting_to_its_early_stop(run):
    words = [
        "training.max_steps=6", "training.save_strategy=steps", "training.save_steps=1", "training.eval_strategy=steps",
        "training.eval_steps=1", "training.load_best_model_at_end=true", "training.early_stopping_threshold=100",
        "training.save_total_limit=9",
    ]  # fmt: skip
    whole = run(*words, "training.early_stopping_patience=3")
    assert whole.metrics["steps"] == 4
    earlier = whole.output_dir / "checkpoints" / "checkpoint-3"
    resumed = run(*words, "training.early_stopping_patience=3", f"training.resume_from_checkpoint={earlier}")
    assert resumed.metrics["steps"] == 4
    later = run(*words, "training.early_stopping_patience=4", f"training.resume_from_checkpoint={whole.output_dir}")
    assert later.metrics["steps"] == 5  # the longer patience of a new run


def test_a_new_run_goes_on_from_the_last_checkpoint_of_a_shorter_one(run, losses):
    words = [*CONSTANT, "training.save_strategy=steps", "training.save_steps=2"]
    whole, short = run(*words, "training.max_steps=4"), run(*words, "training.max_steps=2")
    longer = run(*words, "training.max_steps=4", f"training.resume_from_checkpoint={short.output_dir}")
    assert losses(longer) == losses(whole)[2:]


def test_resuming_without_a_checkpoint_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint in"):
        run(f"training.resume_from_checkpoint={tmp_path / 'empty'}")


def test_the_best_checkpoint_is_kept_and_hopeless_runs_stop(run):
    steps = [
        "training.max_steps=6",
        "training.eval_strategy=steps",
        "training.eval_steps=1",
        "training.save_strategy=steps",
    ]
    result = run(
        "method=full", *steps, "training.save_steps=1", "training.load_best_model_at_end=true",
        "training.early_stopping_patience=1", "training.early_stopping_threshold=100",
    )  # fmt: skip
    assert result.metrics["steps"] == 2


def test_of_two_gpus_one_is_trained_on(run, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    assert run("evaluation=loss_only").metrics["steps"] == 3


def test_the_trainer_counts_one_gpu_of_those_that_are_seen(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    config = compose(["training.bf16=false"])
    found = arguments(config, resolve(config, GPU), Path("out"))
    assert (found.n_gpu, found.train_batch_size) == (1, found.per_device_train_batch_size)


def test_a_divergence_stops_the_run(run):
    with pytest.raises(DivergedError, match="at step"):
        run("method=full", "training.learning_rate=1e30", "training.max_steps=6", "training.max_grad_norm=0")


def test_adapters_of_a_quantized_base_stay_in_float32(run):
    from safetensors import safe_open

    result = run("method=qlora")
    with safe_open(result.output_dir / "model" / "adapter_model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float32}  # noqa: SIM118


def test_throughput_leaves_the_first_step_out(run):
    metrics = run("training.max_steps=3").metrics
    assert metrics["tokens_per_second"] > metrics["supervised_tokens_per_second"] > 0
    assert metrics["samples_per_second"] == pytest.approx(2 / metrics["step_seconds_mean"])
    assert "tokens_per_second" not in run("training.max_steps=1").metrics


@pytest.mark.parametrize(
    "optimizer", ["adamw_torch_fused", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_bnb_8bit", "sgd"]
)
def test_every_optimizer_trains(optimizer: str, run, losses):
    assert len(losses(run(f"optimizer={optimizer}", "training.max_steps=1", "evaluation=loss_only"))) == 1


@pytest.mark.parametrize(
    "change",
    [
        "training.learning_rate=1e-2",
        "training.lr_scheduler_type=constant",
        "training.weight_decay=0.5",
        "training.max_grad_norm=0.01",
        "training.loss_type=dft",
        "training.neftune_noise_alpha=50",
        "training.completion_only_loss=false",
        "training.max_length=200",
        "training.warmup_steps=2",
        "training.bf16=true",
        "optimizer.adam_beta1=0.1",
        "optimizer.adam_beta2=0.1",
        "optimizer.adam_epsilon=1.0",
        "optimizer.optim=sgd",
        "method.r=4",
        "method.lora_alpha=1",
        "method.lora_dropout=0.5",
        "method.target_modules=q_v",
        "lora_variant=rslora",
        "lora_variant=dora",
        "quantization=fp4",
        "quantization=nf4",
        "quantization.bnb_4bit_compute_dtype=bfloat16",
        "model.dtype=bfloat16",
        "method.adapter_dtype=bfloat16",
        "model=tiny_qwen2",
        "dataset.format=chat",
        "dataset.split_seed=1",
        "dataset.eval_size=0.3",
    ],
)
def test_a_key_changes_the_run(change: str, run, losses):
    settings = ["training.max_steps=4", "training.learning_rate=5e-3", "evaluation=loss_only"]
    key = "test_a_key_changes_the_run"
    if key not in _reference:
        _reference[key] = losses(run(*settings))
    changed = run(*settings, change)
    assert losses(changed) != _reference[key]


_reference: dict[str, list[float]] = {}


def test_metrics_are_on_disk_step_by_step(run):
    result = run("training.eval_strategy=steps", "training.eval_steps=2", "training.max_steps=4")
    records = metrics(result.output_dir)
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2, 3, 4]
    assert [record["step"] for record in records if "eval/loss" in record] == [2, 4]
