import json
import os
import re
import shutil
import signal
import time
from unittest.mock import Mock

import pytest
import torch
from helpers.tracking import damage, leave_stale_run, start_run
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.validate import from_dict
from qlora_exp.tracking import delivery, lifecycle, mlflow_store, recovery, tracker
from qlora_exp.tracking.journal import FILE, Journal, is_delivered, metrics
from qlora_exp.tracking.mlflow_store import client
from qlora_exp.tracking.stores import artifacts
from qlora_exp.utils.errors import ConfigError, JournalError, TrackingError
from qlora_exp.utils.processes.signals import handle_signals


def test_successful_run_is_finished(mlflow_uri, mlflow_client, tmp_path):
    with start_run(mlflow_uri, tmp_path, "+tracking.tags.team=a") as tracked:
        tracked.metrics({"loss": 1.0}, 3)
    run = mlflow_client.get_run(tracked.run_id)
    assert (run.info.status, run.data.tags["outcome"], run.data.tags["team"]) == ("FINISHED", "ok", "a")
    assert run.data.metrics == {"loss": 1.0}
    assert run.data.params["method.r"] == "16"
    assert [(one["step"], one["loss"]) for one in metrics(tmp_path)] == [(3, 1.0)]


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        (ValueError("boom"), "FAILED", "error"),
        (MemoryError(), "FAILED", "oom"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "FAILED", "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "FAILED", "oom"),
        (KeyboardInterrupt(), "KILLED", "killed"),
        (SystemExit(3), "KILLED", "killed"),
    ],
)
def test_failed_run_records_its_outcome(
    error: BaseException, status: str, outcome: str, mlflow_uri, mlflow_client, tmp_path
):
    with pytest.raises(type(error)), start_run(mlflow_uri, tmp_path) as tracked:
        tracked.metrics({"loss": 1.0}, 1)
        raise error
    run = mlflow_client.get_run(tracked.run_id)
    assert (run.info.status, run.data.tags["outcome"]) == (status, outcome)
    assert type(error).__name__ in run.data.tags["failure"]
    assert run.data.metrics == {"loss": 1.0}
    assert "traceback.txt" in [artifact.path for artifact in mlflow_client.list_artifacts(tracked.run_id)]


def test_no_secret_reaches_mlflow_or_the_disk(mlflow_uri, mlflow_client, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken")
    with (
        pytest.raises(ValueError, match="hf_"),
        start_run(mlflow_uri, tmp_path, "+tracking.tags.note=hf_averysecrettoken") as tracked,
    ):
        tracked.params({"note": "hf_averysecrettoken", "uri": "https://me:pass@host/x"})
        raise ValueError("token hf_averysecrettoken refused")
    data = mlflow_client.get_run(tracked.run_id).data
    assert data.params["uri"] == "https://***@host/x"
    everything = str(data.to_dictionary()) + "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert "averysecret" not in everything


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/nowhere/mlflow.db", "nonsense://x"])
def test_unreachable_store_is_reported_quickly(uri: str, tmp_path):
    begin = time.monotonic()
    with pytest.raises(TrackingError, match="does not answer or cannot be written"), start_run(uri, tmp_path):
        pass
    assert time.monotonic() - begin < 30
    assert not list(tmp_path.iterdir())


def test_deleted_experiment_is_reported(mlflow_uri, mlflow_client, tmp_path):
    mlflow_client.delete_experiment(mlflow_client.create_experiment("gone"))
    with (
        pytest.raises(TrackingError, match="was deleted"),
        start_run(mlflow_uri, tmp_path, "tracking.experiment_name=gone"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_message_rejected_by_mlflow_does_not_block_others(mlflow_uri, mlflow_client, tmp_path, caplog):
    values = compose([f"tracking.uri={mlflow_uri}"]).model_dump(mode="json")
    values["method"]["rank_pattern"] = {"layers.0.*q_proj": 4}
    with lifecycle.start(from_dict(values), tmp_path) as tracked:
        tracked.params({"what(is)this": 1})
        tracked.metrics({"loss": 1.0}, 1)
    found = mlflow_client.get_run(tracked.run_id)
    assert (found.info.status, found.data.metrics["loss"]) == ("FINISHED", 1.0)
    assert "layers.0.*q_proj" in found.data.params["method.rank_pattern"]
    assert "MLflow does not get param what(is)this" in caplog.text


class Unsteady:
    """A client whose server is away for a while."""

    def __init__(self, mlflow_client: MlflowClient) -> None:
        self.away = False
        self._mlflow = mlflow_client

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            if self.away:
                raise MlflowException("connection refused")
            return getattr(self._mlflow, name)(*args, **kwargs)

        return call


def test_temporary_server_outage_loses_nothing(mlflow_uri, mlflow_client, tmp_path, monkeypatch):
    unsteady = Unsteady(mlflow_client)
    monkeypatch.setattr(tracker, "client", lambda uri: unsteady)
    with start_run(mlflow_uri, tmp_path) as tracked:
        tracked.metrics({"loss": 1.0}, 1)
        unsteady.away = True
        tracked.metrics({"loss": 2.0}, 2)
        tracked.metrics({"loss": 3.0}, 3)
        unsteady.away = False
    history = mlflow_client.get_metric_history(tracked.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert mlflow_client.get_run(tracked.run_id).info.status == "FINISHED"


def test_permanent_server_outage_keeps_everything_on_disk(mlflow_uri, mlflow_client, tmp_path, monkeypatch, caplog):
    unsteady = Unsteady(mlflow_client)
    monkeypatch.setattr(tracker, "client", lambda uri: unsteady)
    with start_run(mlflow_uri, tmp_path) as tracked:
        unsteady.away = True
        tracked.metrics({"loss": 2.0}, 2)
    assert "did not receive everything" in caplog.text
    assert metrics(tmp_path)[-1]["loss"] == 2.0
    assert mlflow_client.get_run(tracked.run_id).info.status == "RUNNING"
    assert recovery.finish(tmp_path, "killed", "not used: the run ended by itself", mlflow_uri) == [
        "connection refused"
    ]
    unsteady.away = False
    assert recovery.finish(tmp_path, "killed", "not used: the run ended by itself", mlflow_uri) == []
    run = mlflow_client.get_run(tracked.run_id)
    assert (run.info.status, run.data.metrics, run.data.tags["outcome"]) == ("FINISHED", {"loss": 2.0}, "ok")


def test_run_started_during_an_outage_is_sent_later(mlflow_uri, mlflow_client, tmp_path, monkeypatch):
    unsteady = Unsteady(mlflow_client)
    unsteady.away = True
    monkeypatch.setattr(tracker, "client", lambda uri: unsteady)
    with pytest.raises(TrackingError, match="connection refused"), start_run(mlflow_uri, tmp_path):
        pass
    with start_run(mlflow_uri, tmp_path, must_reach=False) as tracked:
        assert tracked.run_id is None
        tracked.metrics({"loss": 2.0}, 1)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "adapter_config.json").write_text("{}")
        tracked.model("model", "lora-model", {"r": 4}, 1)
        tracked.table({"a": [1, 2]}, "table.json")
        unsteady.away = False
    run = mlflow_client.get_run(tracked.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 2.0})
    assert len(run.outputs.model_outputs) == 1


def test_sending_everything_again_changes_nothing(mlflow_uri, mlflow_client, tmp_path):
    """As after a kill between telling and noting that it was told."""
    with start_run(mlflow_uri, tmp_path) as tracked:
        tracked.metrics({"loss": 2.0, "other": 1.0}, 1)
        tracked.dataset("rows", "abc", "here", "training", 3)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        tracked.model("model", "m", {}, 1)
    before = mlflow_client.get_run(tracked.run_id).to_dictionary()
    journal = Journal(tmp_path)
    journal.use(mlflow_uri)
    journal.state.pop("run_id")
    journal.save_state(offset=0)
    journal.close()
    assert recovery.finish(tmp_path, "killed", "not used") == []
    assert mlflow_client.get_run(tracked.run_id).to_dictionary() == before
    assert len(mlflow_client.get_metric_history(tracked.run_id, "loss")) == 1
    assert (
        len(
            mlflow_client.search_runs(
                ["0", *[one.experiment_id for one in mlflow_client.search_experiments()]],
                f"tags.attempt = '{before['data']['tags']['attempt']}'",
            )
        )
        == 1
    )


def test_interrupted_run_resumes_as_the_same_run(mlflow_uri, mlflow_client, tmp_path):
    with pytest.raises(KeyboardInterrupt), start_run(mlflow_uri, tmp_path) as first:
        first.metrics({"train/loss": 3.0}, 1)
        first.metrics({"train/loss": 2.0}, 2)
        raise KeyboardInterrupt
    with start_run(mlflow_uri, tmp_path) as second:
        assert second.resumed
        assert mlflow_client.get_run(second.run_id).info.status == "RUNNING"
        second.metrics({"train/loss": 2.5}, 2)  # computed again
        second.metrics({"train/loss": 1.0}, 3)
        second.metrics({"memory/rss_peak_mib": 7.0})
    assert second.run_id == first.run_id
    history = mlflow_client.get_metric_history(second.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    run = mlflow_client.get_run(second.run_id)
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "ok")


@pytest.mark.slow
def test_folder_accepts_only_its_own_run(mlflow_uri, tmp_path):
    with pytest.raises(KeyboardInterrupt), start_run(mlflow_uri, tmp_path):
        raise KeyboardInterrupt
    with (
        pytest.raises(ConfigError, match="unfinished run of another config"),
        start_run(mlflow_uri, tmp_path, "seed=1"),
    ):
        pass
    with (
        start_run(mlflow_uri, tmp_path) as tracked,
        pytest.raises(TrackingError, match="another process"),
        start_run(mlflow_uri, tmp_path),
    ):
        pass
    assert tracked.resumed
    with pytest.raises(ConfigError, match=r"contains a run that has ended \(ok\)"), start_run(mlflow_uri, tmp_path):
        pass


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_folder_of_a_failed_run_says_how_to_go_on(has_checkpoint, mlflow_uri, tmp_path):
    with pytest.raises(MemoryError), start_run(mlflow_uri, tmp_path):
        raise MemoryError
    (tmp_path / "checkpoints" / ("checkpoint-3" if has_checkpoint else "other")).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has ended \(oom\)") as refused, start_run(mlflow_uri, tmp_path):
        pass
    hint = f", and to go on from its checkpoints: training.resume_from_checkpoint={tmp_path}"
    assert str(refused.value).endswith(hint) == has_checkpoint


def test_other_store_receives_everything(mlflow_uri, mlflow_client, tmp_path, make_store):
    with start_run(mlflow_uri, tmp_path / "run") as tracked:
        tracked.metrics({"loss": 2.0}, 1)
    other = make_store("other.db")
    assert not is_delivered(tmp_path / "run", other)
    assert recovery.finish(tmp_path / "run", "killed", "not used", other) == []
    assert is_delivered(tmp_path / "run", other)
    assert is_delivered(tmp_path / "run")
    there = client(other)
    (copy,) = there.search_runs([there.get_experiment_by_name("qlora_exp").experiment_id])
    assert (copy.info.status, copy.data.metrics) == ("FINISHED", {"loss": 2.0})
    assert mlflow_client.get_run(tracked.run_id).data.metrics == {"loss": 2.0}


def test_run_is_found_in_its_store_after_the_project_was_moved(tmp_path, make_store):
    (tmp_path / "old" / "mlruns").mkdir(parents=True)
    store = make_store("old/mlruns/mlflow.db")
    with start_run(store, tmp_path / "old" / "run") as tracked:
        tracked.metrics({"loss": 2.0}, 1)
        tracked.text("x", "a.txt")
    leave_stale_run(store, client(store), tmp_path / "old" / "cut")
    (tmp_path / "old").rename(tmp_path / "moved")
    moved = store.replace("/old/", "/moved/")
    with start_run(moved, tmp_path / "moved" / "cut", "tracking.experiment_name=stale") as resumed:
        resumed.metrics({"train/loss": 1.0}, 2)
    assert recovery.finish(tmp_path / "moved" / "run", "killed", "not used", moved) == []
    there = client(moved)
    runs = there.search_runs([experiment.experiment_id for experiment in there.search_experiments()])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) == 2
    assert tracked.run_id in {run.info.run_id for run in runs}


def test_run_is_found_if_the_note_of_what_was_delivered_is_damaged(tmp_path, make_store):
    store = make_store("own.db")
    with start_run(store, tmp_path / "run") as tracked:
        tracked.metrics({"loss": 2.0}, 1)
    note = tmp_path / "run" / "delivered.json"
    note.write_text(note.read_text().replace("sqlite:", "sqlitg:"))
    assert recovery.finish(tmp_path / "run", "killed", "not used", store) == []
    there = client(store)
    (run,) = there.search_runs([there.get_experiment_by_name("qlora_exp").experiment_id])
    assert run.info.run_id == tracked.run_id
    assert len(there.get_metric_history(run.info.run_id, "loss")) == 1


def test_points_that_an_emptied_journal_forgot_are_not_sent_twice(tmp_path, make_store):
    store = make_store("own.db")
    with pytest.raises(KeyboardInterrupt), start_run(store, tmp_path / "run") as tracked:
        tracked.metrics({"train/loss": 2.0}, 1)
        tracked.metrics({"train/loss": 1.5, "before/loss": 3.0}, 2)
        raise KeyboardInterrupt
    (tmp_path / "run" / FILE).write_text("")
    for _ in range(2):  # the second time, the journal has more than its beginning again
        with pytest.raises(KeyboardInterrupt), start_run(store, tmp_path / "run") as again:
            for step, loss in enumerate((2.0, 1.5, 1.0), 1):
                again.metrics({"train/loss": loss}, step)
            raise KeyboardInterrupt
    there = client(store)
    (run,) = there.search_runs([there.get_experiment_by_name("qlora_exp").experiment_id])
    assert run.info.run_id == tracked.run_id
    assert [point.value for point in there.get_metric_history(run.info.run_id, "train/loss")] == [2.0, 1.5, 1.0]


def test_refused_start_over_an_emptied_journal_forgets_no_run(tmp_path, make_store, monkeypatch):
    store = make_store("own.db")
    with pytest.raises(KeyboardInterrupt), start_run(store, tmp_path / "run") as tracked:
        raise KeyboardInterrupt
    (tmp_path / "run" / FILE).write_text("")
    with monkeypatch.context() as patched, pytest.raises(TrackingError):
        patched.setattr("qlora_exp.tracking.tracker.client", Mock(side_effect=TrackingError("away")))
        with start_run(store, tmp_path / "run"):
            pass
    with start_run(store, tmp_path / "run") as again:
        assert again.run_id == tracked.run_id


def test_store_that_lost_a_run_receives_it_again(tmp_path, make_store):
    uri, new_uri = make_store("lost.db"), make_store("new.db")
    with start_run(uri, tmp_path / "run") as tracked:
        tracked.metrics({"loss": 2.0}, 1)
        (tmp_path / "lost.db").rename(tmp_path / "away.db")
        tracked._mlflow = client(new_uri)
        tracked.metrics({"loss": 1.0}, 2)
    there = client(new_uri)
    (again,) = there.search_runs([there.get_experiment_by_name("qlora_exp").experiment_id])
    assert [one.value for one in there.get_metric_history(again.info.run_id, "loss")] == [2.0, 1.0]
    assert again.info.status == "FINISHED"


def test_resumed_run_loses_its_failure(mlflow_uri, mlflow_client, tmp_path):
    with pytest.raises(KeyboardInterrupt), start_run(mlflow_uri, tmp_path) as tracked:
        raise KeyboardInterrupt
    assert "KeyboardInterrupt" in mlflow_client.get_run(tracked.run_id).data.tags["failure"]
    with start_run(mlflow_uri, tmp_path):
        pass
    tags = mlflow_client.get_run(tracked.run_id).data.tags
    assert (tags["outcome"], tags["failure"]) == ("ok", "")


def test_foreign_journal_sends_no_local_files(mlflow_uri, mlflow_client, tmp_path):
    (tmp_path / "secret").write_text("mine")
    with start_run(mlflow_uri, tmp_path / "run") as tracked:
        tracked.file("../secret")
        tracked.model("..", "m", {}, 1)
        tracked.metrics({"loss": 2.0}, 1)
    run = mlflow_client.get_run(tracked.run_id)
    assert run.data.metrics == {"loss": 2.0}
    assert "secret" not in [one.path for one in mlflow_client.list_artifacts(tracked.run_id)]
    assert not run.outputs.model_outputs


def test_dead_run_naming_another_folder_changes_nothing_there(mlflow_uri, mlflow_client, tmp_path):
    with pytest.raises(KeyboardInterrupt), start_run(mlflow_uri, tmp_path / "theirs") as theirs:
        raise KeyboardInterrupt
    before = (tmp_path / "theirs" / "journal.jsonl").read_bytes()
    tags = dict(mlflow_client.get_run(theirs.run_id).data.tags) | {"process.started": "1.0", "attempt": "another"}
    made_up = mlflow_client.create_run(mlflow_client.get_run(theirs.run_id).info.experiment_id, tags=tags).info.run_id
    with start_run(mlflow_uri, tmp_path / "mine"):
        pass
    assert mlflow_client.get_run(made_up).info.status == "KILLED"
    assert (tmp_path / "theirs" / "journal.jsonl").read_bytes() == before


def test_interrupt_waits_for_the_message_being_sent(mlflow_uri, mlflow_client, tmp_path, monkeypatch):
    # Torn in a transaction it would leave the store locked for this process, and the run RUNNING.
    send, whole = delivery.send, []

    def interrupted(*message):
        if message[-1]["op"] == "metrics" and "metrics" not in whole:
            os.kill(os.getpid(), signal.SIGTERM)
        whole.append(message[-1]["op"])
        return send(*message)

    with pytest.raises(KeyboardInterrupt), handle_signals(), start_run(mlflow_uri, tmp_path) as tracked:
        monkeypatch.setattr(delivery, "send", interrupted)
        tracked.metrics({"loss": 2.5}, 3)
        tracked.deliver_now()
        pytest.fail("the interrupt came late")
    run = mlflow_client.get_run(tracked.run_id)
    assert "metrics" in whole
    assert (run.info.status, run.data.tags["outcome"]) == ("KILLED", "killed")


def test_run_name_describes_the_run():
    name = lifecycle.run_name(compose(["lora_variant=dora", "method.r=4"]))
    assert name == "smollm2-135m-construction_faq-qlora-nf4_double-dora-r4-s42"
    name = lifecycle.run_name(compose(["method=full", "model=opt_125m"]))
    assert name == "opt-125m-construction_faq-full-s42"


def replace_by_file(folder) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


def replace_by_link(folder) -> None:
    folder.rename(folder.with_name("behind"))
    folder.symlink_to(folder.with_name("behind"))


GARBAGE = [b"", b"{}", b"[]", b"\0" * 20, b"\xff\xfe", b'{"op": "met garbage', b'{"op": "tags"}', b'{"op": "end"}']
DAMAGES = {
    **{f"{line[:9]!r} at {at}": damage(line, at) for line in GARBAGE for at in (0, 3, 10**6)},
    "deleted": shutil.rmtree,
    "a file": replace_by_file,
    "a link": replace_by_link,
    "no journal": lambda folder: (folder / FILE).unlink(),
    "an empty journal": lambda folder: (folder / FILE).write_bytes(b""),
    "a folder for a journal": lambda folder: ((folder / FILE).unlink(), (folder / FILE).mkdir()),
    "a pipe for a journal": lambda folder: ((folder / FILE).unlink(), os.mkfifo(folder / FILE)),
    "a folder for a lock": lambda folder: ((folder / "journal.lock").unlink(), (folder / "journal.lock").mkdir()),
    "delivered.json": lambda folder: (folder / "delivered.json").write_text("[]"),
    "another attempt": lambda folder: (folder / FILE).write_bytes(
        re.sub(rb'("attempt": )"\w+"(.*), "crc32": "\w+"', rb'\1"another"\2', (folder / FILE).read_bytes())
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_stale_run_does_not_stop_the_next_run(what: str, mlflow_uri, mlflow_client, tmp_path, caplog):
    died = leave_stale_run(mlflow_uri, mlflow_client, tmp_path / "died")
    DAMAGES[what](tmp_path / "died")
    recovery.reap(mlflow_client, "stale", mlflow_uri)
    run = mlflow_client.get_run(died)
    assert (run.info.status, run.data.tags["outcome"]) == ("KILLED", "killed")
    (said,) = [one.message for one in caplog.records if died in one.message]
    assert str(tmp_path / "died") in said
    assert "\n" not in said


WRONG_TAGS = [
    {"process.pid": "abc"},
    {"process.pid": "-1"},
    {"process.pid": str(os.getpid()), "process.started": "x"},
    {"process.folder": "a\0b"},
    {"process.folder": "x" * 5000},
    {"attempt": "'"},
]


@pytest.mark.slow
@pytest.mark.parametrize("tags", WRONG_TAGS)
def test_invalid_tags_of_a_stale_run_do_not_stop_the_next_run(tags, mlflow_uri, mlflow_client, tmp_path, caplog):
    died, other = (
        leave_stale_run(mlflow_uri, mlflow_client, tmp_path / name, **more) for name, more in (("a", tags), ("b", {}))
    )
    recovery.reap(mlflow_client, "stale", mlflow_uri)
    assert [mlflow_client.get_run(one).info.status for one in (died, other)] == ["KILLED", "KILLED"]
    assert [one.message for one in caplog.records if died in one.message]
    assert not [one.message for one in caplog.records if other in one.message]


def test_run_of_another_user_is_left_alone(mlflow_uri, mlflow_client, tmp_path, monkeypatch, caplog):
    died = leave_stale_run(mlflow_uri, mlflow_client, tmp_path / "died")
    before = (tmp_path / "died" / FILE).read_bytes()
    monkeypatch.setattr("os.getuid", lambda: 12345)
    recovery.reap(mlflow_client, "stale", mlflow_uri)
    # Its process may live: where /proc hides processes (hidepid) it looks gone.
    assert mlflow_client.get_run(died).info.status == "RUNNING"
    # Other tests may have left runs in this experiment.
    assert not [record for record in caplog.records if record.levelname != "INFO" and died in record.getMessage()]
    assert (tmp_path / "died" / FILE).read_bytes() == before


def test_run_of_another_machine_with_the_same_name_is_left_alone(mlflow_uri, mlflow_client, tmp_path):
    boot = {"process.boot": "of another machine, or of this one before it was started again"}
    gone = leave_stale_run(mlflow_uri, mlflow_client, tmp_path / "gone", **boot)
    shutil.rmtree(tmp_path / "gone")
    here = leave_stale_run(mlflow_uri, mlflow_client, tmp_path / "here", **boot)
    recovery.reap(mlflow_client, "stale", mlflow_uri)
    assert [mlflow_client.get_run(run).info.status for run in (gone, here)] == ["RUNNING", "KILLED"]


def test_messages_before_a_damaged_line_are_sent(mlflow_uri, mlflow_client, tmp_path, make_store):
    with start_run(mlflow_uri, tmp_path / "run") as tracked:
        tracked.metrics({"loss": 2.0}, 1)
        tracked.metrics({"loss": 1.0}, 2)
    whole = (tmp_path / "run" / FILE).read_bytes()
    at = next(number for number, line in enumerate(whole.splitlines()) if b'"step": 2' in line)
    damage(b'{"op": "met garbage', at)(tmp_path / "run")
    uri = make_store("other.db")
    with pytest.raises(JournalError, match=f"line {at + 1}: "):
        recovery.finish(tmp_path / "run", "killed", "not used", uri)
    there = client(uri)

    def told():
        (run,) = there.search_runs([there.get_experiment_by_name("qlora_exp").experiment_id])
        return run.info.status, [one.value for one in there.get_metric_history(run.info.run_id, "loss")]

    assert told() == ("RUNNING", [2.0])
    assert not is_delivered(tmp_path / "run", uri)
    with pytest.raises(JournalError):  # and nothing was added
        recovery.finish(tmp_path / "run", "killed", "not used", uri)
    (tmp_path / "run" / FILE).write_bytes(whole)
    assert recovery.finish(tmp_path / "run", "killed", "not used", uri) == []
    assert told() == ("FINISHED", [2.0, 1.0])


@pytest.mark.slow
@pytest.mark.parametrize("line", GARBAGE)
def test_restart_names_a_damaged_journal_line(line: bytes, mlflow_uri, mlflow_client, tmp_path):
    leave_stale_run(mlflow_uri, mlflow_client, tmp_path / "died")
    damage(line, 3)(tmp_path / "died")
    for _ in range(2):  # and lets the folder go
        with pytest.raises(JournalError, match="line 4: "), start_run(mlflow_uri, tmp_path / "died"):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "[]", "{}", "3", "model: 3", "a: !!python/object/apply:os.system ['x']", "\0"])
def test_restart_names_a_damaged_config(text: str, mlflow_uri, mlflow_client, tmp_path):
    leave_stale_run(mlflow_uri, mlflow_client, tmp_path / "died")
    (tmp_path / "died" / "qlora_exp.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"qlora_exp\.yaml"), start_run(mlflow_uri, tmp_path / "died"):
        pass


def replace_by_another(folder) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    journal = Journal(folder)
    journal.append(json.loads('{"op": "view", "key": "k", "value": "v"}'))
    journal.close()


@pytest.mark.parametrize("away", [shutil.rmtree, replace_by_file, replace_by_another])
@pytest.mark.parametrize("then", [ValueError("stumbled"), "goes on", "ends"])
def test_run_whose_folder_is_deleted_fails(away, then, mlflow_uri, mlflow_client, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(JournalError, match="was deleted or replaced"), start_run(mlflow_uri, folder) as tracked:
        away(folder)
        left = sorted(folder.iterdir()) if folder.is_dir() else None
        if isinstance(then, Exception):
            raise then
        if then == "goes on":
            tracked.text("x", "evaluation/x.txt")
    run = mlflow_client.get_run(tracked.run_id)
    assert (run.info.status, run.data.tags["outcome"]) == ("FAILED", "error")
    assert "was deleted or replaced" in run.data.tags["failure"]
    assert (sorted(folder.iterdir()) if folder.is_dir() else None) == left


def test_links_in_a_run_send_no_local_files(mlflow_uri, mlflow_client, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("mine")
    folder = tmp_path / "run"
    with start_run(mlflow_uri, folder) as tracked:
        for name in ("link", "links"):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text("{}")
        (folder / "link" / "notes.txt").symlink_to(secret / "key")
        (folder / "links" / "below").symlink_to(secret)
        (folder / "linked").symlink_to(secret)
        (folder / "inner").symlink_to(folder / "link" / "config.json")  # of the run, but it could be changed any time
        (folder / "samples.json").symlink_to(secret / "key")
        for model in ("link", "links", "linked", "../secret", str(secret)):
            tracked.model(model, "m", {}, 1)
        for file in ("linked/key", "links/below/key", "inner", "../secret/key", str(secret / "key"), "a\0b"):
            tracked.file(file)
        tracked.text("new", "samples.json")
    assert (secret / "key").read_text() == "mine"
    run = mlflow_client.get_run(tracked.run_id)
    assert run.info.status == "FINISHED"
    assert not run.outputs.model_outputs
    place = artifacts.folder(run.info.artifact_uri, mlflow_uri)
    assert not {"key", "inner", "notes.txt", "below"} & {file.name for file in place.rglob("*")}
    assert (place / "samples.json").read_text() == "new"
    assert not list(place.parents[1].glob("models/*/artifacts/**/notes.txt"))


def test_files_of_other_users_are_not_sent(mlflow_uri, mlflow_client, tmp_path, monkeypatch):
    with start_run(mlflow_uri, tmp_path / "run") as tracked:
        tracked.text("mine", "mine.txt")
        tracked.deliver_now()
        monkeypatch.setattr(mlflow_store, "own_user", lambda _: os.geteuid() + 1)
        tracked.text("theirs", "theirs.txt")
    monkeypatch.undo()
    sent = [file.path for file in mlflow_client.list_artifacts(tracked.run_id)]
    assert "mine.txt" in sent
    assert "theirs.txt" not in sent


def test_journal_that_is_a_link_is_neither_read_nor_changed(mlflow_uri, tmp_path):
    (tmp_path / "notes").write_text("first line\nsecond line without an end")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).symlink_to(tmp_path / "notes")
    with pytest.raises(JournalError):
        recovery.finish(tmp_path / "run", "killed", "gone", mlflow_uri)
    with pytest.raises(JournalError), start_run(mlflow_uri, tmp_path / "run"):
        pass
    assert (tmp_path / "notes").read_text() == "first line\nsecond line without an end"
