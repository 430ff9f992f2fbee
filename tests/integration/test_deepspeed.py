"""Two processes of DeepSpeed's ZeRO-3 give the results of one. `nox -s deepspeed` installs what this needs."""

import os
import re
import signal
import threading
import time
from importlib.util import find_spec

import pytest
import torch
from integration.test_distributed import ROUNDING, curves, weights

from qlora_exp.tracking.journal import last_message
from qlora_exp.utils.errors import RankError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra `deepspeed`"),
]
ONE = ["training.per_device_train_batch_size=4"]
TWO = ["distributed=deepspeed_zero3", "distributed.num_processes=2"]
_NO_DROPOUT = "method.lora_dropout=0"
_EPOCHS = [
    "method=lora", "method.r=1", "model.random_config.intermediate_size=99", _NO_DROPOUT, "training.max_steps=-1",
    "training.num_train_epochs=2", "dataset.max_train_rows=13", "dataset.max_eval_rows=3",
    "training.gradient_accumulation_steps=2", "training.eval_strategy=epoch", "training.save_strategy=epoch",
]  # fmt: skip
"""13 rows: the last batch of each epoch has one. Matrices of 1 x 99: the parts of two processes differ in size."""


@pytest.mark.parametrize(
    "words",
    [
        [*_EPOCHS, "training.load_best_model_at_end=true", "training.early_stopping_patience=2"],
        ["method=qlora", _NO_DROPOUT, "training.train_sampling_strategy=group_by_length", "optimizer=loraplus",
         "evaluation.generate_rows=3", "evaluation.generation_batch_size=1"],
        ["method=full", "training.packing=true", "training.max_length=256", "dataset.max_train_rows=64",
         "training.gradient_checkpointing=true"],
    ],
    ids=["lora", "qlora", "full"],
)  # fmt: skip
def test_two_processes_give_the_results_of_one_with_twice_the_batch(words, run_quick, mlflow_client):
    one, two = run_quick(*ONE, *words), run_quick(*TWO, *words)
    assert curves(two) == pytest.approx(curves(one), rel=ROUNDING)
    for name in ("steps", "train_loss", "before/loss", "after/loss", "after/rougeL", "trainable_parameters"):
        assert two.metrics[name] == pytest.approx(one.metrics[name], rel=ROUNDING), name
    torch.testing.assert_close(
        weights(two.output_dir / "model"), weights(one.output_dir / "model"), rtol=ROUNDING, atol=1e-6
    )
    norms = [
        [each.value for each in mlflow_client.get_metric_history(run.run_id, "train/grad_norm")] for run in (one, two)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=ROUNDING)
    assert mlflow_client.get_run(two.run_id).data.params["distributed.engine"] == "deepspeed_zero3"


def test_checkpoint_is_that_of_one_process(run_quick):
    one, two = run_quick(*ONE, *_EPOCHS), run_quick(*TWO, *_EPOCHS)
    saved, same = (run.output_dir / "checkpoints" / "checkpoint-2" for run in (two, one))
    own = {file.name for file in saved.iterdir()} ^ {file.name for file in same.iterdir()}
    assert own == {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (saved, same)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=1e-4, atol=1e-6)
    for kind, checkpoint in ((TWO, saved), (TWO, same), (ONE, saved)):
        resumed = run_quick(*kind, *_EPOCHS, f"training.resume_from_checkpoint={checkpoint}")
        assert resumed.metrics["after/loss"] == pytest.approx(one.metrics["after/loss"], rel=ROUNDING)
        trained, whole = weights(resumed.output_dir / "model"), weights(one.output_dir / "model")
        torch.testing.assert_close(trained, whole, rtol=ROUNDING, atol=1e-6)


def test_processes_end_as_one(run_quick, tmp_path):
    folder = tmp_path / "shared"

    def kill() -> None:
        journal = folder / "journal.jsonl"
        while not journal.is_file() or '"train/loss"' not in journal.read_text():
            time.sleep(0.02)
        os.kill(int(re.search(r"is process (\d+)", (folder / "ranks" / "1.log").read_text())[1]), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(RankError, match=r"rank 1: its process \d+"):
        run_quick(*TWO, "method=lora", "training.max_steps=100000", folder="shared")
    assert last_message(folder)["status"] == "FAILED"
