import csv
import json
import re
import shutil
import sqlite3
from pathlib import Path

import pytest
from support import QUICK, exit_code

from qlora_exp.planning import screening
from qlora_exp.results.records import find
from qlora_exp.sweeps import jobs
from qlora_exp.sweeps.hydra_sweepers import JobSweeper
from qlora_exp.sweeps.jobs import Ending, Job
from qlora_exp.sweeps.sweep import Sweep
from qlora_exp.sweeps.worker import run_job
from qlora_exp.tracking import lifecycle, recovery, run_key
from qlora_exp.tracking.journal import FILE, last_message
from qlora_exp.tracking.mlflow_store import client
from qlora_exp.utils.errors import SweepError


@pytest.fixture(autouse=True)
def _comparison_only_where_it_is_tested(request, monkeypatch):
    """Drawing a comparison takes longer than the jobs."""
    if "compar" not in request.node.name:
        monkeypatch.setattr(Sweep, "_compare", lambda self: None)


@pytest.fixture
def make_jobs(make_config, mlflow_uri, tmp_path, request):
    """Make the jobs of a sweep over one key, in an MLflow experiment of the test's own."""

    def make(key: str, values: list[str], *overrides: str) -> list[Job]:
        words = [f"tracking.uri={mlflow_uri}", f"tracking.experiment_name={request.node.originalname}", "method=lora"]
        words += ["evaluation=loss_only", *overrides]
        swept = [{key: value} for value in values]
        choices = [[*words, f"{key}={value}"] for value in values]
        return jobs.jobs([make_config(*choice) for choice in choices], swept, choices, tmp_path / "multirun" / "test")

    return make


@pytest.fixture
def read_runs(mlflow_uri, request):
    """Runs of the test's experiment: the sweep's, and those of its jobs."""

    def read():
        found = client(mlflow_uri)
        runs = found.search_runs([found.get_experiment_by_name(request.node.originalname).experiment_id])
        return [run for run in runs if "sweep.keys" in run.data.tags], [r for r in runs if "run_key" in r.data.tags]

    return read


def in_process(waiting, more=None):
    """A launcher without processes."""
    for job in waiting:
        run_job(job.config, job.folder)
    return [None] * len(waiting)


def execute(todo: list[Job], launch=in_process):
    with Sweep(todo[0].folder.parent, todo[0].config.sweep, launch) as running:
        running.run(todo)


def never(waiting, more=None):
    pytest.fail(f"launched {waiting}")


def test_done_jobs_are_skipped_and_new_ones_run(make_jobs, read_runs, capsys):
    execute(make_jobs("seed", ["1", "2"]))
    execute(make_jobs("seed", ["1", "2"]), never)
    shown = capsys.readouterr().out
    assert shown.count("done in") == 2
    assert "table  qlora-exp compare test --uri sqlite:///" in shown
    launched = []
    execute(make_jobs("seed", ["1", "2", "3"]), lambda waiting, more: launched.extend(waiting) or in_process(waiting))
    assert [job.swept for job in launched] == [{"seed": "3"}]
    parents, children = read_runs()
    assert len(parents) == 1
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parents[0].info.run_id}
    assert sorted(child.info.run_name for child in children) == ["seed=1", "seed=2", "seed=3"]
    assert {child.data.tags["sweep.seed"] for child in children} == {"1", "2", "3"}
    assert parents[0].data.metrics == {"jobs": 3, "jobs_failed": 0}
    assert {run.info.status for run in (*parents, *children)} == {"FINISHED"}


def test_job_finished_in_another_folder_is_not_repeated(make_jobs, tmp_path, capsys):
    execute(make_jobs("seed", ["1"]))
    before = capsys.readouterr().out
    (tmp_path / "multirun").rename(tmp_path / "elsewhere")
    execute(make_jobs("seed", ["1"]), never)
    shown = capsys.readouterr().out
    assert "done as MLflow run" in shown
    loss = re.search(r"\b\d\.\d{4}\b", before)
    assert loss
    assert loss[0] in shown


def test_sweep_has_the_jobs_that_were_done_before_it(make_jobs, read_runs, tmp_path, mlflow_uri):
    execute(make_jobs("seed", ["1"]))
    (tmp_path / "multirun").rename(tmp_path / "elsewhere")
    execute(make_jobs("seed", ["1", "2"]))
    (sweep,) = [run for run in read_runs()[0] if run.data.metrics["jobs"] == 2]
    assert sorted(run.params["seed"] for run in find(mlflow_uri, [sweep.info.run_id])) == ["1", "2"]


def test_failed_jobs_are_repeated_only_on_request(make_jobs, read_runs, capsys):
    words = "training.max_length", ["5", "512"]
    with pytest.raises(SweepError, match="1 of 2 jobs"):
        execute(make_jobs(*words))
    assert "no token of the" in capsys.readouterr().out
    with pytest.raises(SweepError, match="1 of 2 jobs"):
        execute(make_jobs(*words), never)
    assert "sweep.rerun=failed" in capsys.readouterr().out
    launched = []
    with pytest.raises(SweepError):
        execute(
            make_jobs(*words, "sweep.rerun=failed"),
            lambda waiting, more: launched.extend(waiting) or in_process(waiting),
        )
    assert [job.swept["training.max_length"] for job in launched] == ["5"]
    assert launched[0].folder.with_name(f"{launched[0].folder.name}.1").is_dir()
    _, children = read_runs()
    assert sorted(child.data.tags["outcome"] for child in children) == ["error", "error", "ok"]


def test_job_that_cannot_begin_is_a_failed_run(make_jobs, read_runs, tmp_path, write_jsonl):
    rows = write_jsonl([{"question": "a", "completion": "b"}])
    own = ["dataset=own", "dataset.format=prompt_completion", f"dataset.path={rows}"]
    with pytest.raises(SweepError):
        execute(make_jobs("seed", ["1"], *own))
    _, (child,) = read_runs()
    assert (child.info.status, child.data.tags["outcome"]) == ("FAILED", "error")
    assert "no column 'prompt'" in child.data.tags["failure"]


def test_fail_fast_starts_no_job_after_a_failure(make_jobs):
    with pytest.raises(SweepError, match="2 of 2 jobs"):
        execute(make_jobs("training.max_length", ["5", "512"], "sweep.fail_fast=true"))
    with pytest.raises(SweepError, match="1 of 2 jobs"):
        execute(make_jobs("training.max_length", ["5", "512"]))  # the second was never begun


def test_dry_run_leaves_no_files(make_jobs, tmp_path, capsys):
    execute(make_jobs("seed", ["1"], "sweep.dry_run=true"), never)
    assert "new" in capsys.readouterr().out
    assert not (tmp_path / "multirun").exists()


def test_dead_job_is_recorded_with_its_cause(make_jobs, read_runs):
    def dies(waiting, more):
        for job in waiting:
            with lifecycle.start(job.config, job.folder, must_reach=False) as tracked:
                tracked.metrics({"train/loss": 1.0, "before/loss": 5.0}, 1)
                tracked.end = lambda *_, **__: None  # as a kill: nothing more is written
        return [Ending("oom", "the kernel killed it"), None]

    died = make_jobs("seed", ["1", "2"])
    with pytest.raises(SweepError):
        execute(died, dies)
    _, children = read_runs()
    found = {run.data.params["seed"]: (run.info.status, run.data.tags["outcome"]) for run in children}
    last = last_message(died[0].folder)
    assert (last["outcome"], last["metrics"]) == ("oom", {"before/loss": 5.0})  # what it had told is not lost
    assert found == {"1": ("FAILED", "oom"), "2": ("KILLED", "killed")}


def test_table_of_a_sweep_is_logged(make_jobs, read_runs, mlflow_uri):
    execute(make_jobs("seed", ["1"]))
    (parent,), _ = read_runs()
    path = client(mlflow_uri).download_artifacts(parent.info.run_id, "jobs.json")
    table = json.loads(Path(path).read_text())
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert (row["seed"], row["outcome"]) == ("1", "ok")
    assert float(row["loss"]) > 0


def test_sweep_writes_its_comparison_to_its_folder_and_mlflow(make_jobs, read_runs, mlflow_uri, tmp_path):
    execute(make_jobs("method.r", ["4", "8"]))
    files = {file.suffix: file for file in (tmp_path / "multirun" / "test").glob("comparison_*.*")}
    assert files.keys() == {".csv", ".json", ".md", ".tex", ".html"}
    with files[".csv"].open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["method.r"], row["seeds"]) for row in rows] == [("4", "1"), ("8", "1")]
    assert all(float(row["after/loss"]) > 0 and float(row["memory/rss_peak_mib"]) > 100 for row in rows)
    runs = [run for row in json.loads(files[".json"].read_text())["rows"] for run in row["runs"]]
    assert [run["metrics"]["after/loss"] for run in runs] == [float(row["after/loss"]) for row in rows]
    (parent,), _ = read_runs()
    kept = {one.path for one in client(mlflow_uri).list_artifacts(parent.info.run_id)}
    assert {file.name for file in files.values()} <= kept
    (figures,) = (tmp_path / "multirun" / "test").glob("comparison_*_figures")
    pictures = {one.path for one in client(mlflow_uri).list_artifacts(parent.info.run_id, figures.name)}
    assert pictures == {f"{figures.name}/{file.name}" for file in figures.iterdir()}
    assert {file.rpartition("/")[2] for file in pictures} >= {"ranked.svg", "ranked.png"}
    assert "| method.r |" in parent.data.tags["mlflow.note.content"]


def test_sweep_of_failed_jobs_has_no_comparison(make_jobs, read_runs, caplog):
    with pytest.raises(SweepError):
        execute(
            make_jobs("training.max_grad_norm", ["1", "2"]),
            lambda some, more: [Ending("killed", "gone")] * len(some),
        )
    assert "no comparison: none of these 2 runs succeeded" in caplog.text
    (parent,), _ = read_runs()
    assert parent.info.status == "FINISHED"


def test_failed_comparison_does_not_fail_the_sweep(make_jobs, read_runs, monkeypatch, caplog, capsys):
    def breaks(*_):
        raise RuntimeError("no picture")

    monkeypatch.setattr("qlora_exp.results.report.write", breaks)
    execute(make_jobs("seed", ["1"]))
    assert "no comparison: no picture" in caplog.text
    assert "files  " in capsys.readouterr().out
    (parent,), _ = read_runs()
    assert (parent.info.status, parent.data.metrics["jobs"]) == ("FINISHED", 1)


def test_sweep_compares_only_its_own_runs(make_jobs, read_runs, mlflow_uri, tmp_path):
    """A later run of the same key, such as a repetition that failed, is none of them."""
    execute(make_jobs("method.r", ["4"]))
    _, (child,) = read_runs()
    other = client(mlflow_uri).create_experiment(str(tmp_path))
    client(mlflow_uri).create_run(other, tags={"run_key": child.data.tags["run_key"], "outcome": "error"})
    execute(make_jobs("method.r", ["4", "8"]))
    newest = max((tmp_path / "multirun" / "test").glob("comparison_*.json"))
    told = [run for row in json.loads(newest.read_text())["rows"] for run in row["runs"]]
    assert [run["outcome"] for run in told] == ["ok", "ok"]
    assert child.info.run_id in [run["run_id"] for run in told]


def test_old_sweep_synced_late_does_not_replace_the_newest_view(make_jobs, mlflow_uri, request, tmp_path):
    execute(make_jobs("seed", ["1"]))
    mlflow = client(mlflow_uri)
    experiment = mlflow.get_experiment_by_name(request.node.name)
    key = "mlflow.sharedViewState.qlora_exp_newest_sweep"
    newer = json.dumps(json.loads(experiment.tags[key]) | {"createdAt": 10**15})
    mlflow.set_experiment_tag(experiment.experiment_id, key, newer)
    folder = tmp_path / "multirun" / "test"
    (folder / "delivered.json").unlink()
    assert recovery.finish(folder, "killed", "not used") == []
    assert mlflow.get_experiment(experiment.experiment_id).tags[key] == newer


def test_newest_sweep_has_a_view_in_mlflow(make_jobs, mlflow_uri, request):
    execute(make_jobs("seed", ["1"]))
    experiment = client(mlflow_uri).get_experiment_by_name(request.node.name)
    view = json.loads(experiment.tags["mlflow.sharedViewState.qlora_exp_newest_sweep"])
    state = json.loads(view["state"])
    assert view["name"] == "Sweep test"
    assert state["searchFilter"].startswith("tags.sweep = 'test'")
    assert "tags.`sweep.seed`" in state["selectedColumns"]


def test_jobs_lost_by_the_launcher_are_launched_again(make_jobs, read_runs):
    def gives_up(waiting, more):
        in_process(waiting[:1])
        raise RuntimeError("a worker was lost")

    execute(make_jobs("seed", ["1", "2", "3"]), gives_up)
    _, children = read_runs()
    assert [child.info.status for child in children] == ["FINISHED"] * 3


def test_launcher_that_starts_nothing_is_not_retried_forever(make_jobs, capsys):
    with pytest.raises(SweepError, match="2 of 2"):
        execute(make_jobs("seed", ["1", "2"]), lambda waiting, more: [None] * len(waiting))
    assert "not started" in capsys.readouterr().out


def test_job_that_dies_before_its_run_begins_is_recorded_and_not_repeated(make_jobs, read_runs):
    launched = []

    def launch(waiting, more):
        launched.extend(job.swept["seed"] for job in waiting)
        endings = [Ending("oom", "made up")]
        return endings + in_process(waiting[1:])

    with pytest.raises(SweepError, match="1 of 2 jobs"):
        execute(make_jobs("seed", ["1", "2"]), launch)
    assert launched == ["1", "2"]
    _, children = read_runs()
    assert sorted(child.data.tags["outcome"] for child in children) == ["ok", "oom"]
    assert {child.info.status for child in children} == {"FAILED", "FINISHED"}
    assert {child.data.tags["sweep.seed"] for child in children} == {"1", "2"}


def cut_off(job: Job) -> None:
    """As a kill leaves a job."""
    tags = json.loads((job.folder / jobs.JOB_FILE).read_text())["tags"]
    lifecycle._begin(job.config, job.folder, tags, must_reach=False).close()


def test_job_killed_at_its_time_limit_has_outcome_timeout(make_jobs, read_runs):
    def launch(waiting, more):
        cut_off(waiting[0])
        (waiting[0].folder / "out_of_time").touch()
        return [Ending("error", "the process died: exit code 1")]

    with pytest.raises(SweepError):
        execute(make_jobs("seed", ["1"], "sweep.timeout_minutes=1"), launch)
    _, (child,) = read_runs()
    assert child.data.tags["outcome"] == "timeout"


def test_interrupted_sweep_records_its_killed_jobs(make_jobs, read_runs):
    def launch(waiting, more):
        cut_off(waiting[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(make_jobs("seed", ["1", "2"]), launch)
    parents, children = read_runs()
    assert [run.info.status for run in (*parents, *children)] == ["KILLED", "KILLED"]


def test_sweep_killed_after_its_last_job_is_finished_by_the_next_start(make_jobs, read_runs):
    todo = make_jobs("seed", ["1"])
    with pytest.raises(ZeroDivisionError), Sweep(todo[0].folder.parent, todo[0].config.sweep, in_process) as running:
        running.run(todo)
        running._parent.close()  # as a kill: the journal has no end
        running._parent = None
        raise ZeroDivisionError
    ((parent,), _) = read_runs()
    assert parent.info.status == "RUNNING"
    execute(todo, never)
    ((parent,), _) = read_runs()
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["jobs"] == 1


def test_restarted_sweep_sends_what_mlflow_missed(make_jobs, read_runs):
    todo = make_jobs("seed", ["1"])
    execute(todo)
    states = json.loads((todo[0].folder / "delivered.json").read_text())
    (uri,) = states
    lines = (todo[0].folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    _, (child,) = read_runs()
    client(uri).update_run(child.info.run_id, status="RUNNING")
    states[uri]["offset"] = sum(map(len, lines[:-1]))
    (todo[0].folder / "delivered.json").write_text(json.dumps(states))
    execute(todo, never)
    _, (child,) = read_runs()
    assert child.info.status == "FINISHED"


def test_job_whose_data_were_edited_is_rejected(make_jobs, read_runs, write_jsonl):
    rows = write_jsonl([{"prompt": f"{number}+1=", "completion": str(number + 1)} for number in range(30)])
    own = ["dataset=own", f"dataset.path={rows}"]
    todo = make_jobs("seed", ["1"], *own)
    Path(rows).write_text(Path(rows).read_text().replace("7+1=", "7 + 1="))
    run_key.data_version.cache_clear()
    with pytest.raises(SweepError):
        execute(todo)
    _, (child,) = read_runs()
    assert "not the same data any more" in child.data.tags["failure"]


def test_jobs_exceeding_memory_are_skipped_without_failure(make_jobs, read_runs, capsys, monkeypatch):

    asked = []

    def unfit(configs, vram):
        asked.append((len(configs), vram))
        return ["" if one.seed == 1 else "does not fit: 99 GiB" for one in configs]

    monkeypatch.setattr(screening, "unfit", unfit)
    some = make_jobs("seed", ["1", "2"], "sweep.unfit=skip", "sweep.vram=8")
    execute(some)
    assert asked == [(2, 8.0)]
    shown = capsys.readouterr().out
    assert shown.count("does not fit: 99 GiB") == 2  # before and after
    _, runs = read_runs()
    assert len(runs) == 1
    execute(some, never)  # what is done is not planned again, and what does not fit is skipped again
    assert asked == [(2, 8.0), (1, 8.0)]


def test_sweep_whose_jobs_all_exceed_memory_runs_nothing(make_jobs, monkeypatch):

    monkeypatch.setattr(screening, "unfit", lambda configs, vram: ["too large"] * len(configs))
    some = make_jobs("seed", ["1", "2"], "sweep.unfit=skip")
    execute(some, never)
    assert not some[0].folder.parent.exists()


def test_jobs_exceeding_memory_are_rejected_on_request(make_jobs, monkeypatch):

    monkeypatch.setattr(screening, "unfit", lambda configs, vram: ["", "does not fit: 99 GiB"])
    with pytest.raises(SweepError, match="nothing was run; these jobs exceed memory:\nseed=2: does not fit: 99 GiB"):
        execute(make_jobs("seed", ["1", "2"], "sweep.unfit=refuse"), never)


def test_jobs_are_not_planned_by_default(make_jobs, monkeypatch):

    monkeypatch.setattr(screening, "unfit", never)
    execute(make_jobs("seed", ["1"]))


def test_damaged_journal_does_not_stop_other_jobs(make_jobs, capsys):
    damaged_at = (0, 3, 10**6)

    def cut_off(waiting, more):
        endings = in_process(waiting)
        for index, at in enumerate(damaged_at):
            file = waiting[index].folder / FILE
            lines = file.read_bytes().splitlines(keepends=True)[:-1]  # without its end
            lines[at:at] = [b'{"op": "met garbage\n']
            file.write_bytes(b"".join(lines))
            endings[index] = Ending("killed", "its process is gone")
        return endings

    seeds = ["1", "2", "3", "4"]
    with pytest.raises(SweepError, match="3 of 4 jobs"):
        execute(make_jobs("seed", seeds), cut_off)
    shown = re.sub(r"[│\s]", "", capsys.readouterr().out)  # a long path is continued on the next line
    assert shown.count("journal.jsonl") >= 3
    launched = []

    def again(waiting, more):
        launched.extend(waiting)
        return in_process(waiting[:1]) + [Ending("killed", "as above")] * 2

    with pytest.raises(SweepError, match="2 of 4 jobs"):
        execute(make_jobs("seed", seeds), again)
    assert [job.swept["seed"] for job in launched] == seeds[:3]
    assert all(job.folder.with_name(f"{job.folder.name}.1").is_dir() for job in launched)


def test_deleted_job_folder_does_not_stop_other_jobs(make_jobs, read_runs, monkeypatch):
    from qlora_exp.training import trainer

    train = trainer.train

    def deleted(sft_trainer, *rest):
        if sft_trainer.args.seed == 1:
            shutil.rmtree(folder)
        return train(sft_trainer, *rest)

    monkeypatch.setattr(trainer, "train", deleted)
    todo = make_jobs("seed", ["1", "2"])
    folder = todo[0].folder
    with pytest.raises(SweepError, match="1 of 2 jobs"):
        execute(todo)
    _, children = read_runs()
    assert sorted(child.info.status for child in children) == ["FAILED", "FINISHED"]
    assert not (folder / FILE).exists()


def test_restarted_sweep_sends_runs_that_the_store_lost(make_jobs, read_runs, mlflow_uri):
    todo = make_jobs("seed", ["1"])
    execute(todo)
    (parents, children) = read_runs()
    with sqlite3.connect(mlflow_uri.removeprefix("sqlite:///")) as database:
        for run in (*parents, *children):
            for table in ("latest_metrics", "metrics", "params", "tags", "runs"):
                database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (run.info.run_id,))
    database.close()
    execute(todo, never)
    ((parent,), (child,)) = read_runs()
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.metrics == children[0].data.metrics


@pytest.mark.slow
def test_tuned_comparison_chooses_on_validation_rows_and_scores_on_held_out_rows(monkeypatch, mlflow_uri, capsys):
    def begin(self, folder, settings, is_part=False):
        return Sweep(folder, settings, in_process, is_part=is_part)

    monkeypatch.setattr(JobSweeper, "begin", begin)
    words = [*QUICK, f"tracking.uri={mlflow_uri}", "tracking.experiment_name=tuned", "method=lora", "seed=1"]
    words += ["sweep=tuned_methods", "tuning.n_trials=2", "training.max_steps=2", "dataset.validation_size=5"]
    assert exit_code("train", "-m", *words) == 0
    shown = capsys.readouterr().out
    store = client(mlflow_uri)
    runs = store.search_runs([store.get_experiment_by_name("tuned").experiment_id], "tags.run_key LIKE '%'")
    trials = [run for run in runs if run.data.tags["sweep"] == "tuned_methods_trials"]
    (final,) = [run for run in runs if run not in trials]
    assert len(trials) == 2
    assert {run.data.params["data.evaluation_rows"] for run in trials} == {"4"}
    assert len({run.data.params["data.training_fingerprint"] for run in runs}) == 1
    assert len({run.data.params["data.evaluation_fingerprint"] for run in runs}) == 2
    best = min(trials, key=lambda run: run.data.metrics["after/loss"])
    assert final.data.params["training.learning_rate"] == best.data.params["training.learning_rate"]
    tuned = json.loads(final.data.tags["tuned"])
    assert tuned["best"] == best.data.metrics["after/loss"]
    assert f"after/loss {tuned['best']:.4f} on validation rows; trials: 2 x training.max_steps=2" in shown
