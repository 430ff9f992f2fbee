import json
from collections import deque
from types import SimpleNamespace

import optuna
import pytest
from filelock import FileLock
from helpers import plugins as packages
from helpers.tracking import end_job
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from qlora_exp.config.sections.sweep import SearchConfig, SweepConfig
from qlora_exp.sweeps import jobs, search
from qlora_exp.sweeps.jobs import Ending
from qlora_exp.sweeps.sweep import Sweep
from qlora_exp.utils.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4,8,16", CategoricalDistribution([4, 8, 16])),
        ("choice(lora,qlora)", CategoricalDistribution(["lora", "qlora"])),
        ("[q_proj],[q_proj,v_proj]", CategoricalDistribution(["[q_proj]", "[q_proj,v_proj]"])),
        ("true,false", CategoricalDistribution([True, False])),
        ("range(2,9,3)", CategoricalDistribution([2, 5, 8])),
        ("interval(0.1,0.5)", FloatDistribution(0.1, 0.5)),
        ("tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("int(interval(1,64))", IntDistribution(1, 64)),
        ("tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
    ],
)
def test_sweep_expression_becomes_a_distribution(text: str, expected):
    override = OverridesParser.create().parse_override(f"key={text}")
    assert search.distribution(override) == expected
    assert search.example(expected) in (4, "lora", "[q_proj]", True, 2, 0.1, 1e-5, 1)


IN_ORDER = SweepConfig()


@pytest.fixture(autouse=True)
def _no_comparison(monkeypatch):
    """Drawing a comparison of made-up results takes longer than all else."""
    monkeypatch.setattr(Sweep, "_compare", lambda self: None)


@pytest.fixture
def run_search(make_config, mlflow_uri, tmp_path, request):
    """Search over `training.warmup_steps` with a made-up loss in place of training; what was run, in order."""
    ran: list[dict] = []
    launched: list[int] = []
    space = {"training.warmup_steps": IntDistribution(0, 1000), "method.r": CategoricalDistribution([2, 4])}

    def ends(job: jobs.Job) -> None:
        values = job.config.training.warmup_steps, job.config.seed
        ran.append(dict(job.swept))
        metrics = {"after/loss": abs(values[0] - 600) + values[1], "memory/rss_peak_mib": float(values[0])}
        end_job(job, mlflow_uri, request.node.name, metrics)

    def start(
        *,
        seeds=(0,),
        fails=lambda number: False,
        stop_after=10**6,
        how=IN_ORDER,
        space=space,
        outcome="oom",
        refills=False,
        **settings,
    ):
        folder = tmp_path / "search"

        def launch(waiting, more):
            launched.append(len(waiting))
            endings, waiting = [], deque(waiting)
            while waiting:
                job = waiting.popleft()
                if len(ran) >= stop_after:
                    raise KeyboardInterrupt
                if fails(len(ran)):
                    ran.append(dict(job.swept))
                    endings.append(outcome and Ending(outcome, "made up"))
                else:
                    ends(job)
                    endings.append(None)
                if refills and len(waiting) < how.n_jobs * (1 if how.fuse == "off" else how.fuse):
                    place = json.loads((job.folder / jobs.JOB_FILE).read_text())["group"]
                    waiting.extend(more(place and jobs.Place(**place)))
            return endings

        def jobs_of(values):
            words = [[*(f"{key}={value}" for key, value in values.items()), f"seed={seed}"] for seed in seeds]
            swept = [{**{key: str(value) for key, value in values.items()}, "seed": str(seed)} for seed in seeds]
            base = ["method=lora", f"tracking.uri={mlflow_uri}", f"tracking.experiment_name={request.node.name}"]
            return jobs.jobs([make_config(*base, *word) for word in words], swept, words, folder)

        with Sweep(folder, how, launch) as running:
            return search.search(running, space, jobs_of, SearchConfig(**settings), how)

    start.ran, start.launched = ran, launched
    start.storage = lambda: optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "search" / search.STUDY_FILE))
    )
    start.trials = lambda: optuna.load_study(study_name=None, storage=start.storage()).trials
    return start


def test_search_finds_and_reports_better_values(run_search, tmp_path):
    (best,) = run_search(n_trials=12)
    assert best.value == min(trial.value for trial in run_search.trials())
    assert best.value < run_search.trials()[0].value
    (written,) = json.loads((tmp_path / "search" / search.BEST_FILE).read_text())
    assert written["params"] == best.params
    assert written["after/loss"] == best.value


def test_seeds_are_averaged_in_a_trial(run_search):
    run_search(n_trials=3, seeds=(1, 2, 6))
    assert len(run_search.ran) == 9
    for trial in run_search.trials():
        assert trial.value == abs(trial.params["training.warmup_steps"] - 600) + 3  # the mean of the seeds


def test_several_metrics_give_a_pareto_front(run_search):
    best = run_search(n_trials=12, metrics=["after/loss", "memory/rss_peak_mib"])
    assert all(len(trial.values) == 2 for trial in best)
    for one in best:
        assert not any(all(a < b for a, b in zip(two.values, one.values, strict=True)) for two in run_search.trials())


def test_interrupted_search_resumes(run_search):
    with pytest.raises(KeyboardInterrupt):
        run_search(n_trials=8, stop_after=4)
    assert [trial.state for trial in run_search.trials()] == 4 * [TrialState.COMPLETE] + [TrialState.RUNNING]
    run_search(n_trials=8)
    trials = run_search.trials()
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert len(trials) == len(run_search.ran) == 8  # nothing ran twice
    drawn = [trial.params["training.warmup_steps"] for trial in trials]
    assert len(set(drawn)) == 8  # nor was it drawn twice
    run_search(n_trials=8)
    assert len(run_search.ran) == 8


def test_parallel_trials_overlap(run_search):
    first = search.STARTUP_TRIALS
    run_search(n_trials=first + 3, how=SweepConfig(n_jobs=2))
    trials = run_search.trials()
    assert len(trials) == first + 3
    assert trials[first - 1].datetime_start < trials[0].datetime_complete  # drawn at random, so proposed ahead
    assert trials[first].datetime_start > trials[first - 1].datetime_complete
    assert trials[first + 1].datetime_start < trials[first].datetime_complete
    assert trials[first + 2].datetime_start > trials[first + 1].datetime_complete


def test_a_launcher_that_can_gets_the_next_trial_as_one_ends(run_search):
    first = search.STARTUP_TRIALS
    (best,) = run_search(n_trials=first + 6, how=SweepConfig(n_jobs=2), refills=True)
    trials = run_search.trials()
    assert len(trials) == len(run_search.ran) == first + 6
    for before, trial in zip(trials[first - 2 :], trials[first:], strict=False):
        assert before.datetime_complete < trial.datetime_start  # one of two has ended
        assert trial.datetime_start < trials[trial.number - 1].datetime_complete  # the other has not
    assert best.value < min(trial.value for trial in trials[:first])  # results were told in time to be learned from


def test_equal_values_do_not_run_twice_at_once_and_the_search_ends(run_search):
    space = {"method.r": CategoricalDistribution([2, 4, 8])}
    run_search(n_trials=16, how=SweepConfig(n_jobs=2), space=space, refills=True)
    assert sorted(job["method.r"] for job in run_search.ran) == ["2", "4", "8"]
    assert {trial.state for trial in run_search.trials()} == {TrialState.COMPLETE}
    assert len(run_search.trials()) == 16


def test_a_trial_that_cannot_join_the_group_runs_when_it_has_ended(run_search):
    space = {
        "training.warmup_steps": IntDistribution(0, 1_000_000),
        "training.gradient_checkpointing": CategoricalDistribution([True, False]),
    }
    run_search(n_trials=22, how=SweepConfig(fuse=2), space=space, refills=True)
    assert {trial.state for trial in run_search.trials()} == {TrialState.COMPLETE}
    assert len(run_search.trials()) == len(run_search.ran) == 22
    assert run_search.launched[0] == search.STARTUP_TRIALS
    assert 1 in run_search.launched  # its base is computed in another way than the group's


def test_what_fails_while_a_place_is_filled_ends_no_job_and_is_raised_then(run_search, monkeypatch):
    first, asked = search.STARTUP_TRIALS, []
    prepared = Sweep._prepared

    def fails(self, *arguments):
        asked.append(len(run_search.ran))
        if len(asked) == 3:
            raise ConfigError("the store is away")
        return prepared(self, *arguments)

    monkeypatch.setattr(Sweep, "_prepared", fails)
    with pytest.raises(ConfigError, match="the store is away"):
        run_search(n_trials=first + 6, how=SweepConfig(n_jobs=2), refills=True)
    assert asked == [0, first - 1, first]
    assert len(run_search.ran) == first + 1  # the trial that was running has ended
    run_search(n_trials=first + 6, how=SweepConfig(n_jobs=2), refills=True)
    assert len(run_search.ran) == first + 6


def test_a_failure_to_tell_while_others_run_is_raised_when_they_have_ended(run_search):
    with pytest.raises(ConfigError, match="jobs have no metric 'after/los'"):
        run_search(n_trials=14, how=SweepConfig(n_jobs=2), refills=True, metrics=["after/los"], directions=["minimize"])
    assert len(run_search.ran) == search.STARTUP_TRIALS


def test_a_random_search_proposes_all_trials_ahead_and_runs_equal_ones_once(run_search):
    space = {"method.r": CategoricalDistribution([2, 4])}
    run_search(n_trials=12, how=SweepConfig(n_jobs=2), space=space, sampler="random")
    assert len(run_search.trials()) == 12
    assert sorted(job["method.r"] for job in run_search.ran) == ["2", "4"]
    assert {trial.state for trial in run_search.trials()} == {TrialState.COMPLETE}


def test_failed_job_is_a_failed_trial_and_the_search_continues(run_search):
    with pytest.raises(Exception, match="did not end well"):
        run_search(n_trials=4, fails=lambda number: number == 1)
    states = [trial.state for trial in run_search.trials()]
    assert states.count(TrialState.FAIL) == 1
    assert states.count(TrialState.COMPLETE) == 3
    run_search.ran.clear()
    with pytest.raises(Exception, match="1 of 4 jobs did not end well"):
        run_search(n_trials=4)
    assert run_search.ran == []
    run_search(n_trials=4, how=SweepConfig(rerun="failed"))
    assert len(run_search.ran) == 1
    assert [trial.state for trial in run_search.trials()].count(TrialState.COMPLETE) == 4
    run_search(n_trials=4, how=SweepConfig(rerun="failed"))
    assert len(run_search.ran) == 1


def test_killed_job_resumes_when_the_search_restarts(run_search):
    with pytest.raises(Exception, match="1 of 3 jobs did not end well"):
        run_search(n_trials=3, fails=lambda number: number == 1, outcome="killed")
    assert [trial.state for trial in run_search.trials()].count(TrialState.RUNNING) == 1
    run_search(n_trials=3)
    assert len(run_search.ran) == 4
    assert {trial.state for trial in run_search.trials()} == {TrialState.COMPLETE}


def test_launcher_failure_consumes_no_trials(run_search):
    with pytest.raises(Exception, match="1 of 1 jobs did not end well"):
        run_search(n_trials=5, fails=lambda number: True, outcome=None)
    run_search.ran.clear()
    run_search(n_trials=5)
    assert len(run_search.ran) == 5
    assert {trial.state for trial in run_search.trials()} == {TrialState.COMPLETE}


def test_every_choice_is_tried_before_any_repeats(run_search):
    run_search(n_trials=4, space={"method.r": CategoricalDistribution([2, 4, 8, 16])})
    assert sorted(trial.params["method.r"] for trial in run_search.trials()) == [2, 4, 8, 16]


def test_study_without_results_is_replaced(run_search):
    with pytest.raises(ConfigError, match="did you mean"):
        run_search(n_trials=1, metrics=["after/los"])
    run_search(n_trials=1)
    assert len(run_search.trials()) == 1


def test_resumed_search_shows_earlier_trials(run_search, capsys):
    run_search(n_trials=2)
    run_search(n_trials=3)
    assert capsys.readouterr().out.count("│ ok ") == 2 + 3


def test_concurrent_search_in_one_folder_is_rejected(run_search, tmp_path):
    (tmp_path / "search").mkdir()
    with (
        FileLock(tmp_path / "search" / f"{search.STUDY_FILE}.running"),
        pytest.raises(ConfigError, match="another process is searching"),
    ):
        run_search(n_trials=2)
    assert run_search.ran == []


def test_trial_without_values_after_a_kill_is_failed(run_search):
    run_search(n_trials=1)
    storage = run_search.storage()
    optuna.load_study(study_name=None, storage=storage).ask()
    run_search(n_trials=3)
    assert [trial.state for trial in run_search.trials()].count(TrialState.FAIL) == 1
    assert len(run_search.ran) == 2


def test_changed_space_or_directions_are_rejected(run_search):
    run_search(n_trials=1)
    with pytest.raises(ConfigError, match=r"method\.r, training\.warmup_steps: differs from what the study"):
        run_search(n_trials=2, space={"method.r": CategoricalDistribution([2, 8])})
    with pytest.raises(ConfigError, match=r"search\.directions: differs from what the study"):
        run_search(n_trials=2, directions=["maximize"])


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("after/loss", "MINIMIZE"),
        ("memory/rss_peak_mib", "MINIMIZE"),
        ("after/rougeL", "MAXIMIZE"),
        ("mfu", "MAXIMIZE"),
    ],
)
def test_search_without_directions_goes_for_the_better_value(tmp_path, metric: str, direction: str):
    study = search._study(tmp_path, SearchConfig(metrics=[metric]), {})
    assert study.direction.name == direction


def test_search_for_a_score_of_lm_eval_needs_its_direction(tmp_path):
    with pytest.raises(ConfigError, match=r"search\.directions: must be set"):
        search._study(tmp_path, SearchConfig(metrics=["after/lm_eval/arc_easy/acc"]), {})


def test_unknown_metric_is_named(run_search):
    with pytest.raises(ConfigError, match="did you mean 'after/loss'"):
        run_search(n_trials=2, metrics=["after/los"])


def test_changed_metrics_are_rejected(run_search):
    run_search(n_trials=1)
    with pytest.raises(ConfigError, match=r"sweep\.name=ANOTHER"):
        run_search(n_trials=2, metrics=["memory/rss_peak_mib"])


IMPOSSIBLE = {"quantization": CategoricalDistribution(["none", "nf4"]), "method": CategoricalDistribution(["qlora"])}


def test_values_that_cannot_run_are_a_failed_trial(run_search, caplog):
    run_search(n_trials=4, space={**IMPOSSIBLE, "training.warmup_steps": IntDistribution(0, 9)}, sampler="random")
    trials = run_search.trials()
    assert len(trials) == 4
    states = {trial.params["quantization"]: trial.state for trial in trials}
    assert states == {"none": TrialState.FAIL, "nf4": TrialState.COMPLETE}
    assert "cannot run and counts as failed: method=qlora needs a quantized base" in caplog.text
    run_search(n_trials=6, space={**IMPOSSIBLE, "training.warmup_steps": IntDistribution(0, 9)}, sampler="random")
    assert len(run_search.trials()) == 6


def test_search_with_a_stuck_trial_goes_on(run_search, tmp_path):
    (tmp_path / "search").mkdir()
    study = search._study(tmp_path / "search", SearchConfig(), IMPOSSIBLE)
    study.enqueue_trial({"quantization": "none", "method": "qlora"})
    study.ask(IMPOSSIBLE)  # a process that was stopped here left it running
    (best,) = run_search(n_trials=2, space=IMPOSSIBLE)
    assert best.params["quantization"] == "nf4"
    assert [trial.state for trial in run_search.trials()] == [TrialState.FAIL, TrialState.COMPLETE]
    run_search(n_trials=2, space=IMPOSSIBLE, how=SweepConfig(rerun="failed"))  # ends, although one fails again
    assert TrialState.RUNNING not in [trial.state for trial in run_search.trials()]


def test_direction_is_the_one_that_a_package_declares_for_its_metric(monkeypatch, tmp_path):
    packages.install(monkeypatch, tmp_path / "a", "declares", packages.METRICS, "shared_words length")
    assert search.direction("after/metric/shared_words", "k") == "maximize"
    assert search.direction("before/metric/length", "k") == "minimize"
    with pytest.raises(ConfigError, match="no metric 'gone'"):
        search.direction("after/metric/gone", "k")


def test_trial_whose_metric_failed_counts_as_failed(monkeypatch, tmp_path, caplog):
    packages.install(monkeypatch, tmp_path / "a", "fails_once", packages.METRICS, "length")
    space = {"training.warmup_steps": CategoricalDistribution([1, 2, 3])}

    def ended(job):
        return {"outcome": "ok", "metrics": {"after/metric/length": 1.0 / job.steps} if job.steps != 2 else {}}

    def jobs_of(values):
        return [SimpleNamespace(key="k", steps=values["training.warmup_steps"], folder=tmp_path)]

    sweep = SimpleNamespace(folder=tmp_path / "search", register=lambda _: None, run=lambda *_: None, ended=ended)
    settings = SearchConfig(n_trials=3, metrics=["after/metric/length"])
    (best,) = search.search(sweep, space, jobs_of, settings, IN_ORDER)
    assert (best.params, best.value) == ({"training.warmup_steps": 3}, 1 / 3)
    assert "counts as failed: after/metric/length is not measured" in caplog.text
    with pytest.raises(ConfigError, match="jobs have no metric 'after/los'; did you mean 'after/loss'"):
        search.values({"after/loss": 1.0}, ["after/los"])
