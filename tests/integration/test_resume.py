"""Runs that were cut off go on as if nothing had happened."""

import pytest

from qlora_exp.sweeps import jobs
from qlora_exp.tracking.journal import FILE, metrics
from qlora_exp.training import trainer
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.processes import signals


def test_resumed_run_ends_like_an_uninterrupted_one(run_quick, read_losses):
    saving = ["training.save_strategy=steps", "training.save_steps=2", "training.max_steps=4"]
    whole = run_quick(*saving)
    checkpoints = whole.output_dir / "checkpoints"
    assert whole.metrics["checkpoint_bytes"] > whole.metrics["model_bytes"]
    resumed = run_quick(*saving, f"training.resume_from_checkpoint={checkpoints / 'checkpoint-2'}")
    assert read_losses(resumed) == read_losses(whole)[2:]
    assert resumed.metrics["after/loss"] == whole.metrics["after/loss"]


@pytest.mark.parametrize("order", ["random", pytest.param("group_by_length", marks=pytest.mark.thorough)])
def test_output_folder_resumes_from_its_newest_complete_checkpoint(order: str, run_quick, read_losses):
    """In the second epoch, too."""
    saving = ["training.save_strategy=steps", "training.save_steps=2", "training.save_total_limit=9"]
    saving.append(f"training.train_sampling_strategy={order}")
    whole = run_quick(*saving, "training.max_steps=12")
    (whole.output_dir / "checkpoints" / "checkpoint-12" / "trainer_state.json").unlink()  # as a kill would leave it
    resumed = run_quick(*saving, "training.max_steps=12", f"training.resume_from_checkpoint={whole.output_dir}")
    assert read_losses(resumed) == read_losses(whole)[10:]


def test_a_run_that_a_scheduler_ends_saves_a_checkpoint_after_its_step_and_loses_nothing(
    run_quick, read_losses, tmp_path, monkeypatch
):
    whole, asked = run_quick("training.max_steps=6"), []
    step = trainer.Trainer.training_step

    def told(self, *arguments, **more):
        asked.append(len(asked))
        if len(asked) == 4:
            signals.end(signals.interrupt)  # as the signal of a scheduler, in the middle of a step
        return step(self, *arguments, **more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer.Trainer, "training_step", told)
        run_quick("training.max_steps=6", folder="told")
    folder = tmp_path / "told"
    assert [file.name for file in (folder / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert jobs.state(folder)[0] == "cut off"
    resumed = run_quick("training.max_steps=6", folder="told")
    assert read_losses(resumed) == read_losses(whole)
    assert resumed.metrics["after/loss"] == whole.metrics["after/loss"]


CONSTANT = (
    "training.lr_scheduler_type=constant", "training.learning_rate=5e-3", "training.warmup_steps=0", "method=lora",
    "evaluation.before=false",
)  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [  # the last checkpoint at an interval, at the end, of an epoch; what is measured meanwhile; the best model
        ["training.max_steps=4", "training.save_strategy=steps", "training.save_steps=2",
         "training.eval_strategy=epoch"],
        pytest.param(["training.max_steps=5", "training.save_strategy=steps", "training.save_steps=2", "method=full"],
                     marks=pytest.mark.thorough),
        pytest.param(["training.max_steps=-1", "training.num_train_epochs=0.5", "training.save_strategy=epoch",
                      "training.lr_scheduler_type=linear"], marks=pytest.mark.thorough),
        [
            "training.max_steps=6", "training.save_strategy=steps", "training.save_steps=1",
            "training.eval_strategy=steps", "training.eval_steps=1", "training.load_best_model_at_end=true",
            "training.early_stopping_patience=2", "training.early_stopping_threshold=100",
        ],
    ],
)  # fmt: skip
def test_run_interrupted_after_its_last_checkpoint_trains_no_further_step(
    words, run_quick, read_losses, tmp_path, monkeypatch
):
    from qlora_exp.training import evaluation

    whole = run_quick(*CONSTANT, *words)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evaluation, "evaluate", interrupt)
        run_quick(*CONSTANT, *words, folder="cut")
    journal = tmp_path / "cut" / FILE  # a power failure takes lines that the checkpoint still has
    journal.write_text("".join(line for line in journal.open() if '"train/loss"' not in line))
    (tmp_path / "cut" / "delivered.json").unlink()
    trained = [one for one in metrics(tmp_path / "cut") if "step_seconds_mean" in one]
    monkeypatch.setattr(trainer.Trainer, "training_step", lambda *_, **__: pytest.fail("a step was trained"))
    again = run_quick(*CONSTANT, *words, folder="cut")
    assert read_losses(again) == read_losses(whole)
    held_out = [[(one["step"], one["eval/loss"]) for one in metrics(each.output_dir) if "eval/loss" in one]
                for each in (again, whole)]  # fmt: skip
    assert held_out[0] == held_out[1]
    assert again.metrics["after/loss"] == whole.metrics["after/loss"]
    assert again.metrics["steps"] == whole.metrics["steps"]
    assert again.metrics["train_loss"] == whole.metrics["train_loss"]
    of_training = {"tokens_per_second", "memory/steady/rss_peak_mib", "memory/rss_peak_mib"}
    assert of_training <= whole.metrics.keys()
    assert not of_training & again.metrics.keys()
    assert [one for one in metrics(again.output_dir) if "step_seconds_mean" in one] == trained


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_interrupted_evaluation_after_the_last_checkpoint_is_repeated(run_quick, tmp_path, monkeypatch):
    words = [*CONSTANT, "training.save_strategy=steps", "training.eval_strategy=epoch", "training.max_steps=2"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer.Trainer, "evaluate", interrupt)
        run_quick(*words, folder="cut")
    run_quick(*words, folder="cut")
    assert [one["step"] for one in metrics(tmp_path / "cut") if "eval/loss" in one] == [2]


def test_resumed_run_keeps_its_early_stopping_counter(run_quick):
    words = [
        "training.max_steps=6", "training.save_strategy=steps", "training.save_steps=1", "training.eval_strategy=steps",
        "training.eval_steps=1", "training.load_best_model_at_end=true", "training.early_stopping_threshold=100",
        "training.save_total_limit=9",
    ]  # fmt: skip
    whole = run_quick(*words, "training.early_stopping_patience=3")
    assert whole.metrics["steps"] == 4
    earlier = whole.output_dir / "checkpoints" / "checkpoint-3"
    resumed = run_quick(*words, "training.early_stopping_patience=3", f"training.resume_from_checkpoint={earlier}")
    assert resumed.metrics["steps"] == 4
    later = run_quick(
        *words, "training.early_stopping_patience=4", f"training.resume_from_checkpoint={whole.output_dir}"
    )
    assert later.metrics["steps"] == 5  # the longer patience of a new run


def test_longer_run_resumes_from_the_last_checkpoint_of_a_shorter_one(run_quick, read_losses):
    words = [*CONSTANT, "training.save_strategy=steps", "training.save_steps=2"]
    whole, short = run_quick(*words, "training.max_steps=4"), run_quick(*words, "training.max_steps=2")
    longer = run_quick(*words, "training.max_steps=4", f"training.resume_from_checkpoint={short.output_dir}")
    assert read_losses(longer) == read_losses(whole)[2:]


def test_resuming_without_a_checkpoint_is_rejected(run_quick, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint in"):
        run_quick(f"training.resume_from_checkpoint={tmp_path / 'empty'}")


def test_resumed_run_starts_from_the_same_initialized_base(run_quick, read_losses):
    words = ["method=lora", "lora_variant=pissa", "evaluation=loss_only", "training.save_strategy=steps"]
    words += ["training.save_steps=2", "training.max_steps=4"]
    whole = run_quick(*words)
    again = run_quick(*words, f"training.resume_from_checkpoint={whole.output_dir}/checkpoints/checkpoint-2")
    assert read_losses(again) == pytest.approx(read_losses(whole)[2:], rel=1e-4)
    assert again.metrics["after/loss"] == pytest.approx(whole.metrics["after/loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["lorafa", "riemannian", pytest.param("loraplus", marks=pytest.mark.thorough)])
def test_lora_optimizer_trains_and_resumes(name: str, shared_run, run_quick, read_losses):
    words = [f"optimizer={name}", "method=lora", "evaluation=loss_only", "training.max_steps=4"]
    words += ["training.save_strategy=steps", "training.save_steps=2"]
    whole = run_quick(*words)
    plain = shared_run("method=lora", "evaluation=loss_only", "training.max_steps=4")
    assert read_losses(whole)[0] == read_losses(plain)[0]
    assert read_losses(whole)[3] != read_losses(plain)[3]
    fewer = whole.metrics["trainable_parameters"] < plain.metrics["trainable_parameters"]
    assert fewer == (name == "lorafa")
    again = run_quick(*words, f"training.resume_from_checkpoint={whole.output_dir}/checkpoints/checkpoint-2")
    assert read_losses(again) == read_losses(whole)[2:]


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [pytest.param("newest", marks=pytest.mark.thorough), "all"])
def test_damaged_checkpoint_changes_no_result(damaged, run_quick, read_losses, tmp_path, monkeypatch, caplog):
    from qlora_exp.training import evaluation

    words = [*CONSTANT, "training.max_steps=4", "training.save_strategy=steps", "training.save_steps=2"]
    words.append("training.save_total_limit=9")
    whole = run_quick(*words)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evaluation, "evaluate", interrupt)
        run_quick(*words, folder="cut")
    for step in (4,) if damaged == "newest" else (2, 4):
        file = tmp_path / "cut" / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt"
        file.write_bytes(file.read_bytes()[:1000])
    again = run_quick(*words, folder="cut")
    assert read_losses(again) == read_losses(whole)
    assert again.metrics["after/loss"] == whole.metrics["after/loss"]
    assert "missing or damaged: checkpoint-4/optimizer.pt" in caplog.text
    assert ("; training starts over" in caplog.text) == (damaged == "all")
