import errno
import json
import os

import pytest
import yaml
from helpers.tracking import leave_stale_run
from support import QUICK, exit_code

from qlora_exp.config.validate import from_dict
from qlora_exp.config.values import APART, flatten
from qlora_exp.environment import efficiency
from qlora_exp.tracking import journal
from qlora_exp.tracking.journal import FILE, Journal
from qlora_exp.tracking.mlflow_store import client
from qlora_exp.training.trainer import Trainer
from qlora_exp.utils.errors import ConfigError, DataError, DivergedError, UserError


@pytest.mark.parametrize(  # what is quantized and adapted depends on the family, what `full` trains does not
    ("method", "family"),
    [
        ("full", "opt"),
        ("qlora", "qwen2"),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in [("lora", "llama"), ("qlora", "llama")]),
        pytest.param("qlora", "opt", marks=pytest.mark.thorough),
    ],
)
def test_every_method_trains_every_family(method: str, family: str, run_quick):
    metrics = run_quick(
        f"model=tiny_{family}", f"method={method}", "training.learning_rate=1e-2", "training.max_steps=6"
    ).metrics
    assert metrics["after/loss"] < metrics["before/loss"]
    assert (metrics["trainable_share"] == 1.0) == (method == "full")


@pytest.mark.parametrize(  # DoRA dequantizes weights, once for 4 bits and once for 8; most tests run on nf4_double
    ("quantization", "variant"),
    [
        ("nf4", "dora_rslora"),
        ("fp4_double", "lora"),
        ("int8", "dora_rslora"),
        *(pytest.param(name, "lora", marks=pytest.mark.thorough) for name in ("fp4", "int8")),
    ],
)
def test_every_quantization_trains_with_every_variant(quantization: str, variant: str, run_quick):
    run_quick(f"quantization={quantization}", f"lora_variant={variant}", "training.max_steps=1", "evaluation=loss_only")


def test_run_is_recorded_in_mlflow(run_quick, mlflow_uri):
    result = run_quick("training.eval_strategy=steps", "training.eval_steps=2", "dataset=reasoning_gym")
    mlflow = client(mlflow_uri)
    found = mlflow.get_run(result.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["outcome"] == "ok"
    assert {"version.torch", "hardware.cores", "process.pid", "mlflow.source.name"} <= found.data.tags.keys()

    config = flatten(from_dict(yaml.safe_load((result.output_dir / "qlora_exp.yaml").read_text())))
    expected = {key: value for key, value in config.items() if key.split(".")[0] not in APART and value is not None}
    assert expected.keys() <= found.data.params.keys()
    rows = f"{config['dataset.name']}: {found.data.params['data.training_rows']} training rows in an epoch, "
    assert (
        f"{rows}{found.data.params['data.evaluation_rows']} held-out rows"
        in (result.output_dir / "run.log").read_text()
    )
    assert found.data.params["resolved.optim"] == "adamw_torch"
    assert found.data.params["resolved.optim_fallback"]
    assert found.data.params["resolved.places"] == "cpu"

    metrics = found.data.metrics
    for name in ("loss", "perplexity", "rougeL", "exact_match", "task_score", "token_seconds_p50"):
        assert {f"before/{name}", f"after/{name}"} <= metrics.keys()
    for phase in ("load", "evaluate_before", "first_step", "steady", "evaluation", "evaluate_after", "save"):
        assert metrics[f"memory/{phase}/rss_peak_mib"] > 100
    assert metrics["memory/baseline/rss_mib"] > 100
    assert {
        "labels/supervised_share",
        "tokens_per_second",
        "model_bytes",
        "train_loss",
        "final_train_loss",
        "run_seconds",
    } <= metrics.keys()
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


def test_saved_model_names_no_temporary_paths(shared_run):
    result = shared_run("method=lora")
    saved = result.output_dir / "model"
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == "random:llama"
    assert not list(saved.glob("*.bin"))
    assert str(result.output_dir) not in "".join(
        file.read_text() for file in saved.iterdir() if file.suffix in (".json", ".yaml", ".md")
    )


def test_sampled_answers_before_and_after_share_their_prompts(shared_run):
    result = shared_run("method=qlora")
    answers = json.loads((result.output_dir / "evaluation" / "answers.json").read_text())
    assert [row["prompt"] for row in answers["before"]] == [row["prompt"] for row in answers["after"]]
    assert answers["after"][0]["reference"]


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["dataset.drop_matching=."], DataError),
        (["dataset=reasoning_gym", "dataset.path=reasoning_gym:nope"], DataError),
        (["device=mps"], ConfigError),
        (["training.max_length=10"], DataError),
        (["method.target_modules=[nope]"], ConfigError),
        (["model.model_name_or_path=./gone"], UserError),
    ],
)
def test_invalid_data_device_or_model_is_rejected_before_a_run_exists(overrides, error, run_quick, tmp_path):
    with pytest.raises(error):
        run_quick(*overrides)
    assert not (tmp_path / "run0").exists()


@pytest.mark.parametrize(
    ("words", "moment"),
    [
        pytest.param(["method=lora", "lora_variant=pissa"], "evaluate", marks=pytest.mark.thorough),
        (["method=full", "tracking.log_full_model=true"], "evaluate"),
        (["method=lora", "dataset.format=chat"], "table"),
    ],
)
def test_trained_model_is_kept_when_a_later_step_fails(words, moment, run_quick, mlflow_uri, tmp_path, monkeypatch):
    from qlora_exp.deploy.load import load
    from qlora_exp.tracking.tracker import Tracker
    from qlora_exp.training import evaluation

    def fail(*_, **__):
        raise IndexError("index out of range in self")

    words = [*words, "training.learning_rate=1e-2", "evaluation.before=false"]
    whole = run_quick(*words)
    assert not (whole.output_dir / "first_adapter").exists()
    monkeypatch.setattr(*((evaluation, "evaluate") if moment == "evaluate" else (Tracker, "table")), fail)
    with pytest.raises(IndexError):
        run_quick(*words, folder="failed")
    saved = tmp_path / "failed" / "model"
    contents = {file.name for file in saved.iterdir()}
    assert contents == {file.name for file in (whole.output_dir / "model").iterdir()}
    assert "the trained model is in" in (tmp_path / "failed" / "run.log").read_text()
    for one, other in zip(
        *(
            load(str(folder), mlflow_uri, device="cpu")[0].parameters()
            for folder in (saved, whole.output_dir / "model")
        ),
        strict=True,
    ):
        assert one.equal(other)

    mlflow = client(mlflow_uri)
    run_id = (tmp_path / "failed" / "run.log").read_text().split("run ", 1)[1].split()[0]
    found = mlflow.get_run(run_id)
    assert found.info.status == "FAILED"
    assert found.data.metrics["model_bytes"] > 0
    (output,) = found.outputs.model_outputs
    assert {metric.key for metric in mlflow.get_logged_model(output.model_id).metrics or []} == {
        key for key in found.data.metrics if key.startswith("after/")
    }


def test_diverged_model_is_not_saved(run_quick, tmp_path):
    with pytest.raises(DivergedError):
        run_quick("method=full", "training.learning_rate=1e30", "training.max_grad_norm=0", folder="failed")
    assert not (tmp_path / "failed" / "model").exists()


def test_model_that_diverged_in_its_last_step_is_not_ok(run_quick, tmp_path):
    with pytest.raises(DivergedError, match="the held-out loss after training is nan"):
        run_quick("method=lora", "training.learning_rate=1e30", "training.max_steps=1", "training.warmup_steps=0",
                  "evaluation=loss_only", folder="failed")  # fmt: skip
    last = journal.last_message(tmp_path / "failed")
    assert last["outcome"] == "nan"
    assert "after/loss" not in last["metrics"]


@pytest.mark.parametrize("words", [["train"], ["train", "-m", "seed=1,2"]])
def test_multi_process_launcher_is_rejected_before_anything_is_written(words, run_quick, tmp_path, monkeypatch, capsys):
    for key, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(key, value)
    assert exit_code(*words, *QUICK) == 1
    assert "without a launcher" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="without a launcher"):
        run_quick()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_output_folder_is_rejected(run_quick, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot write to the output folder"):
        run_quick()


def test_impossible_output_folder_is_rejected(make_config, mlflow_uri, tmp_path):
    from qlora_exp.recipe.finetune import run

    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="hydra.run.dir=FOLDER"):
        run(make_config(f"tracking.uri={mlflow_uri}"), tmp_path / "file" / "run")


def test_full_disk_fails_the_run_and_its_reason_is_recorded(run_quick, mlflow_uri, tmp_path, monkeypatch):
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
        run_quick()
    run_id = (tmp_path / "run0" / "run.log").read_text().split("run ", 1)[1].split()[0]
    found = client(mlflow_uri).get_run(run_id)
    assert (found.info.status, found.data.tags["outcome"]) == ("FAILED", "error")
    assert "No space left" in found.data.tags["failure"]
    assert found.data.metrics["memory/steady/rss_peak_mib"] > 0


def test_forgetting_is_measured_on_unrelated_text(run_quick):
    result = run_quick(
        "method=full", "unrelated=python_docs", "unrelated.max_eval_rows=2", "training.learning_rate=0.01"
    )
    metrics = result.metrics
    assert metrics["forgetting"] == metrics["after/unrelated_loss"] - metrics["before/unrelated_loss"] != 0
    lines = (result.output_dir / "evaluation" / "after_unrelated_losses.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2
    assert sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows) == metrics["after/unrelated_loss"]


def test_peak_memory_of_generation_is_measured(shared_run):
    metrics = shared_run("method=lora").metrics
    assert metrics["memory/generate_after/rss_peak_mib"] > 0
    assert metrics["after/generated_tokens_per_second"] > 0


def test_mfu_is_what_all_steps_computed_relative_to_the_peak_of_the_device(run_quick, monkeypatch):
    every: list[tuple[float, int, int]] = []
    step = Trainer.training_step

    def count_every(self, *arguments, **more):
        chosen, self.counts_flops = self.counts_flops, True
        loss = step(self, *arguments, **more)
        every.append(self.counted[-1])
        if not chosen:
            self.counted.pop()
        self.counts_flops = chosen
        return loss

    monkeypatch.setattr(Trainer, "training_step", count_every)
    words = ["dataset.max_train_rows=80", "training.max_steps=20", "training.per_device_train_batch_size=4"]
    result = run_quick("method=lora", "evaluation=loss_only", *words)
    metrics = result.metrics
    assert metrics["mfu"] == metrics["flops_per_second"] / metrics["peak_flops_per_second"]
    assert "forgetting" not in metrics
    timed = [number for number in range(20) if number + 1 not in (1, 4, 8, 16)]
    seconds = [
        line["train/step_seconds"] for line in journal.metrics(result.output_dir) if "train/step_seconds" in line
    ]
    assert metrics["step_seconds_mean"] == pytest.approx(sum(seconds[step] for step in timed) / len(timed))
    counted = sum(every[step][0] for step in timed)
    off = abs(metrics["flops_per_second"] * sum(seconds[step] for step in timed) / counted - 1)
    first = abs(every[0][0] / every[0][1] * sum(every[step][1] for step in timed) / counted - 1)
    assert off < 0.04 < first  # the first batch alone is not like the others


def test_leaks_and_rows_left_out_are_counted_and_logged(run_quick, write_jsonl, caplog):
    rows = [{"prompt": f"q {number}", "completion": "a"} for number in range(8)]
    rows += [{"prompt": "q 9", "completion": "a" * 2000}, {"prompt": "q 5", "completion": "a"}, {"prompt": "q 8"}]
    path = write_jsonl(rows, "train.jsonl")
    heldout = [{"prompt": "Q 3", "completion": "b"}, {"prompt": "long" * 600, "completion": "b"}]
    eval_path = write_jsonl(heldout, "heldout.jsonl")
    words = [f"dataset.path={path}", f"dataset.eval_path={eval_path}", "dataset.input_column=null"]
    words += ["dataset.prompt_column=prompt", "dataset.completion_column=completion", "evaluation=loss_only"]
    result = run_quick("method=lora", *words)
    assert result.metrics["leaks/exact"] == 1
    assert "1 training rows have the question of a held-out row" in caplog.text
    assert json.loads((result.output_dir / "leaks.json").read_text())[0]["kind"] == "exact"
    assert "1 of 13 rows (8%) left out: duplicates (such as line 10; dataset.drop_duplicates=false" in caplog.text
    assert "1 of 13 rows (8%) left out: without the columns (such as line 11, which has prompt" in caplog.text
    assert "1 held-out rows have no answer token within training.max_length" in caplog.text
    audit = json.loads((result.output_dir / "label_audit.json").read_text())
    assert audit["left_out"]["duplicates"] == 1
    assert audit["left_out_examples"]["duplicates"] == "line 10"


def test_uncountable_arithmetic_does_not_stop_training(monkeypatch, run_quick, caplog):
    def fail(*_: object, **__: object) -> int:
        raise AssertionError("shapes are incompatible")

    monkeypatch.setitem(efficiency._FORMULAS, "aten.mm", fail)
    metrics = run_quick("method=lora", "evaluation=loss_only").metrics
    assert "tokens_per_second" in metrics
    assert not {"flops_per_second", "mfu"} & metrics.keys()
    assert caplog.text.count("arithmetic is not counted: torch's formula for aten.mm.default") == 1


def test_recomputation_counts_as_arithmetic(shared_run, run_quick):
    plain = shared_run("method=lora", "evaluation=loss_only")
    recomputed = run_quick("method=lora", "evaluation=loss_only", "training.gradient_checkpointing=true")
    per_token = [
        result.metrics["flops_per_second"] / result.metrics["tokens_per_second"] for result in (plain, recomputed)
    ]
    assert 1.2 < per_token[1] / per_token[0] < 1.6  # a third forward to a forward and a backward


def test_four_bit_weights_count_as_full_parameters(shared_run):
    lora, qlora = shared_run("method=lora"), shared_run("method=qlora")
    for name in ("trainable_parameters", "total_parameters"):
        assert lora.metrics[name] == qlora.metrics[name]


def test_run_starts_in_a_store_with_a_damaged_run(run_quick, mlflow_uri, mlflow_client, tmp_path):
    died = leave_stale_run(mlflow_uri, mlflow_client, tmp_path / "died")
    (tmp_path / "died" / FILE).write_text('{"op": "file", "path": "traceback.txt"}\n')
    done = run_quick("tracking.experiment_name=stale", "method=lora")
    assert mlflow_client.get_run(done.run_id).info.status == "FINISHED"
    assert mlflow_client.get_run(died).info.status == "KILLED"


def test_config_that_was_made_by_hand_is_checked_before_it_runs(make_config, tmp_path):
    from qlora_exp.recipe.finetune import run

    config = make_config("method=qlora")
    unquantized = config.model_copy(update={"quantization": make_config("method=lora").quantization})
    with pytest.raises(ConfigError, match="needs a quantized base"):
        run(unquantized, tmp_path / "run")
    assert not (tmp_path / "run").exists()
