from pathlib import Path

import pytest

from qlora_exp.sweeps import jobs
from qlora_exp.sweeps.jobs import Job, decide, default_name, state
from qlora_exp.tracking import run_key
from qlora_exp.tracking.journal import Journal

START = {"op": "start", "experiment": "e", "uri": "sqlite:///x", "run_name": "r", "timestamp": 1, "tags": {}}
END = {"op": "end", "status": "FINISHED", "timestamp": 2, "metrics": {}}


@pytest.fixture
def make_jobs(make_config, tmp_path):
    """Make the jobs of a sweep over one key."""

    def make(key: str, values: list[str]) -> list[Job]:
        swept = [{key: value} for value in values]
        choices = [[f"{key}={value}", "method=lora"] for value in values]
        return jobs.jobs([make_config(*choice) for choice in choices], swept, choices, tmp_path / "test")

    return make


def write(folder: Path, *messages) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    for message in messages:
        journal.append(message)
    journal.close()


def test_duplicate_jobs_are_merged(make_jobs):
    assert len(make_jobs("seed", ["1", "01", "2"])) == 2


@pytest.mark.parametrize(
    ("messages", "expected", "action"),
    [
        ([], "new", "run"),
        ([START], "cut off", "resume"),
        ([START, END | {"outcome": "ok", "seconds": 1}], "ok", "skip"),
        ([START, END | {"outcome": "ok"}], "ok", "skip"),
        ([START, END | {"outcome": "pruned", "seconds": 1}], "pruned", "skip"),
        ([START, END | {"outcome": "oom", "failure": "x"}], "oom", "skip"),
        ([START, END | {"outcome": "killed", "failure": "x"}], "cut off", "resume"),
        ([START, END | {"outcome": "killed"}, {"op": "resume", "tags": {}}], "cut off", "resume"),
        ([START, {"op": 3}], "damaged", "rerun"),
        ([START, {"op": 3}, {"op": "resume", "tags": {}}], "damaged", "rerun"),
        ([START, {"op": "end", "status": "FINISHED"}], "damaged", "rerun"),
    ],
)
def test_journal_determines_the_action(messages, expected: str, action: str, make_jobs):
    (job,) = make_jobs("seed", ["1"])
    job.folder.mkdir(parents=True)
    journal = Journal(job.folder)
    for message in messages:
        journal.append(message)
    assert decide(job, "none") == ("skip", "another process is running it")
    journal.close()
    assert state(job.folder)[0] == expected
    assert decide(job, "none")[0] == action


def test_resumed_job_names_its_step(make_jobs):
    (job,) = make_jobs("seed", ["1"])
    for step, whole in ((2, True), (10, True), (12, False), ("10.bak", True)):
        folder = job.folder / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "trainer_state.json").write_text("{}")
    journal = Journal(job.folder)
    journal.append(START)
    journal.close()
    assert decide(job, "none") == ("resume", "was interrupted; resumes from step 10")


def test_job_folder_and_name_show_swept_keys(make_jobs):
    first, _ = make_jobs("method.r", ["4", "8"])
    assert first.name == "method.r=4"
    assert first.folder.name == f"r-4_{first.key}"
    assert default_name(["method.r"], ["method.r=4,8"]).startswith("r_")
    assert len(default_name(["training.per_device_train_batch_size"] * 16, ["a=1"]).encode()) < 255
    (chinese,) = make_jobs("dataset.name", ["数" * 95])
    assert len(chinese.folder.name.encode()) < 255
    assert default_name([], ["a=1"]) == default_name([], ["a=1", "sweep.n_jobs=2", "tracking.uri=x"])


def test_changed_job_says_what_changed(make_jobs, monkeypatch):
    (job,) = make_jobs("seed", ["1"])
    parts = {f"identity.{part}": digest for part, digest in run_key.digests(job.config).items()}
    write(job.folder, START | {"tags": parts})
    monkeypatch.setattr("qlora_exp.tracking.run_key.code_digest", lambda: "edited")
    (again,) = make_jobs("seed", ["1"])
    assert again.folder != job.folder
    assert decide(again, "none") == ("run", "new: not the same code as in the previous run")
