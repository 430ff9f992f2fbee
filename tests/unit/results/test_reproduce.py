import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qlora_exp.config import untrusted
from qlora_exp.config.hydra_compose import compose
from qlora_exp.results import reproduce
from qlora_exp.results.records import find
from qlora_exp.results.reproduce import BIT_IDENTICAL, DRIFTED, WITHIN_NOISE, judge, one_record, recorded_config
from qlora_exp.tracking.mlflow_store import client
from qlora_exp.utils.errors import ConfigError, TrackingError


def again(store: str, first: str, folder, **changes):
    """The verdict on a run and its repetition with other settings."""
    record = one_record(store, first)
    given = {key.replace("__", "."): value for key, value in changes.items()}
    config = recorded_config(record, given, store)
    second = one_record(store, reproduce.start(record, config, folder))
    return judge(record, second, config)


@pytest.fixture
def first(run, request):
    """The id of a finished run, alone in its experiment: whatever ran before, no other seeds of it are there."""
    alone = f"tracking.experiment_name={request.node.name}"
    return run("method=lora", "evaluation=loss_only", "training.max_steps=3", alone).run_id


def test_the_same_is_bit_identical(first: str, store, tmp_path):
    found = again(store, first, tmp_path / "again")
    assert found.grade == BIT_IDENTICAL
    assert "all 3 training losses" in found.why
    (copy,) = find(store, where=f"tags.reproduces = '{first}'")
    assert copy.name.endswith("again")


def test_a_repetition_stands_for_no_run_but_itself(first: str, store, tmp_path):
    record = one_record(store, first)
    copy = reproduce.start(record, recorded_config(record, {}, store), tmp_path / "again")
    assert [one.run_id for one in find(store, [record.tags["run_key"]])] == [first]
    assert [one.run_id for one in find(store, [copy, first])] == [
        first
    ]  # of one key the newest that was asked for last


def test_a_repetition_has_a_folder_of_its_own(first: str, store, tmp_path):
    record = one_record(store, first)
    assert reproduce.free_folder(record) == Path("outputs", "reproduced", first)
    reproduce.start(record, recorded_config(record, {}, store), reproduce.free_folder(record))
    assert reproduce.free_folder(record) == Path("outputs", "reproduced", f"{first}.2")


def test_a_changed_setting_is_the_cause_of_a_drift(first: str, store, tmp_path):
    found = again(store, first, tmp_path / "again", training__learning_rate=0.05)
    assert found.grade == DRIFTED
    assert "training.learning_rate 0.0002 then, 0.05 now" in found.why
    assert "train/loss at step" in found.why
    assert "no other seeds" in found.why


def test_two_seeds_are_too_few_to_call_anything_noise(run, store, tmp_path):
    words = ["method=lora", "evaluation=loss_only", "training.max_steps=3", "tracking.experiment_name=two"]
    seeds = [run(*words, f"seed={seed}").run_id for seed in (1, 2)]
    found = again(store, seeds[0], tmp_path / "again", training__learning_rate=0.00021)
    assert found.grade == DRIFTED
    assert "only 2 seeds were recorded" in found.why


def test_a_difference_within_what_seeds_do_is_noise(run, store, tmp_path):
    words = ["method=lora", "evaluation=loss_only", "training.max_steps=3", "training.learning_rate=0.01"]
    words.append("tracking.experiment_name=noise")
    seeds = [run(*words, f"seed={seed}").run_id for seed in (1, 2, 3)]
    found = again(store, seeds[0], tmp_path / "again", training__learning_rate=0.01001)
    assert found.grade == WITHIN_NOISE
    assert "over 3 seeds it varies by" in found.why


def recorded(mlflow, text: str) -> str:
    """A run that somebody else wrote."""
    experiment = mlflow.get_experiment_by_name("others")
    experiment_id = experiment.experiment_id if experiment else mlflow.create_experiment("others")
    run_id = mlflow.create_run(experiment_id, tags={"run_key": "e" * 16, "outcome": "ok"}).info.run_id
    mlflow.log_metric(run_id, "after/loss", 4.0)
    if text:
        mlflow.log_text(run_id, text, "qlora_exp.yaml")
    return run_id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"trust_remote_code": True}}, "model.trust_remote_code=true"),
        ({"evaluation": {"lm_eval_include_path": "tasks"}}, "evaluation.lm_eval_include_path=tasks"),
        ({"evaluation": {"lm_eval_tasks": ["one", "two"]}}, r"evaluation.lm_eval_tasks=\[one,two\]"),
        (
            {"dataset": {"path": "reasoning_gym:string_insertion"}},
            "run what a model answers; .* dataset.path=reasoning_gym:string_insertion",
        ),
        ({"dataset": {"eval_path": "reasoning_gym:n_queens"}}, "dataset.eval_path=reasoning_gym:n_queens"),
        ({"unrelated": {"path": "reasoning_gym:countdown"}}, "unrelated.path=reasoning_gym:countdown"),
        ({"unrelated": {"eval_path": "reasoning_gym:countdown"}}, "unrelated.eval_path=reasoning_gym:countdown"),
        ({"dataset": {"path": "/etc/passwd"}}, "dataset.path=PATH"),
        ({"dataset": {"path": "../rows.jsonl"}}, "outside of this folder"),
        ({"dataset": {"eval_path": "~/.ssh/id_rsa"}}, "outside of this folder"),
        ({"model": {"model_name_or_path": "/srv/model"}}, "model.model_name_or_path=PATH"),
        ({"method": {"_target_": "os.system"}}, "_target_"),
        ({"_target_": "os.system"}, "_target_"),
        ({"model": {"model_name_or_path": {"a": 1}}}, "model.model_name_or_path"),
    ],
)
def test_a_record_may_not_run_code_nor_choose_files(changes: dict, message: str, store):
    values = compose(["method=lora"]).model_dump(mode="json")
    for section, new in changes.items():
        values[section] = values[section] | new if isinstance(new, dict) else new
    record = one_record(store, recorded(client(store), yaml.safe_dump(values)))
    with pytest.raises(ConfigError, match=message):
        recorded_config(record, {}, store)


def test_what_the_user_says_is_allowed(store, tmp_path):
    rows = tmp_path / "other" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    values = compose(["method=lora", "dataset=own", "dataset.path=rows.jsonl"]).model_dump(mode="json")
    values["dataset"]["path"] = "/home/author/rows.jsonl"
    values["tracking"]["uri"] = "http://evil.example"
    record = one_record(store, recorded(client(store), yaml.safe_dump(values)))
    config = recorded_config(record, {"dataset.path": str(rows)}, store)
    assert config.dataset.path == str(rows)
    assert config.tracking.uri == store


def test_a_task_that_the_user_says_too_is_allowed(store):
    said = {"dataset.path": "reasoning_gym:string_insertion", "evaluation.lm_eval_tasks": ["one"]}
    words = ["method=lora", "dataset=reasoning_gym", *(f"{key}={value}" for key, value in said.items())]
    record = one_record(store, recorded(client(store), yaml.safe_dump(compose(words).model_dump(mode="json"))))
    assert recorded_config(record, said, store).dataset.path == said["dataset.path"]


@pytest.mark.parametrize(
    "text",
    ["", "just text", "!!python/object/apply:os.system ['touch pwned']", "[1, 2", "a: &x [*x]", "model: 3"],
)
def test_a_broken_record_is_refused_with_a_message(text: str, store, tmp_path):
    run_id = recorded(client(store), text)
    words = [sys.executable, "-m", "qlora_exp", "reproduce", run_id, "--uri", store, "--check-only"]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert not (tmp_path / "pwned").exists()


def test_the_check_names_what_differs_and_runs_nothing(first: str, store, tmp_path):
    mlflow = client(store)
    mlflow.set_tag(first, "version.torch", "1.0")
    words = [sys.executable, "-m", "qlora_exp", "reproduce", first, "seed=7", "--uri", store, "--check-only"]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "differs  config: seed 42 then, 7 now" in result.stdout
    assert "differs  torch: 1.0 then" in result.stdout
    with pytest.raises(TrackingError, match="has no runs of"):
        find(store, where=f"tags.reproduces = '{first}'")


def test_several_runs_are_not_one(run, store):
    with pytest.raises(TrackingError, match="no runs of"):
        one_record(store, "0123456789abcdef")
    with pytest.raises(ConfigError, match="no key=value"):
        untrusted.given(["seed"])
