"""Runs that are repeated from what was recorded of them."""

from pathlib import Path

import pytest
from support import exit_code

from qlora_exp.results import bundle, reproduce
from qlora_exp.results.records import find
from qlora_exp.results.reproduce import BIT_IDENTICAL, DRIFTED, WITHIN_NOISE, find_run, judge, recorded_config, start
from qlora_exp.utils.errors import DataError, TrackingError


def again(store: str, first_run_id: str, folder, **changes):
    """The verdict on a run and its repetition with other settings."""
    record = find_run(store, first_run_id)
    given = {key.replace("__", "."): value for key, value in changes.items()}
    config = recorded_config(record, given, store)
    second = find_run(store, reproduce.start(record, config, folder))
    return judge(record, second, config)


@pytest.fixture
def first_run_id(run_quick, request):
    """The id of a finished run, alone in its experiment: whatever ran before, no other seeds of it are there."""
    alone = f"tracking.experiment_name={request.node.name}"
    return run_quick("method=lora", "evaluation=loss_only", "training.max_steps=3", alone).run_id


def test_repetition_is_bit_identical_and_stays_apart_from_its_original(first_run_id: str, mlflow_uri):
    record = find_run(mlflow_uri, first_run_id)
    config, folder = recorded_config(record, {}, mlflow_uri), reproduce.repetition_folder(record)
    assert folder == Path("outputs", "reproduced", first_run_id)
    copy_id = reproduce.start(record, config, folder)
    found = judge(record, find_run(mlflow_uri, copy_id), config)
    assert found.grade == BIT_IDENTICAL
    assert "all 3 training losses" in found.why
    (copy,) = find(mlflow_uri, where=f"tags.reproduces = '{first_run_id}'")
    assert copy.name.endswith("again")
    assert [one.run_id for one in find(mlflow_uri, [record.tags["run_key"]])] == [first_run_id]
    # of one key the newest that was asked for last
    assert [one.run_id for one in find(mlflow_uri, [copy_id, first_run_id])] == [first_run_id]
    assert reproduce.repetition_folder(record) == Path("outputs", "reproduced", f"{first_run_id}.2")


def test_changed_setting_is_named_as_the_cause_of_drift(first_run_id: str, mlflow_uri, tmp_path):
    found = again(mlflow_uri, first_run_id, tmp_path / "again", training__learning_rate=0.05)
    assert found.grade == DRIFTED
    assert "training.learning_rate 0.0002 then, 0.05 now" in found.why
    assert "train/loss at step" in found.why
    assert "no other seeds" in found.why


def test_two_seeds_are_too_few_to_judge_noise(run_quick, mlflow_uri, tmp_path):
    words = ["method=lora", "evaluation=loss_only", "training.max_steps=3", "tracking.experiment_name=two"]
    seeds = [run_quick(*words, f"seed={seed}").run_id for seed in (1, 2)]
    found = again(mlflow_uri, seeds[0], tmp_path / "again", training__learning_rate=0.00021)
    assert found.grade == DRIFTED
    assert "only 2 seeds were recorded" in found.why


def test_difference_within_the_spread_of_seeds_is_noise(recorded_run, mlflow_uri, tmp_path):
    found = again(mlflow_uri, recorded_run.run_id, tmp_path / "again", training__learning_rate=0.00021)
    assert found.grade == WITHIN_NOISE
    assert "over 3 seeds the loss varies by" in found.why


def test_check_only_names_differences_and_runs_nothing(first_run_id: str, mlflow_uri, mlflow_client, capsys):
    mlflow_client.set_tag(first_run_id, "version.torch", "1.0")
    assert exit_code("reproduce", first_run_id, "seed=7", "--uri", mlflow_uri, "--check-only") == 0
    shown = capsys.readouterr().out
    assert "differs  config: seed 42 then, 7 now" in shown
    assert "differs  torch: 1.0 then" in shown
    with pytest.raises(TrackingError, match="has no runs of"):
        find(mlflow_uri, where=f"tags.reproduces = '{first_run_id}'")


def test_bundle_contains_neither_paths_nor_training_rows(run_quick, mlflow_uri, write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken")
    rows = [{"prompt": f"question {n}?", "completion": f"TRAINING {n} hf_averysecrettoken"} for n in range(20)]
    path = write_jsonl(rows)
    heldout = write_jsonl([{"prompt": f"other {n}?", "completion": f"answer {n}"} for n in range(4)], "heldout.jsonl")
    words = ["dataset=own", f"dataset.path={path}", f"dataset.eval_path={heldout}", "method=lora"]
    result = run_quick(*words, "evaluation=loss_only", "+tracking.tags.team=ours")
    bundle.write(find_run(mlflow_uri, result.run_id), tmp_path / "it.zip")
    found = bundle.read(tmp_path / "it.zip")
    everything = "".join(found.text(name) for name in (*bundle._FILES, "run.json"))
    assert "rows.jsonl" in everything
    assert found.yaml()["dataset"]["format"] == "prompt_completion"  # what was recognized, not `auto`
    for hidden in (str(tmp_path), "TRAINING", "secrettoken", "ours"):
        assert hidden not in everything
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="no file ./rows.jsonl"):
        start(found, recorded_config(found, {}, mlflow_uri), tmp_path / "again")


@pytest.mark.parametrize("bundle_path", ["shared"], indirect=True)
def test_run_is_reproduced_from_its_bundle_without_its_store(bundle_path, make_store, tmp_path):
    found = find_run(None, str(bundle_path))
    uri = make_store("mine.db")
    config = recorded_config(found, {}, uri)
    again = find_run(uri, start(found, config, tmp_path / "again"))
    verdict = judge(found, again, config)
    assert verdict.grade == BIT_IDENTICAL
    assert again.tags["reproduces"] == found.run_id


@pytest.mark.parametrize("bundle_path", ["shared.zip"], indirect=True)
def test_drift_is_judged_by_the_seeds_in_the_bundle(bundle_path, make_store, tmp_path):
    found = bundle.read(bundle_path)
    uri = make_store("mine.db")
    config = recorded_config(found, {"training.learning_rate": 0.05}, uri)
    verdict = judge(found, find_run(uri, start(found, config, tmp_path / "again")), config)
    assert "over 3 seeds the loss varies by" in verdict.why
    assert "training.learning_rate 0.0002 then, 0.05 now" in verdict.why


def test_bundle_command_writes_what_reproduce_reads(recorded_run, mlflow_uri, tmp_path, capsys):
    assert exit_code("bundle", recorded_run.run_id, "--uri", mlflow_uri, "--out", "it.zip") == 0
    assert (tmp_path / "it.zip").is_file()
    assert "to repeat the run on any machine: qlora-exp reproduce it.zip\n" in capsys.readouterr().out
    assert exit_code("reproduce", "it.zip", "--check-only") == 0
    assert "nothing that was recorded differs" in capsys.readouterr().out
    assert not (tmp_path / "mlruns").exists()
    assert exit_code("reproduce", "other.zip", "--check-only") == 1
    assert capsys.readouterr().err == "error: other.zip: there is no such file or folder\n"
    assert exit_code("reproduce", "it.zip", "--check-only", "dataset.path=not_here.jsonl") == 0
    assert "differs  data: " in capsys.readouterr().out
    assert exit_code("reproduce", "it.zip", "dataset.path=not_here.jsonl") == 1
    assert "no file not_here.jsonl" in capsys.readouterr().err


def test_bundle_of_own_rows_says_that_they_are_needed_too(run_quick, mlflow_uri, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "{n}+1=", "completion": "{n + 1}"}}\n' for n in range(30))
    )
    words = ["dataset=own", "dataset.path=rows.jsonl", "training.max_steps=1", "evaluation=loss_only"]
    run = run_quick("method=lora", *words)
    capsys.readouterr()
    assert exit_code("bundle", run.run_id, "--uri", mlflow_uri, "--out", "it.zip") == 0
    shown = capsys.readouterr().out
    assert "qlora-exp reproduce it.zip dataset.path=FILE\n" in shown
    assert "whoever repeats the run needs a copy of rows.jsonl" in shown
