import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import cloudpickle
import psutil
import pytest

from qlora_exp.environment import turns
from qlora_exp.sweeps.fused import Place
from qlora_exp.sweeps.launchers import local
from qlora_exp.sweeps.launchers.local import Task, run_all


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch):
    monkeypatch.setattr(local, "GRACE_SECONDS", 3.0)


def task(folder: Path, call) -> Task:
    return Task(cloudpickle.dumps(call), folder)


def crash(number: int):
    return lambda: os.kill(os.getpid(), number)


def test_crash_of_one_job_does_not_affect_others(tmp_path):
    fine = [tmp_path / name for name in "abc"]
    endings = run_all(
        [
            task(tmp_path, fine[0].touch),
            task(tmp_path, crash(signal.SIGKILL)),
            task(tmp_path, crash(signal.SIGSEGV)),
            task(tmp_path, fine[1].touch),
            task(tmp_path, lambda: os._exit(3)),
            task(tmp_path, fine[2].touch),
        ]
    )
    assert all(file.exists() for file in fine)
    assert [ending and ending.outcome for ending in endings] == [None, "killed", "error", None, "error", None]
    assert "SIGSEGV" in endings[2].failure
    assert "exit code 3" in endings[4].failure


@pytest.mark.slow
def test_at_most_n_jobs_run_at_once(tmp_path):
    def job(number: int):
        def call() -> None:
            with (tmp_path / "log").open("a") as log:
                log.write(f"{time.monotonic()} 1\n")
                log.flush()
                time.sleep(0.2)
                log.write(f"{time.monotonic()} -1\n")

        return call

    folders = [tmp_path / str(number) for number in range(5)]
    for folder in folders:
        folder.mkdir()
    run_all([task(folder, job(number)) for number, folder in enumerate(folders)], n_jobs=2)
    events = sorted(
        (float(at), int(change)) for at, change in map(str.split, (tmp_path / "log").read_text().splitlines())
    )
    level = [sum(change for _, change in events[: index + 1]) for index in range(len(events))]
    assert max(level) == 2
    assert len(events) == 10


def test_output_of_parallel_jobs_is_kept_apart(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    run_all([task(folder, lambda name=folder.name: print(f"I am {name}")) for folder in folders], n_jobs=2)
    assert [(folder / local.OUTPUT_FILE).read_text() for folder in folders] == ["I am a\n", "I am b\n"]


def test_stopped_sweep_starts_no_job(tmp_path):
    stop = tmp_path / "stop"
    run_all([task(tmp_path, stop.touch), task(tmp_path, (tmp_path / "second").touch)], stopped=stop.exists)
    assert stop.exists()
    assert not (tmp_path / "second").exists()


def test_memory_of_a_job_is_released(tmp_path):
    def hungry() -> None:
        held = bytearray(200 * 1024**2)
        (tmp_path / "rss").write_text(str(psutil.Process().memory_info().rss + held[0]))

    before = psutil.Process().memory_info().rss
    run_all([task(tmp_path, hungry)] * 3)
    assert int((tmp_path / "rss").read_text()) > 200 * 1024**2
    assert psutil.Process().memory_info().rss - before < 50 * 1024**2


def test_oom_kill_is_distinguished_from_other_kills(tmp_path, monkeypatch):
    counts = iter([0, 1, 1])
    monkeypatch.setattr(local, "_oom_kills", lambda: next(counts, 1))
    endings = run_all([task(tmp_path, crash(signal.SIGKILL)), task(tmp_path, crash(signal.SIGKILL))])
    assert [one.outcome for one in endings] == ["oom", "killed"]


def test_simultaneous_oom_kills_are_both_recognized(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_oom_kills", lambda: len(list(tmp_path.glob("died*"))))
    both = tmp_path / "both"

    def crash_together(name: str):
        def call() -> None:
            (tmp_path / f"ready{name}").touch()
            while not both.exists():
                time.sleep(0.01)
            (tmp_path / f"died{name}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    def when_both_are_there() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.01)
        both.touch()

    threading.Thread(target=when_both_are_there).start()
    folders = [tmp_path / name for name in "ab"]
    endings = run_all([task(folder, crash_together(folder.name)) for folder in folders], n_jobs=2)
    assert [one.outcome for one in endings] == ["oom", "oom"]


def test_callback_is_called_for_each_dead_job(tmp_path):
    deaths = []
    run_all(
        [task(tmp_path, crash(signal.SIGSEGV)), task(tmp_path, (tmp_path / "second").touch)],
        stopped=lambda: bool(deaths),
        died=lambda: deaths.append(1),
    )
    assert deaths == [1]
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(("named", "found"), [("0,3", ["0", "3"]), ("", []), ("-1", []), ("GPU-abc", ["GPU-abc"])])
def test_visible_gpus_are_read_from_the_environment(named: str, found: list[str], monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert local.visible_gpus() == found


@pytest.mark.parametrize(
    ("gpus", "processes", "seen_by"), [(["2", "5"], 1, ["2", "5"]), (["2", "5", "6", "7"], 2, ["2,5", "6,7"])]
)
def test_parallel_jobs_get_one_gpu_for_each_process(gpus, processes, seen_by, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "visible_gpus", lambda: gpus)

    def job() -> None:
        time.sleep(0.2)
        with (tmp_path / "gpus").open("a") as seen:
            seen.write(os.environ["CUDA_VISIBLE_DEVICES"] + "\n")

    run_all([replace(task(tmp_path, job), processes=processes)] * 4, n_jobs=2)
    assert sorted((tmp_path / "gpus").read_text().split()) == sorted(seen_by * 2)


def test_jobs_get_the_environment_of_their_own_sweep(tmp_path, monkeypatch):
    def note() -> None:
        (tmp_path / os.environ["NAME_OF_SWEEP"]).touch()

    for name in ("first", "second"):  # the fork server started with the first or before
        monkeypatch.setenv("NAME_OF_SWEEP", name)
        assert run_all([task(tmp_path, note)]) == [None]
        assert (tmp_path / name).exists()


@pytest.fixture
def group(tmp_path):
    """Make the tasks of a group of jobs, each of which notes its process; some are killed with it."""

    def make(*names: str, at_once: int, killed: str = "") -> list[Task]:
        def job(name: str):
            def call() -> None:
                folder = tmp_path / name
                with (folder / "ran").open("a") as ran:
                    ran.write(f"{os.getpid()}\n")
                turns.pass_on()
                if name in killed and len((folder / "ran").read_text().split()) == 1:
                    os.kill(os.getpid(), signal.SIGKILL)

            return call

        for name in names:
            (tmp_path / name).mkdir()
        return [replace(task(tmp_path / name, job(name)), place=Place(0, False, at_once)) for name in names]

    def processes() -> dict[str, list[str]]:
        return {file.parent.name: file.read_text().split() for file in tmp_path.glob("*/ran")}

    make.processes = processes
    return make


def test_jobs_of_a_group_share_a_process_a_few_at_a_time(group):
    assert local.run_groups(group("a", "b", "c", "d", at_once=2)) == [None] * 4
    ran = group.processes()
    assert len(ran) == 4
    assert len({process for each in ran.values() for process in each}) == 1


def test_when_a_group_is_killed_its_jobs_that_had_not_begun_are_not_started(group):
    endings = local.run_groups(group("a", "b", "c", at_once=2, killed="a"))
    assert [ending and ending.outcome for ending in endings] == ["killed", "killed", None]
    assert "c" not in group.processes()


def test_when_a_group_is_killed_for_lack_of_memory_half_as_many_go_on_at_once(group, monkeypatch):
    counts = iter([0, 1])
    monkeypatch.setattr(local, "_oom_kills", lambda: next(counts, 1))
    assert local.run_groups(group("a", "b", "c", "d", "e", at_once=4, killed="a")) == [None] * 5
    ran = group.processes()
    assert {name: len(each) for name, each in ran.items()} == {"a": 2, "b": 2, "c": 2, "d": 2, "e": 1}
    assert len({each[-1] for each in ran.values()}) == 1  # the base is loaded once


def test_a_group_gets_further_jobs_as_its_jobs_end(group):
    first, *further = group("a", "b", "c", "d", at_once=2)
    asked = []

    def more(place: Place | None) -> list[Task]:
        asked.append(place)
        return [further.pop()] if place and further else []

    assert local.run_groups([first, further.pop(0)], more=more) == [None] * 4
    assert asked[0] == first.place
    assert asked[-1] is None  # once the group's process has ended, another could begin
    ran = group.processes()
    assert len(ran) == 4
    assert len({process for each in ran.values() for process in each}) == 1


def test_when_a_group_is_killed_for_lack_of_memory_its_further_jobs_go_on_too(group, monkeypatch):
    counts = iter([0, 1])
    monkeypatch.setattr(local, "_oom_kills", lambda: next(counts, 1))
    tasks = group("a", "b", "c", at_once=2, killed="c")
    further = [tasks[2]]
    endings = local.run_groups(tasks[:2], more=lambda place: [further.pop()] if place and further else [])
    assert endings == [None] * 3
    assert len(group.processes()["c"]) == 2  # it was killed, and went on


def test_a_group_that_waits_for_an_answer_ends_by_itself(group, monkeypatch):
    def more(place: Place | None) -> list[Task]:
        raise KeyboardInterrupt  # as Ctrl-C while the answer is made

    codes: list[int | None] = []
    end = local._end

    def observed(running) -> None:
        end(running)
        codes.extend(job.process.exitcode for job in running)

    monkeypatch.setattr(local, "GRACE_SECONDS", 60.0)
    monkeypatch.setattr(local, "_end", observed)
    with pytest.raises(KeyboardInterrupt):
        local.run_groups(group("a", "b", at_once=2), more=more)
    assert len(codes) == 1
    assert codes[0] != -signal.SIGKILL  # it was not killed for waiting


def test_a_free_process_gets_further_jobs(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    tasks = [task(folder, (folder / "ran").touch) for folder in folders]
    further = tasks[1:]
    endings = local.run_groups(tasks[:1], n_jobs=2, more=lambda place: [further.pop(0)] if further else [])
    assert endings == [None] * 3
    assert all((folder / "ran").exists() for folder in folders)


def test_a_further_job_that_dies_has_its_ending_last(tmp_path):
    further = [task(tmp_path, crash(signal.SIGKILL))]
    (one, other) = local.run_groups([task(tmp_path, lambda: None)], more=lambda place: further and [further.pop()])
    assert one is None
    assert other.outcome == "killed"
