"""Runs that are tracked without training, and damaged journals."""

import json
import os

import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.values import flatten
from qlora_exp.sweeps.jobs import JOB_FILE
from qlora_exp.tracking import lifecycle
from qlora_exp.tracking.journal import FILE, Journal


def start_run(store: str, folder, *overrides: str, **kwargs):
    """Begin to track a run of the default config in a folder."""
    folder.mkdir(exist_ok=True)
    return lifecycle.start(compose([f"tracking.uri={store}", *overrides]), folder, **kwargs)


def damage(line: bytes, at: int):
    """Make a function that inserts a line into a folder's journal."""

    def write(folder) -> None:
        lines = (folder / FILE).read_bytes().splitlines(keepends=True)
        lines[at:at] = [line + b"\n"]
        (folder / FILE).write_bytes(b"".join(lines))

    return write


def leave_stale_run(store, mlflow_client, folder, **tags: str) -> str:
    """Leave a run whose process died in the middle, and give its id."""
    with pytest.raises(KeyboardInterrupt), start_run(store, folder, "tracking.experiment_name=stale") as tracked:
        tracked.metrics({"train/loss": 3.0}, 1)
        raise KeyboardInterrupt
    lines = (folder / FILE).read_text().splitlines(keepends=True)
    last = next(number for number, line in enumerate(lines) if '"op": "metrics"' in line)
    (folder / FILE).write_text("".join(lines[: last + 1]))
    mlflow_client.update_run(tracked.run_id, status="RUNNING")
    for key, value in ({"process.pid": str(2**22 + os.getpid())} | tags).items():
        mlflow_client.set_tag(tracked.run_id, key, value)
    return tracked.run_id


def end_job(job, store: str, experiment: str, metrics: dict[str, float]) -> None:
    """Record that a job of a sweep was run and ended well with these metrics."""
    tags = {"attempt": job.key, "run_key": job.key, **json.loads((job.folder / JOB_FILE).read_text())["tags"]}
    params = {"values": {key: str(value) for key, value in flatten(job.config).items()}}
    journal = Journal(job.folder)
    begin = {"uri": store, "experiment": experiment, "run_name": job.name, "timestamp": 1, "tags": tags}
    journal.append({"op": "start", **begin})
    journal.append({"op": "params", **params})
    journal.append({"op": "tags", "values": {"outcome": "ok"}})
    journal.append({"op": "metrics", "values": metrics, "step": 0, "timestamp": 2})
    end = {"status": "FINISHED", "timestamp": 2, "outcome": "ok", "seconds": 1.0}
    journal.append({"op": "end", **end, "metrics": metrics})
    journal.close()
