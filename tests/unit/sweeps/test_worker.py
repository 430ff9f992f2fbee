"""One job of a sweep: whatever ends it is recorded, and only an interrupt leaves its process."""

import json

import pytest

from qlora_exp.sweeps.jobs import JOB_FILE, stopped
from qlora_exp.sweeps.worker import run_job
from qlora_exp.tracking import run_key
from qlora_exp.tracking.journal import last_message
from qlora_exp.utils.errors import PrunedError


@pytest.fixture
def start_job(make_config, mlflow_uri, tmp_path, monkeypatch):
    """Start a job whose run raises the given error; gives its folder."""

    def start(error: BaseException | None = None, fail_fast: bool = False, words: tuple[str, ...] = (), **parts: str):
        def run(*_, **__):
            if error:
                raise error
            pytest.fail("the run was started")

        monkeypatch.setattr("qlora_exp.recipe.finetune.run", run)
        where = [f"tracking.uri={mlflow_uri}", "tracking.experiment_name=worker"]
        config = make_config("method=lora", *where, *words)
        folder = tmp_path / "sweep" / "job"
        folder.mkdir(parents=True, exist_ok=True)
        job = {"fail_fast": fail_fast, "parts": run_key.digests(config) | parts, "time_limit": None, "tags": {}}
        (folder / JOB_FILE).write_text(json.dumps(job | {"pruning": None}))
        run_job(config, folder)
        return folder

    return start


def test_error_before_the_run_begins_is_recorded_as_a_failed_run(start_job):
    last = last_message(start_job(ValueError("boom")))
    assert (last["op"], last["outcome"]) == ("end", "error")
    assert "boom" in last["failure"]


def test_error_of_a_further_process_of_a_job_is_left_to_the_main_one(start_job, monkeypatch, caplog):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    words = ("distributed=ddp", "distributed.num_processes=2")
    assert last_message(start_job(ValueError("boom"), words=words)) is None
    assert "ValueError: boom" in caplog.text


def test_error_that_cannot_be_recorded_raises_nothing(start_job, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_exp.tracking.lifecycle.record_failure", full)
    start_job(ValueError("boom"))
    assert "it cannot be recorded: [Errno 28]" in caplog.text


def test_job_whose_data_changed_since_the_sweep_began_is_rejected(start_job):
    assert "not the same data any more" in last_message(start_job(data="edited"))["failure"]


def test_pruned_job_raises_nothing(start_job):
    assert last_message(start_job(PrunedError("worse"))) is None  # the run itself records that


def test_interrupted_job_exits_with_130(start_job):
    with pytest.raises(SystemExit) as end:
        start_job(KeyboardInterrupt())
    assert end.value.code == 130


def test_with_fail_fast_a_failure_stops_the_jobs_that_follow(start_job):
    folder = start_job(ValueError("boom"), fail_fast=True)
    assert stopped(folder.parent)
    start_job(None, fail_fast=True)  # does not start a run
