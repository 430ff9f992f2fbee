"""Several processes that share a run give the result of one, and end as one."""

import os
import re
import signal
import socket
import threading
import time

import psutil
import pytest
import torch
from helpers import processes
from safetensors.torch import load_file
from support import QUICK, exit_code

from qlora_exp.environment.device import cpu_name
from qlora_exp.tracking.journal import last_message, metrics
from qlora_exp.utils.errors import ConfigError, MemoryExhaustedError, RankError, TimeLimitError
from qlora_exp.utils.processes.signals import OUT_OF_TIME, handle_signals

ONE = ["training.per_device_train_batch_size=4"]
TWO = ["distributed=ddp", "distributed.num_processes=2"]
SHARDED = ["distributed=fsdp", "distributed.num_processes=2"]
ROUNDING = 1e-5
"""Greatest relative difference between sums in another order."""
_NO_DROPOUT = "method.lora_dropout=0"


def curves(result) -> dict:
    names = ("train/loss", "eval/loss", "train/learning_rate")
    return {(name, line["step"]): line[name] for line in metrics(result.output_dir) for name in names if name in line}


def weights(folder) -> dict:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


_EPOCHS = [
    "method=lora", _NO_DROPOUT, "training.max_steps=-1", "training.num_train_epochs=2", "dataset.max_train_rows=13",
    "dataset.max_eval_rows=3", "training.gradient_accumulation_steps=2", "training.eval_strategy=epoch",
    "training.save_strategy=epoch", "training.load_best_model_at_end=true", "training.early_stopping_patience=2",
]  # fmt: skip
"""13 rows: the last batch of each epoch has one, which one of the processes does not get."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engines", "words"),
    [
        ([TWO, SHARDED], _EPOCHS),
        # The processes generate answers of different lengths, and one of them one answer more.
        ([TWO, SHARDED], ["method=qlora", _NO_DROPOUT, "training.train_sampling_strategy=group_by_length",
                          "evaluation.generate_rows=3", "evaluation.generation_batch_size=1"]),
        pytest.param([TWO, SHARDED], ["method=full", "training.packing=true", "training.max_length=256",
                                      "dataset.max_train_rows=64"], marks=pytest.mark.thorough),
        pytest.param([TWO], ["method=lora", "lora_variant=dora", _NO_DROPOUT, "training.gradient_checkpointing=true"],
                     marks=pytest.mark.thorough),
        pytest.param([TWO], ["method=adalora", _NO_DROPOUT], marks=pytest.mark.thorough),
    ],
    ids=["lora", "qlora", "full", "dora", "adalora"],
)  # fmt: skip
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(engines, words, run_quick):
    one = run_quick(*ONE, *words)
    for engine in engines:
        two = run_quick("training.per_device_train_batch_size=2", *engine, *words)
        assert curves(two) == pytest.approx(curves(one), rel=ROUNDING)
        for name in ("steps", "train_loss", "before/loss", "after/loss", "after/rougeL", "trainable_parameters"):
            assert two.metrics[name] == pytest.approx(one.metrics[name], rel=ROUNDING), name
        trained, same = weights(two.output_dir / "model"), weights(one.output_dir / "model")
        assert trained.keys() == same.keys()
        for name, tensor in trained.items():
            torch.testing.assert_close(tensor, same[name], rtol=ROUNDING, atol=1e-6)


@pytest.mark.slow
def test_checkpoint_of_sharded_processes_is_that_of_one(run_quick):
    words = [*_EPOCHS, "training.load_best_model_at_end=false", "training.early_stopping_patience=null"]
    one = run_quick(*ONE, *words)
    two = run_quick(*SHARDED, *words)
    saved, same = (run.output_dir / "checkpoints" / "checkpoint-2" for run in (two, one))
    own = {file.name for file in saved.iterdir()} ^ {file.name for file in same.iterdir()}
    assert own == {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    states = [torch.load(folder / "optimizer.pt") for folder in (saved, same)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=1e-4, atol=1e-6)
    for own, checkpoint in ((SHARDED, same), (ONE, saved)):  # what one began, two continue; and the other way
        resumed = run_quick(*own, *words, f"training.resume_from_checkpoint={checkpoint}")
        assert resumed.metrics["after/loss"] == pytest.approx(one.metrics["after/loss"], rel=ROUNDING)
        trained, whole = weights(resumed.output_dir / "model"), weights(one.output_dir / "model")
        torch.testing.assert_close(trained, whole, rtol=ROUNDING, atol=1e-6)


def test_shared_run_is_one_run(run_quick, mlflow_client):
    words = ["method=lora", _NO_DROPOUT, "training.max_steps=4"]
    saving = ["training.save_strategy=steps", "training.save_steps=2"]
    result = run_quick(*TWO, *words, *saving, "model.device_map=auto")  # as the shipped experiments have it
    assert "device_map=auto has no effect with distributed=ddp" in (result.output_dir / "run.log").read_text()
    run = mlflow_client.get_run(result.run_id)
    (only,) = mlflow_client.search_runs([run.info.experiment_id], f"params.seed = '42' and run_id = '{result.run_id}'")
    assert only.info.status == "FINISHED"
    assert run.data.params["distributed.num_processes"] == "2"
    assert run.data.params["distributed.engine"] == "ddp"
    assert run.data.params["resolved.topology"] == f"{socket.gethostname()}: 2 x {cpu_name()}"
    largest = result.metrics["memory/rss_peak_mib"]
    assert largest == max(result.metrics[f"memory/rank{rank}/rss_peak_mib"] for rank in (0, 1))
    assert (result.output_dir / "ranks" / "1.log").read_text().count("rank 1 of 2 is process") == 1
    checkpoint = result.output_dir / "checkpoints" / "checkpoint-2"
    assert {"rng_state_0.pth", "rng_state_1.pth", "qlora_exp_digests.json"} <= {
        file.name for file in checkpoint.iterdir()
    }
    # What two processes began, one with twice the batch continues.
    words += ["training.save_strategy=no", "training.per_device_train_batch_size=4"]
    whole = run_quick(*words)
    resumed = run_quick(*words, f"training.resume_from_checkpoint={checkpoint}")
    assert resumed.metrics["after/loss"] == pytest.approx(whole.metrics["after/loss"], rel=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "number", "ends", "says"),
    [
        (1, signal.SIGKILL, ("FAILED", "error"), r"rank 1: its process \d+ .*"),
        (
            0,
            signal.SIGKILL,
            ("FAILED", "error"),
            r"rank 0: its process \d+ (on .* )?ended with(out a message| SIGKILL)",
        ),
        (1, signal.SIGSTOP, ("FAILED", "error"), r"rank 1: its process \d+ on .* gave no sign of life for 5 s"),
        pytest.param(
            1,
            None,
            ("FAILED", "oom"),
            r"rank 1: RuntimeError: .*(can't allocate memory|could not create a)",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            1, signal.SIGTERM, ("KILLED", "killed"), r"rank 1: it was interrupted", marks=pytest.mark.thorough
        ),
        pytest.param(None, signal.SIGINT, ("KILLED", "killed"), "^", marks=pytest.mark.thorough),
        (None, OUT_OF_TIME, ("FAILED", "timeout"), "time limit of the job is over"),
    ],
    ids=["killed", "main killed", "frozen", "without memory", "interrupted", "all interrupted", "out of time"],
)
def test_processes_end_as_one(rank, number, ends, says, run_quick, tmp_path):
    folder, fault_at = tmp_path / "shared", []

    def fault() -> None:
        journal = folder / "journal.jsonl"
        while not journal.is_file() or '"train/loss"' not in journal.read_text():
            time.sleep(0.02)
        file = folder / ("ranks/1.log" if rank else "run.log")
        number_of = re.search(rf"rank {rank or 0} of 2 is process (\d+)", file.read_text())
        fault_at.append(time.monotonic())
        if number is None:
            psutil.Process(int(number_of[1])).rlimit(psutil.RLIMIT_AS, (1, 1))
        else:
            os.kill(os.getpid() if rank is None else int(number_of[1]), number)

    threading.Thread(target=fault, daemon=True).start()
    words = [*TWO, "method=lora", "training.max_steps=100000"]
    words += ["distributed.ddp_timeout=5"] if number == signal.SIGSTOP else []
    kinds = {signal.SIGINT: KeyboardInterrupt, OUT_OF_TIME: TimeLimitError, None: MemoryExhaustedError}
    raised = kinds.get(number, RankError)
    with handle_signals(), pytest.raises(raised, match=says):
        run_quick(*words, folder="shared")
    seconds = time.monotonic() - fault_at[0]
    print(f"{seconds:.1f} s after the fault")
    assert seconds < 60
    last = last_message(folder)
    assert (last["status"], last["outcome"]) == ends
    # The launcher interrupts rank 0, which may notice that before it misses rank 1.
    assert re.search(f"{says}|^KeyboardInterrupt", last["failure"])
    for file, own in (("run.log", 0), ("ranks/1.log", 1)):
        pid = int(re.search(rf"rank {own} of 2 is process (\d+)", (folder / file).read_text())[1])
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_machines_share_a_run(run_quick, mlflow_uri, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*TWO, "method=lora", "distributed.num_machines=2", "distributed.main_process_ip=127.0.0.1",
             f"distributed.main_process_port={port}"]  # fmt: skip
    second = processes.start(
        processes.train, [*QUICK, f"tracking.uri={mlflow_uri}", *words, "distributed.machine_rank=1"], tmp_path / "both"
    )
    result = run_quick(*words, "distributed.machine_rank=0", folder="both")
    second.join()
    assert second.exitcode == 0
    assert result.metrics["steps"] == 3
    assert last_message(tmp_path / "both")["outcome"] == "ok"
    assert "rank 1 of 2 is process" in (tmp_path / "both" / "ranks" / "1.log").read_text()


def test_error_of_the_main_process_is_raised_as_it_is(run_quick, monkeypatch):
    with pytest.raises(ConfigError, match=r"training\.packing: .* does not keep packed rows apart"):
        run_quick(*TWO, "method=lora", "model=tiny_opt", "training.packing=true")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["distributed=ddp", "device=cpu"], "num_processes=auto counts GPUs, and there are none here"),
        ([*TWO, "device=auto"], "2 processes here need a GPU each, and 1 are visible; start fewer"),
        (
            ["distributed=deepspeed_zero3", "distributed.num_processes=2"],
            "needs an extra package: pip install 'qlora-exp[deepspeed]'",
        ),
        ([*SHARDED, "device=auto", "distributed.cpu_offload=true"], "each, and 1 are visible; start fewer"),
        ([*SHARDED, "distributed.cpu_offload=true"], "distributed.cpu_offload=true needs GPUs, and none is visible"),
        ([*SHARDED, "device=cpu", "distributed.cpu_offload=true"], "needs GPUs, not device=cpu"),
        ([*TWO, "device=mps"], "distributed=ddp needs GPUs of NVIDIA, or device=cpu"),
        ([*TWO, "model.device_map={model: cpu}"], "several devices, and distributed=ddp puts one on each"),
    ],
)
def test_processes_that_cannot_share_a_run_are_refused_at_once(words, says, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0" if "device=auto" in words else "")
    monkeypatch.setattr("qlora_exp.recipe.inputs.find_spec", lambda _: None)  # as where DeepSpeed is not installed
    assert exit_code("train", "model=tiny_llama", "method=lora", *words) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "mlruns").exists()
