import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.validate import from_dict
from qlora_exp.tracking import lifecycle, recovery
from qlora_exp.tracking import tracker as tracking
from qlora_exp.tracking.journal import FILE, Journal, is_settled, metrics
from qlora_exp.tracking.mlflow_store import client, finished_runs
from qlora_exp.utils.errors import ConfigError, JournalError, TrackingError
from qlora_exp.utils.signals import heeded


@pytest.fixture
def mlflow(store: str) -> MlflowClient:
    return client(store)


def start(store: str, folder, *overrides: str, **kwargs):
    folder.mkdir(exist_ok=True)
    return lifecycle.start(compose([f"tracking.uri={store}", *overrides]), folder, **kwargs)


def test_a_run_that_ends_well_is_finished(store, mlflow, tmp_path):
    with start(store, tmp_path, "+tracking.tags.team=a") as tracker:
        tracker.metrics({"loss": 1.0}, 3)
    run = mlflow.get_run(tracker.run_id)
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
def test_a_run_that_ends_badly_says_how(error: BaseException, status: str, outcome: str, store, mlflow, tmp_path):
    with pytest.raises(type(error)), start(store, tmp_path) as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        raise error
    run = mlflow.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["outcome"]) == (status, outcome)
    assert type(error).__name__ in run.data.tags["failure"]
    assert run.data.metrics == {"loss": 1.0}
    assert "traceback.txt" in [artifact.path for artifact in mlflow.list_artifacts(tracker.run_id)]


def test_no_secret_reaches_mlflow_or_the_disk(store, mlflow, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken")
    with (
        pytest.raises(ValueError, match="hf_"),
        start(store, tmp_path, "+tracking.tags.note=hf_averysecrettoken") as tracker,
    ):
        tracker.params({"note": "hf_averysecrettoken", "uri": "https://me:pass@host/x"})
        raise ValueError("token hf_averysecrettoken refused")
    data = mlflow.get_run(tracker.run_id).data
    assert data.params["uri"] == "https://***@host/x"
    everything = str(data.to_dictionary()) + "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert "averysecret" not in everything


def test_a_run_whose_process_died_is_killed_by_the_next_start(store, mlflow, tmp_path):
    code = (
        "import os, signal, sys; from qlora_exp.tracking import lifecycle\n"
        "from qlora_exp.config.hydra_compose import compose\n"
        "from pathlib import Path\n"
        f"with lifecycle.start(compose(['tracking.uri={store}']), Path({str(tmp_path)!r})) as t:\n"
        "    print(t.run_id, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    assert mlflow.get_run(died).info.status == "RUNNING"
    with start(store, tmp_path / "next") as tracker:
        assert mlflow.get_run(tracker.run_id).info.status == "RUNNING"
        assert mlflow.get_run(died).info.status == "KILLED"


def create(uri: str) -> str:
    return client(uri).create_experiment(f"experiment {os.getpid()}")


def test_processes_that_start_together_share_one_database(tmp_path):
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(create, [uri] * 3))) == 3


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/nowhere/mlflow.db", "nonsense://x"])
def test_a_store_that_does_not_answer_is_explained_at_once(uri: str, tmp_path):
    begin = time.monotonic()
    with pytest.raises(TrackingError, match="does not answer or cannot be written"), start(uri, tmp_path):
        pass
    assert time.monotonic() - begin < 30


def test_a_deleted_experiment_is_explained(store, mlflow, tmp_path):
    mlflow.delete_experiment(mlflow.create_experiment("gone"))
    with (
        pytest.raises(TrackingError, match="was deleted"),
        start(store, tmp_path, "tracking.experiment_name=gone"),
    ):
        pass


def test_a_message_that_mlflow_refuses_does_not_hold_up_the_others(store, mlflow, tmp_path, caplog):
    values = compose([f"tracking.uri={store}"]).model_dump(mode="json")
    values["method"]["rank_pattern"] = {"layers.0.*q_proj": 4}
    with lifecycle.start(from_dict(values), tmp_path) as tracker:
        tracker.params({"what(is)this": 1})
        tracker.metrics({"loss": 1.0}, 1)
    found = mlflow.get_run(tracker.run_id)
    assert (found.info.status, found.data.metrics["loss"]) == ("FINISHED", 1.0)
    assert "layers.0.*q_proj" in found.data.params["method.rank_pattern"]
    assert "MLflow refuses a message" in caplog.text


class Unsteady:
    """A client whose server is away for a while."""

    def __init__(self, mlflow: MlflowClient) -> None:
        self.away = False
        self._mlflow = mlflow

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            if self.away:
                raise MlflowException("connection refused")
            return getattr(self._mlflow, name)(*args, **kwargs)

        return call


def test_a_server_that_goes_away_loses_nothing(store, mlflow, tmp_path, monkeypatch):
    unsteady = Unsteady(mlflow)
    monkeypatch.setattr(tracking, "client", lambda uri: unsteady)
    with start(store, tmp_path) as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        unsteady.away = True
        tracker.metrics({"loss": 2.0}, 2)
        tracker.metrics({"loss": 3.0}, 3)
        unsteady.away = False
    history = mlflow.get_metric_history(tracker.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert mlflow.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_server_that_stays_away_leaves_everything_on_disk(store, mlflow, tmp_path, monkeypatch, caplog):
    unsteady = Unsteady(mlflow)
    monkeypatch.setattr(tracking, "client", lambda uri: unsteady)
    with start(store, tmp_path) as tracker:
        unsteady.away = True
        tracker.metrics({"loss": 2.0}, 2)
    assert "did not take everything" in caplog.text
    assert metrics(tmp_path)[-1]["loss"] == 2.0
    assert mlflow.get_run(tracker.run_id).info.status == "RUNNING"
    assert recovery.finish(tmp_path, "killed", "not used: the run ended by itself", store) is False  # still away
    unsteady.away = False
    assert recovery.finish(tmp_path, "killed", "not used: the run ended by itself", store) is True
    run = mlflow.get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics, run.data.tags["outcome"]) == ("FINISHED", {"loss": 2.0}, "ok")


def test_a_run_that_begins_while_the_server_is_away_is_told_later(store, mlflow, tmp_path, monkeypatch):
    unsteady = Unsteady(mlflow)
    unsteady.away = True
    monkeypatch.setattr(tracking, "client", lambda uri: unsteady)
    with pytest.raises(TrackingError, match="connection refused"), start(store, tmp_path):
        pass
    with start(store, tmp_path, must_reach=False) as tracker:
        assert tracker.run_id is None
        tracker.metrics({"loss": 2.0}, 1)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "adapter_config.json").write_text("{}")
        tracker.model("model", "lora-model", {"r": 4}, 1)
        tracker.table({"a": [1, 2]}, "table.json")
        unsteady.away = False
    run = mlflow.get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 2.0})
    assert len(run.outputs.model_outputs) == 1


def test_telling_everything_again_changes_nothing(store, mlflow, tmp_path):
    """As after a kill between telling and noting that it was told."""
    with start(store, tmp_path) as tracker:
        tracker.metrics({"loss": 2.0, "other": 1.0}, 1)
        tracker.dataset("rows", "abc", "here", "training", 3)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        tracker.model("model", "m", {}, 1)
    before = mlflow.get_run(tracker.run_id).to_dictionary()
    journal = Journal(tmp_path)
    journal.use(store)
    journal.state.pop("run_id")
    journal.note(offset=0)
    journal.close()
    assert recovery.finish(tmp_path, "killed", "not used") is True
    assert mlflow.get_run(tracker.run_id).to_dictionary() == before
    assert len(mlflow.get_metric_history(tracker.run_id, "loss")) == 1
    assert (
        len(
            mlflow.search_runs(
                ["0", *[one.experiment_id for one in mlflow.search_experiments()]],
                f"tags.attempt = '{before['data']['tags']['attempt']}'",
            )
        )
        == 1
    )


def test_a_run_that_was_cut_off_goes_on_as_the_same_run(store, mlflow, tmp_path):
    with pytest.raises(KeyboardInterrupt), start(store, tmp_path) as first:
        first.metrics({"train/loss": 3.0}, 1)
        first.metrics({"train/loss": 2.0}, 2)
        raise KeyboardInterrupt
    with start(store, tmp_path) as second:
        assert second.resumed
        assert mlflow.get_run(second.run_id).info.status == "RUNNING"
        second.metrics({"train/loss": 2.5}, 2)  # computed again
        second.metrics({"train/loss": 1.0}, 3)
        second.metrics({"memory/rss_peak_mib": 7.0})
    assert second.run_id == first.run_id
    history = mlflow.get_metric_history(second.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    run = mlflow.get_run(second.run_id)
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "ok")


def test_a_folder_keeps_to_its_run(store, tmp_path):
    with pytest.raises(KeyboardInterrupt), start(store, tmp_path):
        raise KeyboardInterrupt
    with pytest.raises(ConfigError, match="unfinished run of another config"), start(store, tmp_path, "seed=1"):
        pass
    with (
        start(store, tmp_path) as tracker,
        pytest.raises(TrackingError, match="another process"),
        start(store, tmp_path),
    ):
        pass
    assert tracker.resumed
    with pytest.raises(ConfigError, match=r"holds a run that ended \(ok\)"), start(store, tmp_path):
        pass


def test_another_store_gets_everything(store, mlflow, tmp_path):
    with start(store, tmp_path / "run") as tracker:
        tracker.metrics({"loss": 2.0}, 1)
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert not is_settled(tmp_path / "run", other)
    assert recovery.finish(tmp_path / "run", "killed", "not used", other) is True
    assert is_settled(tmp_path / "run", other)
    assert is_settled(tmp_path / "run")
    there = client(other)
    (copy,) = there.search_runs([there.get_experiment_by_name("qlora_exp").experiment_id])
    assert (copy.info.status, copy.data.metrics) == ("FINISHED", {"loss": 2.0})
    assert mlflow.get_run(tracker.run_id).data.metrics == {"loss": 2.0}


def test_a_store_that_has_lost_the_run_is_told_it_again(tmp_path):
    uri = f"sqlite:///{tmp_path / 'lost.db'}"
    with start(uri, tmp_path / "run") as tracker:
        tracker.metrics({"loss": 2.0}, 1)
        (tmp_path / "lost.db").rename(tmp_path / "away.db")
        tracker._mlflow = client(f"sqlite:///{tmp_path / 'new.db'}")
        tracker.metrics({"loss": 1.0}, 2)
    there = client(f"sqlite:///{tmp_path / 'new.db'}")
    (again,) = there.search_runs([there.get_experiment_by_name("qlora_exp").experiment_id])
    assert [one.value for one in there.get_metric_history(again.info.run_id, "loss")] == [2.0, 1.0]
    assert again.info.status == "FINISHED"


def test_a_run_that_goes_on_has_not_failed_any_more(store, mlflow, tmp_path):
    with pytest.raises(KeyboardInterrupt), start(store, tmp_path) as tracker:
        raise KeyboardInterrupt
    assert "KeyboardInterrupt" in mlflow.get_run(tracker.run_id).data.tags["failure"]
    with start(store, tmp_path):
        pass
    tags = mlflow.get_run(tracker.run_id).data.tags
    assert (tags["outcome"], tags["failure"]) == ("ok", "")


def test_a_journal_that_somebody_else_wrote_sends_no_file_of_this_machine(store, mlflow, tmp_path):
    (tmp_path / "secret").write_text("mine")
    with start(store, tmp_path / "run") as tracker:
        tracker.file("../secret")
        tracker.model("..", "m", {}, 1)
        tracker.metrics({"loss": 2.0}, 1)
    run = mlflow.get_run(tracker.run_id)
    assert run.data.metrics == {"loss": 2.0}
    assert "secret" not in [one.path for one in mlflow.list_artifacts(tracker.run_id)]
    assert not run.outputs.model_outputs


def test_a_dead_run_that_names_somebody_elses_folder_moves_nothing_there(store, mlflow, tmp_path):
    with pytest.raises(KeyboardInterrupt), start(store, tmp_path / "theirs") as theirs:
        raise KeyboardInterrupt
    before = (tmp_path / "theirs" / "journal.jsonl").read_bytes()
    tags = dict(mlflow.get_run(theirs.run_id).data.tags) | {"process.started": "1.0", "attempt": "another"}
    made_up = mlflow.create_run(mlflow.get_run(theirs.run_id).info.experiment_id, tags=tags).info.run_id
    with start(store, tmp_path / "mine"):
        pass
    assert mlflow.get_run(made_up).info.status == "KILLED"
    assert (tmp_path / "theirs" / "journal.jsonl").read_bytes() == before


def test_finished_runs_are_found_by_their_key(store, mlflow, tmp_path):
    name = "tracking.experiment_name=finished"
    with start(store, tmp_path / "a", name) as tracker:
        tracker.metrics({"after/loss": 2.5}, 3)
    with pytest.raises(ValueError, match="x"), start(store, tmp_path / "b", name, "seed=1"):
        raise ValueError("x")
    key = mlflow.get_run(tracker.run_id).data.tags["run_key"]
    found = finished_runs(store, "finished", [key, "0123456789abcdef"])
    assert list(found) == [key]
    assert 0 <= found[key].pop("seconds") < 60
    assert found[key] == {"run_id": tracker.run_id, "outcome": "ok", "metrics": {"after/loss": 2.5}}
    assert finished_runs(store, "no such experiment", [key]) == {}
    assert finished_runs(f"sqlite:///{tmp_path / 'none.db'}", "finished", [key]) == {}
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_a_killed_command_is_recorded_as_killed(signal_name: str, store, mlflow, tmp_path):
    command = [sys.executable, "-m", "qlora_exp", "train", "model=tiny_llama", "training.max_steps=100000"]
    extra = [f"tracking.uri={store}", "evaluation=loss_only", f"hydra.run.dir={tmp_path / 'killed'}", "device=cpu"]
    process = subprocess.Popen(
        [*command, *extra],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A shell's background job ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(600):
        if any("train/loss" in one for one in metrics(tmp_path / "killed")):
            break
        time.sleep(0.2)
    process.send_signal(getattr(signal, signal_name))
    assert process.wait(60) == 130
    run_id = (tmp_path / "killed" / "run.log").read_text().split("run ", 1)[1].split()[0]
    run = mlflow.get_run(run_id)
    assert (run.info.status, run.data.tags["outcome"]) == ("KILLED", "killed")
    assert run.data.metrics["train/loss"] > 0


def test_an_interrupt_tears_nothing_that_mlflow_is_told(store, mlflow, tmp_path, monkeypatch):
    # Torn in a transaction it would leave the store locked for this process, and the run RUNNING.
    tell, whole = tracking.tell, []

    def interrupted(*message):
        if message[-1]["op"] == "metrics" and not whole:
            os.kill(os.getpid(), signal.SIGTERM)
        tell(*message)
        whole.append(message[-1]["op"])

    with pytest.raises(KeyboardInterrupt), heeded(), start(store, tmp_path) as tracker:
        monkeypatch.setattr(tracking, "tell", interrupted)
        tracker.metrics({"train/loss": 2.5}, 3)
        pytest.fail("the interrupt came late")
    run = mlflow.get_run(tracker.run_id)
    assert whole[0] == "metrics"
    assert (run.info.status, run.data.tags["outcome"]) == ("KILLED", "killed")


def test_run_names_say_what_the_run_is():
    name = lifecycle.run_name(compose(["lora_variant=dora", "method.r=4"]))
    assert name == "smollm2-135m-construction_faq-qlora-nf4_double-dora-r4-s42"
    name = lifecycle.run_name(compose(["method=full", "model=opt_125m"]))
    assert name == "opt-125m-construction_faq-full-s42"


def stale(store, mlflow, folder, **tags: str) -> str:
    """A run whose process died in the middle: its id."""
    with pytest.raises(KeyboardInterrupt), start(store, folder, "tracking.experiment_name=stale") as tracker:
        tracker.metrics({"train/loss": 3.0}, 1)
        raise KeyboardInterrupt
    lines = (folder / FILE).read_text().splitlines(keepends=True)
    last = next(number for number, line in enumerate(lines) if '"op": "metrics"' in line)
    (folder / FILE).write_text("".join(lines[: last + 1]))
    mlflow.update_run(tracker.run_id, status="RUNNING")
    for key, value in ({"process.pid": str(2**22 + os.getpid())} | tags).items():
        mlflow.set_tag(tracker.run_id, key, value)
    return tracker.run_id


def damage(line: bytes, at: int):
    """Put a line into a journal."""

    def write(folder) -> None:
        lines = (folder / FILE).read_bytes().splitlines(keepends=True)
        lines[at:at] = [line + b"\n"]
        (folder / FILE).write_bytes(b"".join(lines))

    return write


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
        re.sub(rb'"attempt": "\w+"', b'"attempt": "another"', (folder / FILE).read_bytes())
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_whatever_is_wrong_with_a_stale_run_the_next_one_begins(what: str, store, mlflow, tmp_path, caplog):
    died = stale(store, mlflow, tmp_path / "died")
    DAMAGES[what](tmp_path / "died")
    recovery.reap(mlflow, "stale", store)
    run = mlflow.get_run(died)
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


@pytest.mark.parametrize("tags", WRONG_TAGS)
def test_whatever_the_tags_of_a_stale_run_say_the_next_one_begins(tags, store, mlflow, tmp_path, caplog):
    died, other = (stale(store, mlflow, tmp_path / name, **more) for name, more in (("a", tags), ("b", {})))
    recovery.reap(mlflow, "stale", store)
    assert [mlflow.get_run(one).info.status for one in (died, other)] == ["KILLED", "KILLED"]
    assert [one.message for one in caplog.records if died in one.message]
    assert not [one.message for one in caplog.records if other in one.message]


def test_somebody_elses_folder_is_not_read(store, mlflow, tmp_path, monkeypatch, caplog):
    died = stale(store, mlflow, tmp_path / "died")
    before = (tmp_path / "died" / FILE).read_bytes()
    monkeypatch.setattr("os.getuid", lambda: 12345)
    recovery.reap(mlflow, "stale", store)
    assert mlflow.get_run(died).info.status == "KILLED"
    assert "another user's" in caplog.text
    assert (tmp_path / "died" / FILE).read_bytes() == before


def test_what_comes_before_a_damaged_line_is_sent_and_the_rest_once_it_is_mended(store, mlflow, tmp_path):
    with start(store, tmp_path / "run") as tracker:
        tracker.metrics({"loss": 2.0}, 1)
        tracker.metrics({"loss": 1.0}, 2)
    whole = (tmp_path / "run" / FILE).read_bytes()
    at = next(number for number, line in enumerate(whole.splitlines()) if b'"step": 2' in line)
    damage(b'{"op": "met garbage', at)(tmp_path / "run")
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    with pytest.raises(JournalError, match=f"line {at + 1}: "):
        recovery.finish(tmp_path / "run", "killed", "not used", uri)
    there = client(uri)

    def told():
        (run,) = there.search_runs([there.get_experiment_by_name("qlora_exp").experiment_id])
        return run.info.status, [one.value for one in there.get_metric_history(run.info.run_id, "loss")]

    assert told() == ("RUNNING", [2.0])
    assert not is_settled(tmp_path / "run", uri)
    with pytest.raises(JournalError):  # and nothing was added
        recovery.finish(tmp_path / "run", "killed", "not used", uri)
    (tmp_path / "run" / FILE).write_bytes(whole)
    assert recovery.finish(tmp_path / "run", "killed", "not used", uri)
    assert told() == ("FINISHED", [2.0, 1.0])


@pytest.mark.parametrize("line", GARBAGE)
def test_a_restart_names_what_it_cannot_read(line: bytes, store, mlflow, tmp_path):
    stale(store, mlflow, tmp_path / "died")
    damage(line, 3)(tmp_path / "died")
    for _ in range(2):  # and lets the folder go
        with pytest.raises(JournalError, match="line 4: "), start(store, tmp_path / "died"):
            pass


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3", "model: 3", "a: !!python/object/apply:os.system ['x']", "\0"])
def test_a_restart_names_a_config_that_it_cannot_read(text: str, store, mlflow, tmp_path):
    stale(store, mlflow, tmp_path / "died")
    (tmp_path / "died" / "qlora_exp.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"qlora_exp\.yaml"), start(store, tmp_path / "died"):
        pass


def replace_by_another(folder) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    journal = Journal(folder)
    journal.append(json.loads('{"op": "view", "key": "k", "value": "v"}'))
    journal.close()


@pytest.mark.parametrize("away", [shutil.rmtree, replace_by_file, replace_by_another])
@pytest.mark.parametrize("then", [ValueError("stumbled"), "goes on", "ends"])
def test_a_run_whose_folder_goes_away_has_failed(away, then, store, mlflow, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(JournalError, match="was deleted or replaced"), start(store, folder) as tracker:
        away(folder)
        left = sorted(folder.iterdir()) if folder.is_dir() else None
        if isinstance(then, Exception):
            raise then
        if then == "goes on":
            tracker.text("x", "evaluation/x.txt")
    run = mlflow.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["outcome"]) == ("FAILED", "error")
    assert "was deleted or replaced" in run.data.tags["failure"]
    assert (sorted(folder.iterdir()) if folder.is_dir() else None) == left


def test_links_in_a_model_send_no_file_of_this_machine(store, mlflow, tmp_path):
    (tmp_path / "secret").write_text("mine")
    with start(store, tmp_path / "run") as tracker:
        (tmp_path / "run" / "model").mkdir()
        (tmp_path / "run" / "model" / "notes.txt").symlink_to(tmp_path / "secret")
        tracker.model("model", "m", {}, 1)
        tracker.file("a\0b")
    run = mlflow.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert not run.outputs.model_outputs


def test_a_train_begins_in_a_store_with_a_bad_run(run, store, mlflow, tmp_path):
    died = stale(store, mlflow, tmp_path / "died")
    (tmp_path / "died" / FILE).write_text('{"op": "file", "path": "traceback.txt"}\n')
    done = run("tracking.experiment_name=stale", "method=lora")
    assert mlflow.get_run(done.run_id).info.status == "FINISHED"
    assert mlflow.get_run(died).info.status == "KILLED"
