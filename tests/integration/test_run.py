import errno
import json
import os
import subprocess
import sys

import pytest
import yaml
from support import QUICK, exit_code

from qlora_exp.config.validate import from_dict
from qlora_exp.config.values import APART, flatten
from qlora_exp.tracking.journal import last_message, metrics
from qlora_exp.tracking.mlflow_store import client
from qlora_exp.utils.errors import ConfigError, DataError, DivergedError, UserError


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_every_method_trains_every_family(method: str, family: str, run):
    metrics = run(
        f"model=tiny_{family}", f"method={method}", "training.learning_rate=1e-2", "training.max_steps=6"
    ).metrics
    assert metrics["after/loss"] < metrics["before/loss"]
    assert (metrics["trainable_share"] == 1.0) == (method == "full")


@pytest.mark.parametrize("quantization", ["nf4", "nf4_double", "fp4", "fp4_double", "int8"])
@pytest.mark.parametrize("variant", ["lora", "dora_rslora"])
def test_every_quantization_trains_with_every_variant(quantization: str, variant: str, run):
    run(f"quantization={quantization}", f"lora_variant={variant}", "training.max_steps=1", "evaluation=loss_only")


def test_what_a_run_leaves_in_mlflow(run, store, config):
    result = run("training.eval_strategy=steps", "training.eval_steps=2", "dataset=reasoning_gym")
    mlflow = client(store)
    found = mlflow.get_run(result.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["outcome"] == "ok"
    assert {"version.torch", "hardware.cores", "process.pid", "mlflow.source.name"} <= found.data.tags.keys()

    config = flatten(from_dict(yaml.safe_load((result.output_dir / "qlora_exp.yaml").read_text())))
    expected = {key: value for key, value in config.items() if key.split(".")[0] not in APART and value is not None}
    assert expected.keys() <= found.data.params.keys()
    assert found.data.params["resolved.optim"] == "adamw_torch"
    assert found.data.params["resolved.optim_fallback"]
    assert found.data.params["resolved.places"] == "cpu"

    metrics = found.data.metrics
    for name in ("loss", "perplexity", "rougeL", "exact_match", "task_score", "token_seconds_p50"):
        assert {f"before/{name}", f"after/{name}"} <= metrics.keys()
    for phase in ("load", "evaluate_before", "first_step", "steady", "evaluation", "evaluate_after", "save"):
        assert metrics[f"memory/{phase}/rss_peak_mib"] > 100
    assert metrics["memory/baseline/rss_mib"] > 100
    assert {"labels/supervised_share", "tokens_per_second", "model_bytes", "train_loss"} <= metrics.keys()
    assert result.metrics.items() <= metrics.items()
    assert len(mlflow.get_metric_history(result.run_id, "train/loss")) == 3

    files = {artifact.path for artifact in mlflow.list_artifacts(result.run_id)}
    assert {"qlora_exp.yaml", "peft_config.json", "label_audit.json", "samples.json", "run.log", "evaluation"} <= files
    inputs = {entry.tags[0].value: entry.dataset for entry in found.inputs.dataset_inputs}
    assert inputs.keys() == {"training", "evaluation"}
    assert inputs["training"].digest == found.data.params["data.training_fingerprint"]
    assert "| held-out loss |" in found.data.tags["mlflow.note.content"]

    (output,) = found.outputs.model_outputs
    model = mlflow.get_logged_model(output.model_id)
    assert model.name == "llama-reasoning_gym-qlora-nf4_double-r16-s42"
    measured = {one.key: (one.value, one.dataset_digest) for one in model.metrics}
    assert measured["after/loss"] == (metrics["after/loss"], found.data.params["data.evaluation_fingerprint"])
    assert len(mlflow.get_metric_history(result.run_id, "after/loss")) == 1

    tags = mlflow.get_experiment(found.info.experiment_id).tags
    assert json.loads(tags["mlflow.sharedViewState.qlora_exp_all_runs"])["name"] == "All runs"


def test_sources_that_no_longer_hold_are_not_in_a_saved_model(run):
    result = run("method=lora")
    saved = result.output_dir / "model"
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == "random:llama"
    assert not list(saved.glob("*.bin"))
    assert str(result.output_dir) not in "".join(
        file.read_text() for file in saved.iterdir() if file.suffix in (".json", ".yaml", ".md")
    )


def test_samples_stand_side_by_side(run):
    result = run()
    answers = json.loads((result.output_dir / "evaluation" / "answers.json").read_text())
    assert [row["prompt"] for row in answers["before"]] == [row["prompt"] for row in answers["after"]]
    assert answers["after"][0]["reference"]


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["training.max_length=10"], DataError),
        (["method.target_modules=[nope]"], ConfigError),
        (["model.model_name_or_path=./gone"], UserError),
    ],
)
def test_mistakes_are_recorded_and_refused_before_weights_are_loaded(
    overrides, error, run, store, monkeypatch, tmp_path
):
    monkeypatch.setattr("qlora_exp.models.base.load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(error):
        run(*overrides)
    run_id = (tmp_path / "run0" / "run.log").read_text().split("run ", 1)[1].split()[0]
    assert client(store).get_run(run_id).info.status == "FAILED"


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["dataset.drop_matching=."], DataError),
        (["dataset=reasoning_gym", "dataset.path=reasoning_gym:nope"], DataError),
        (["device=mps"], ConfigError),
    ],
)
def test_wrong_data_and_devices_are_refused_before_there_is_a_run(overrides, error, run, tmp_path):
    with pytest.raises(error):
        run(*overrides)
    assert not (tmp_path / "run0").exists()


@pytest.mark.parametrize(
    ("words", "moment"),
    [
        (["method=lora", "lora_variant=pissa"], "evaluate"),
        (["method=full", "tracking.log_full_model=true"], "evaluate"),
        (["method=lora", "dataset.format=chat"], "table"),
    ],
)
def test_what_was_trained_outlives_a_failure_after_training(words, moment, run, store, tmp_path, monkeypatch):
    from qlora_exp.deploy.load import load
    from qlora_exp.tracking.tracker import Tracker
    from qlora_exp.training import evaluation

    def fail(*_, **__):
        raise IndexError("index out of range in self")

    words = [*words, "training.learning_rate=1e-2", "evaluation.before=false"]
    whole = run(*words)
    assert not (whole.output_dir / "first_adapter").exists()
    monkeypatch.setattr(*((evaluation, "evaluate") if moment == "evaluate" else (Tracker, "table")), fail)
    with pytest.raises(IndexError):
        run(*words, folder="failed")
    saved = tmp_path / "failed" / "model"
    contents = {file.name for file in saved.iterdir()}
    assert contents == {file.name for file in (whole.output_dir / "model").iterdir()}
    assert "what was trained is in" in (tmp_path / "failed" / "run.log").read_text()
    for one, other in zip(
        *(load(str(folder), store, device="cpu")[0].parameters() for folder in (saved, whole.output_dir / "model")),
        strict=True,
    ):
        assert one.equal(other)

    mlflow = client(store)
    run_id = (tmp_path / "failed" / "run.log").read_text().split("run ", 1)[1].split()[0]
    found = mlflow.get_run(run_id)
    assert found.info.status == "FAILED"
    assert found.data.metrics["model_bytes"] > 0
    (output,) = found.outputs.model_outputs
    assert {metric.key for metric in mlflow.get_logged_model(output.model_id).metrics or []} == {
        key for key in found.data.metrics if key.startswith("after/")
    }


def test_a_model_that_diverged_is_not_saved(run, tmp_path):
    with pytest.raises(DivergedError):
        run("method=full", "training.learning_rate=1e30", "training.max_grad_norm=0", folder="failed")
    assert not (tmp_path / "failed" / "model").exists()


@pytest.mark.parametrize("words", [["train"], ["train", "-m", "seed=1,2"]])
def test_a_launcher_of_several_processes_is_refused_before_anything_is_made(words, run, tmp_path, monkeypatch, capsys):
    for key, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(key, value)
    assert exit_code(*words, *QUICK) == 1
    assert "start it without a launcher" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="without a launcher"):
        run()
    assert not list(tmp_path.iterdir())


def test_a_killed_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(run, losses, config, store, tmp_path):
    from qlora_exp.recipe.finetune import run as start

    saving = ["training.max_steps=6", "training.save_strategy=steps", "training.save_steps=2", "method=qlora"]
    whole = run(*saving)
    words = [sys.executable, "-m", "qlora_exp", "train", *QUICK, *saving, f"tracking.uri={store}"]
    killed = f"""
import os, signal
from qlora_exp.training import trainer as training
mark = training.Watcher.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    mark(self, args, state, control, **kwargs)
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
training.Watcher.on_step_end = on_step_end
import qlora_exp
qlora_exp.train(qlora_exp.compose({words[4:]!r}), {str(tmp_path / "killed")!r})
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False, capture_output=True).returncode == -9
    resumed = start(config(*saving, f"tracking.uri={store}"), tmp_path / "killed")
    assert losses(resumed) == losses(whole)
    assert resumed.metrics["after/loss"] == whole.metrics["after/loss"]
    tokens = [
        [one["train/num_tokens"] for one in metrics(each.output_dir) if "train/num_tokens" in one]
        for each in (resumed, whole)
    ]
    assert tokens[0] == tokens[1]
    found = client(store)
    points = found.get_metric_history(resumed.run_id, "train/loss")
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
    assert found.get_run(resumed.run_id).info.status == "FINISHED"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_output_folder_is_refused_as_a_user(run, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot write to the output folder"):
        run()


def test_an_output_folder_that_cannot_be_is_refused(config, store, tmp_path):
    from qlora_exp.recipe.finetune import run

    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="hydra.run.dir=FOLDER"):
        run(config(f"tracking.uri={store}"), tmp_path / "file" / "run")


def test_a_disk_that_fills_up_fails_the_run_with_its_memory_and_its_reason(run, store, tmp_path, monkeypatch):
    from qlora_exp.tracking.journal import Journal
    from qlora_exp.tracking.tracker import Tracker

    write, append, is_full = Tracker.text, Journal.append, []

    def text(self, text: str, name: str) -> None:
        if name.startswith("evaluation/after"):
            is_full.append(True)
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, text, name)

    def journal(self, message) -> None:
        if len(is_full) and message["op"] != "metrics":  # a little space is left
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, message)

    monkeypatch.setattr(Tracker, "text", text)
    monkeypatch.setattr(Journal, "append", journal)
    with pytest.raises(OSError, match="No space left"):
        run()
    run_id = (tmp_path / "run0" / "run.log").read_text().split("run ", 1)[1].split()[0]
    found = client(store).get_run(run_id)
    assert (found.info.status, found.data.tags["outcome"]) == ("FAILED", "error")
    assert "No space left" in found.data.tags["failure"]
    assert found.data.metrics["memory/steady/rss_peak_mib"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_trains_on_the_gpu(method: str, run):
    metrics = run("device=cuda", f"method={method}", "training.learning_rate=1e-2", "training.max_steps=6").metrics
    assert metrics["after/loss"] < metrics["before/loss"]
    assert metrics["memory/steady/allocated_peak_mib"] > 0


@pytest.mark.gpu
def test_a_gpu_without_room_is_a_result(run, store, tmp_path):
    import torch

    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            run("device=cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert last_message(tmp_path / "run0")["outcome"] == "oom"
    assert run("device=cuda").metrics["after/loss"] > 0


def test_what_a_run_makes_the_model_forget_is_measured(run):
    result = run("method=full", "unrelated=python_docs", "unrelated.max_eval_rows=2", "training.learning_rate=0.01")
    metrics = result.metrics
    assert metrics["forgetting"] == metrics["after/unrelated_loss"] - metrics["before/unrelated_loss"] != 0
    lines = (result.output_dir / "evaluation" / "after_unrelated_losses.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2
    assert sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows) == metrics["after/unrelated_loss"]


def test_generation_has_a_peak_of_its_own(run):
    metrics = run("method=lora").metrics
    assert metrics["memory/generate_after/rss_peak_mib"] > 0
    assert metrics["after/generated_tokens_per_second"] > 0


def test_arithmetic_is_set_against_the_device(run):
    metrics = run("method=lora", "evaluation=loss_only").metrics
    assert metrics["mfu"] == metrics["flops_per_second"] / metrics["peak_flops_per_second"]
    assert "forgetting" not in metrics
