"""What MLflow does not accept is kept, or named; what it says to have accepted is read back."""

import itertools
import json
import shutil

import pytest
from helpers.gateway import ANSWERS, Gateway, MemoryMlflow
from helpers.tracking import start_run
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities import LoggedModelStatus, ViewType

from qlora_exp.tracking import recovery, tracker
from qlora_exp.tracking.journal import FILE, Journal, is_delivered
from qlora_exp.tracking.tracker import Tracker

START = {
    "op": "start", "experiment": "e", "uri": "memory", "run_name": "r", "timestamp": 1, "tags": {"attempt": "a" * 32}
}  # fmt: skip
END = {"op": "end", "status": "FINISHED", "outcome": "ok", "timestamp": 9, "metrics": {}}


def metrics(step: int, **values: float) -> dict:
    return {"op": "metrics", "step": step, "timestamp": 5, "values": values}


def write_journal(folder, *messages: dict) -> None:
    (folder / FILE).write_text("".join(json.dumps(message) + "\n" for message in (START, *messages, END)))


def settle(folder, mlflow) -> list[str]:
    """Deliver a journal to a client, and read it back."""
    journal = Journal(folder)
    try:
        delivering = Tracker(journal, "memory", resumed=True)
        delivering.connect = lambda: mlflow
        return delivering.settle()
    finally:
        journal.close()


STEPS = st.lists(st.sampled_from([{"a": 1.0}, {"a": 2.0, "b": 1.0}, {"b": 3.0, "c": 1.0}, {}]), max_size=8)
MESSAGES = STEPS.map(lambda steps: [metrics(step, **values) for step, values in enumerate(steps)])
OTHERS = st.lists(
    st.sampled_from([{"op": "tags", "values": {"t": "v"}}, {"op": "params", "values": {"p": "v"}}]), max_size=3
)


WINDOWS = st.lists(st.tuples(st.sampled_from(["on", *ANSWERS]), st.integers(6, 20)), max_size=6)
"""What a gateway answers, and to how many requests: more than one decision takes."""


@settings(max_examples=50)
@given(MESSAGES, OTHERS, WINDOWS)
def test_whatever_a_gateway_answers_mlflow_has_the_run_once_it_is_said_to(tmp_path_factory, steps, others, windows):
    folder = tmp_path_factory.mktemp("run")
    write_journal(folder, *steps[:4], *others, *steps[4:])
    answers = [answer for answer, times in windows for _ in range(times)]
    memory, upcoming = MemoryMlflow(), iter(answers)
    gateway = Gateway(memory, lambda _: next(upcoming, "on"))
    tries = 0
    while settle(folder, gateway):
        tries += 1
        assert tries <= len(answers) + 1
    (run,) = memory.runs.values()
    expected: dict[str, set] = {}
    for message in steps:
        for key, value in message["values"].items():
            expected.setdefault(key, set()).add((message["step"], 5, value))
    assert {key: points for key, points in run["points"].items() if points} == expected
    assert run["status"] == "FINISHED"
    assert all((message["values"].items() <= run[message["op"]].items()) for message in others)


def test_waiting_metrics_share_requests(tmp_path):
    write_journal(
        tmp_path, *(metrics(step, a=1.0, b=2.0) for step in range(1700)), {"op": "tags", "values": {"t": "v"}}
    )
    gateway = Gateway(MemoryMlflow())
    assert settle(tmp_path, gateway) == []
    batches = [args[1] for name, args, _ in gateway.requests if name == "log_batch"]
    assert [len(batch) for batch in batches] == [1000, 1000, 1000, 400]
    names = [name for name, _, _ in gateway.requests]
    assert names.count("get_metric_history") == 1  # one of two metrics that are always logged together
    gateway.requests.clear()
    assert settle(tmp_path, gateway) == []
    assert gateway.requests == []


def test_params_tags_and_metrics_share_requests_within_mlflows_limits(tmp_path):
    values = {f"p{number}": "1" for number in range(70)}
    written = [{"op": "params", "values": values}, metrics(1, a=1.0), {"op": "tags", "values": {"t": "1"}}]
    written += [{"op": "params", "values": {f"q{number}": "1" for number in range(40)}}]
    written += [metrics(2, a=2.0), {"op": "tags", "values": {"t": "2"}}, {"op": "tags", "values": {"t": "3", "u": "1"}}]
    write_journal(tmp_path, *written)
    gateway = Gateway(MemoryMlflow())
    assert settle(tmp_path, gateway) == []
    sizes = [[len(part) for part in args[1:]] for name, args, _ in gateway.requests if name == "log_batch"]
    assert sizes == [
        [1, 70, 1],
        [1, 40, 1],
        [0, 0, 2],
    ]  # 100 params at most; a tag ends as its last value
    (run,) = gateway._mlflow.runs.values()
    assert run["tags"]["t"] == "3"


def test_one_refused_name_leaves_out_nothing_else(tmp_path, caplog):
    write_journal(tmp_path, *(metrics(step, **{"a": 1.0, "recall@5": 0.5, "b": 2.0}) for step in range(700)))
    gateway = Gateway(MemoryMlflow())
    assert settle(tmp_path, gateway) == ["metric recall@5 (700 times): invalid name"]
    (run,) = gateway._mlflow.runs.values()
    assert {key: len(points) for key, points in run["points"].items()} == {"a": 700, "b": 700}
    assert len([name for name, _, _ in gateway.requests if name == "log_batch"]) < 20
    assert len([record for record in caplog.records if "recall@5" in record.message]) == 1


def test_kill_between_sending_and_noting_doubles_nothing(tmp_path, monkeypatch):
    write_journal(tmp_path, *(metrics(step, a=1.0) for step in range(3)))
    memory = MemoryMlflow()
    save_state, sent = Journal.save_state, []

    def killed(self, **facts):
        if "offset" in facts and memory.runs and not sent:
            sent.append(facts)
            raise KeyboardInterrupt
        save_state(self, **facts)

    monkeypatch.setattr(Journal, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        settle(tmp_path, memory)
    assert settle(tmp_path, memory) == []
    (run,) = memory.runs.values()
    assert len(run["points"]["a"]) == 3


def add_model(tracked) -> None:
    (tracked.output_dir / "model").mkdir()
    (tracked.output_dir / "model" / "adapter_config.json").write_text("{}")
    (tracked.output_dir / "model" / "weights.safetensors").write_text("w")
    tracked.model("model", "m", {"r": 1}, 3)


@pytest.mark.parametrize("answer", ANSWERS)
def test_maintenance_during_training_loses_nothing(
    answer: str, mlflow_uri, mlflow_client, tmp_path, monkeypatch, caplog
):
    gateway = Gateway(mlflow_client)
    monkeypatch.setattr(tracker, "client", lambda _: gateway)
    with start_run(mlflow_uri, tmp_path) as tracked:
        tracked.metrics({"train/loss": 0.0}, 0)
        gateway.answer = lambda _: answer
        for step in range(1, 5):
            tracked.metrics({"train/loss": float(step)}, step)
        tracked.text("x", "evaluation/x.txt")
        add_model(tracked)
    assert "MLflow did not receive everything of this run" in caplog.text
    assert recovery.finish(tmp_path, "killed", "not used", mlflow_uri)
    assert not is_delivered(tmp_path)
    gateway.answer = lambda _: "on"
    assert recovery.finish(tmp_path, "killed", "not used", mlflow_uri) == []
    assert is_delivered(tmp_path)
    run = mlflow_client.get_run(tracked.run_id)
    assert run.info.status == "FINISHED"
    assert [point.step for point in mlflow_client.get_metric_history(tracked.run_id, "train/loss")] == [0, 1, 2, 3, 4]
    assert len(run.outputs.model_outputs) == 1
    where = f"tags.attempt = '{run.data.tags['attempt']}'"
    assert len(mlflow_client.search_runs([run.info.experiment_id], where, ViewType.ALL)) == 1


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_deleted_run_gets_the_rest_once_it_is_restored(what: str, mlflow_uri, mlflow_client, tmp_path, caplog):
    with start_run(mlflow_uri, tmp_path, f"tracking.experiment_name=deleted-{what}") as tracked:
        tracked.metrics({"loss": 0.0}, 0)
        experiment = mlflow_client.get_run(tracked.run_id).info.experiment_id
        one = tracked.run_id if what == "run" else experiment
        getattr(mlflow_client, f"delete_{what}")(one)
        tracked.metrics({"loss": 1.0}, 1)
    named = f"run {tracked.run_id}" if what == "run" else "experiment 'deleted-experiment'"
    said = f"{named} was deleted in MLflow: restore it there"
    assert said in caplog.text
    (problem,) = recovery.finish(tmp_path, "killed", "not used")
    assert said in problem
    assert f"qlora-exp sync {tmp_path}" in problem
    getattr(mlflow_client, f"restore_{what}")(one)
    assert recovery.finish(tmp_path, "killed", "not used") == []
    run = mlflow_client.get_run(tracked.run_id)
    assert (run.info.status, run.info.lifecycle_stage) == ("FINISHED", "active")
    assert len(mlflow_client.get_metric_history(tracked.run_id, "loss")) == 2


def test_run_that_was_deleted_while_it_was_interrupted_resumes(mlflow_uri, mlflow_client, tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt), start_run(mlflow_uri, tmp_path) as tracked:
        tracked.metrics({"loss": 0.0}, 0)
        raise KeyboardInterrupt
    mlflow_client.delete_run(tracked.run_id)
    with start_run(mlflow_uri, tmp_path) as tracked:
        tracked.metrics({"loss": 1.0}, 1)
    assert "restore it there" in caplog.text
    mlflow_client.restore_run(tracked.run_id)
    assert recovery.finish(tmp_path, "killed", "not used") == []
    assert mlflow_client.get_run(tracked.run_id).info.status == "FINISHED"
    assert len(mlflow_client.get_metric_history(tracked.run_id, "loss")) == 2


def test_resumed_run_logs_changed_params_as_tags(mlflow_uri, mlflow_client, tmp_path):
    with pytest.raises(KeyboardInterrupt), start_run(mlflow_uri, tmp_path) as tracked:
        tracked.params({"resolved.device_name": "one", "resolved.dtype": "float32"})
        raise KeyboardInterrupt
    with start_run(mlflow_uri, tmp_path) as tracked:
        tracked.params({"resolved.device_name": "another", "resolved.dtype": "float32"})
    data = mlflow_client.get_run(tracked.run_id).data
    assert data.params["resolved.device_name"] == "one"
    assert data.tags["resumed.resolved.device_name"] == "another"
    assert is_delivered(tmp_path)


@pytest.fixture
def undelivered(mlflow_uri, tmp_path, monkeypatch):
    """Write a run with a model and two files that MLflow has not received; return its folder."""
    with monkeypatch.context() as patched:
        patched.setattr(tracker, "client", lambda _: Gateway(None, lambda _: "error"))
        with start_run(mlflow_uri, tmp_path / "run", must_reach=False) as tracked:
            tracked.metrics({"after/loss": 2.0})
            tracked.text("x", "evaluation/x.txt")
            tracked.text("y", "evaluation/y.txt")
            add_model(tracked)
    return tmp_path / "run"


def sent_run(mlflow_client, folder, uri):
    run_id = json.loads((folder / "delivered.json").read_text())[uri]["run_id"]
    run = mlflow_client.get_run(run_id)
    models = mlflow_client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    return run, models


@pytest.mark.parametrize("gone", ["model", "model/weights.safetensors"])
def test_missing_files_are_named_until_they_are_back(gone: str, undelivered, mlflow_uri, mlflow_client):
    (undelivered / gone).rename(undelivered / "aside")
    (undelivered / "evaluation" / "y.txt").unlink()
    for _ in range(2):
        problems = recovery.finish(undelivered, "killed", "not used")
        assert [problem.partition(":")[0] for problem in problems] == ["file evaluation/y.txt", "model m"]
        assert "weights.safetensors: no such file" in problems[1]
        run, models = sent_run(mlflow_client, undelivered, mlflow_uri)
        assert run.info.status == "FINISHED"
        assert models == []
    (undelivered / "aside").rename(undelivered / gone)
    (problem,) = recovery.finish(undelivered, "killed", "not used")
    assert "evaluation/y.txt" in problem
    run, (model,) = sent_run(mlflow_client, undelivered, mlflow_uri)
    assert model.status == LoggedModelStatus.READY
    assert len(mlflow_client.list_logged_model_artifacts(model.model_id)) == 2 + 5  # and those of `pyfunc_files`
    (undelivered / "evaluation" / "y.txt").write_text("y")
    assert recovery.finish(undelivered, "killed", "not used") == []


def test_refused_metrics_do_not_keep_the_model_from_the_others(undelivered, mlflow_uri, mlflow_client):
    lines = (undelivered / FILE).read_text().splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if '"op": "model"' in line)
    values = {"after/lm_eval/qa (v2)/acc": 0.1, "after/lm_eval/qa/recall@5": 0.2, "after/a": 0.3, "after/b": 0.4}
    lines[at:at] = [json.dumps(metrics(0, **values)) + "\n"]
    (undelivered / FILE).write_text("".join(lines))
    problems = recovery.finish(undelivered, "killed", "not used")
    assert [problem.partition(" (2 times): Invalid value")[0] for problem in problems] == [
        "metric after/lm_eval/qa (v2)/acc",
        "metric after/lm_eval/qa/recall@5",
    ]
    run, (model,) = sent_run(mlflow_client, undelivered, mlflow_uri)
    kept = {"after/loss": 2.0, "after/a": 0.3, "after/b": 0.4}
    assert run.data.metrics == kept
    assert {metric.key: metric.value for metric in model.metrics} == kept
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert not is_delivered(undelivered)


def test_names_are_made_valid_where_metrics_are_logged(mlflow_uri, mlflow_client, tmp_path):
    with start_run(mlflow_uri, tmp_path) as tracked:
        tracked.metrics({"after/qa (v2)/recall@5": 0.5, "after/a=b,c": 1.0})
    expected = {"after/qa -v2-/recall-5": 0.5, "after/a-b-c": 1.0}
    assert mlflow_client.get_run(tracked.run_id).data.metrics == expected
    assert json.loads((tmp_path / FILE).read_text().splitlines()[-1])["metrics"] == expected


def test_message_of_a_newer_version_is_named(tmp_path):
    write_journal(tmp_path, {"op": "of tomorrow"}, metrics(1, a=1.0))
    memory = MemoryMlflow()
    (problem,) = settle(tmp_path, memory)
    assert "'of tomorrow'; update this one" in problem
    assert len(next(iter(memory.runs.values()))["points"]["a"]) == 1


@pytest.mark.parametrize("lost", ["status", "param", "tag", "artifact", "model", "points"])
def test_what_is_missing_is_named_and_sent_again(lost: str, mlflow_uri, mlflow_client, tmp_path, monkeypatch):
    """A server that says yes to some requests only."""
    refused = {
        "status": "set_terminated", "param": "log_batch", "tag": "log_batch", "artifact": "log_artifact",
        "model": "log_outputs", "points": "log_batch",
    }[lost]  # fmt: skip
    gateway = Gateway(mlflow_client)
    monkeypatch.setattr(tracker, "client", lambda _: gateway)
    with start_run(mlflow_uri, tmp_path) as tracked:
        tracked.metrics({"loss": 1.0}, 1)
        tracked.deliver_now()
        gateway.answer = lambda name: "empty" if name == refused else "on"
        tracked.metrics({"loss": 2.0}, 2)
        tracked.params({"only.here": 1})
        tracked.tags({"only.there": 1})
        tracked.text("x", "evaluation/x.txt")
        add_model(tracked)
    (*problems,) = recovery.finish(tmp_path, "killed", "not used")
    named = {
        "status": "status FINISHED: MLflow says RUNNING", "param": "params only.here", "tag": "tags only.there",
        "artifact": "artifacts", "model": "models m", "points": "1 of 2 points of loss",
    }[lost]  # fmt: skip
    assert any(problem.startswith(named) for problem in problems)
    gateway.answer = lambda _: "on"
    assert recovery.finish(tmp_path, "killed", "not used") == []


def test_messages_are_delivered_once_a_second(mlflow_uri, mlflow_client, tmp_path, monkeypatch):
    clock = itertools.count(1000.0, 0.1)
    monkeypatch.setattr("qlora_exp.tracking.tracker.time.monotonic", lambda: next(clock))
    gateway = Gateway(mlflow_client)
    monkeypatch.setattr(tracker, "client", lambda _: gateway)
    with start_run(mlflow_uri, tmp_path) as tracked:
        gateway.requests.clear()
        for step in range(50):
            tracked.metrics({"train/loss": float(step)}, step)
        assert 4 <= len([name for name, _, _ in gateway.requests if name == "log_batch"]) <= 10
        tracked.metrics({"after/loss": 1.0})
        tracked.deliver_now()
        assert mlflow_client.get_run(tracked.run_id).data.metrics == {"train/loss": 49.0, "after/loss": 1.0}
    assert len(mlflow_client.get_metric_history(tracked.run_id, "train/loss")) == 50


def test_folder_name_that_is_no_text_does_not_stop_a_run(mlflow_uri, mlflow_client, tmp_path):
    with start_run(mlflow_uri, tmp_path / "r\udcff") as tracked:
        tracked.tags({"note": "a\ud800b"})
    assert mlflow_client.get_run(tracked.run_id).info.status == "FINISHED"
    shutil.rmtree(tmp_path / "r\udcff")
