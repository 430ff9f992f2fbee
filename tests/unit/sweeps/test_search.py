import json

import optuna
import pytest
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from qlora_exp.config.sections.sweep import SearchConfig, SweepConfig
from qlora_exp.sweeps import jobs, search
from qlora_exp.sweeps.jobs import Ending
from qlora_exp.sweeps.sweep import Sweep
from qlora_exp.tracking.journal import Journal
from qlora_exp.training.pruning import judge
from qlora_exp.utils.errors import ConfigError, PrunedError


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
def test_a_sweep_is_the_space_of_a_search(text: str, expected):
    override = OverridesParser.create().parse_override(f"key={text}")
    assert search.distribution(override.value()) == expected
    assert search.example(expected) in (4, "lora", "[q_proj]", True, 2, 0.1, 1e-5, 1)


IN_ORDER = SweepConfig()


@pytest.fixture
def study(config, store, tmp_path):
    """Search over `training.warmup_steps` with a made-up loss in place of training; what was run, in order."""
    ran: list[dict] = []
    space = {"training.warmup_steps": IntDistribution(0, 1000), "method.r": CategoricalDistribution([2, 4])}

    def ends(job: jobs.Job) -> None:
        values = job.config.training.warmup_steps, job.config.seed
        ran.append(dict(job.swept))
        journal = Journal(job.folder)
        metrics = {"after/loss": abs(values[0] - 600) + values[1], "memory/rss_peak_mib": float(values[0])}
        begin = {"uri": store, "experiment": "search", "run_name": "made up", "timestamp": 1}
        journal.append({"op": "start", **begin, "tags": {"attempt": job.key}})
        end = {"status": "FINISHED", "timestamp": 2, "outcome": "ok", "seconds": 1.0}
        journal.append({"op": "end", **end, "metrics": metrics})
        journal.close()

    def start(
        *,
        seeds=(0,),
        fails=lambda number: False,
        stop_after=10**6,
        how=IN_ORDER,
        space=space,
        outcome="oom",
        **settings,
    ):
        folder = tmp_path / "search"

        def launch(waiting):
            endings = []
            for job in waiting:
                if len(ran) >= stop_after:
                    raise KeyboardInterrupt
                if fails(len(ran)):
                    ran.append(dict(job.swept))
                    endings.append(outcome and Ending(outcome, "made up"))
                else:
                    ends(job)
                    endings.append(None)
            return endings

        def jobs_of(values):
            words = [[*(f"{key}={value}" for key, value in values.items()), f"seed={seed}"] for seed in seeds]
            swept = [{**{key: str(value) for key, value in values.items()}, "seed": str(seed)} for seed in seeds]
            base = ["method=lora", f"tracking.uri={store}", "tracking.experiment_name=search"]
            return jobs.jobs([config(*base, *word) for word in words], swept, words, folder)

        with Sweep(folder, how, launch) as running:
            return search.search(running, space, jobs_of, SearchConfig(**settings), how)

    start.ran = ran
    start.storage = lambda: optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "search" / search.STUDY_FILE))
    )
    start.trials = lambda: optuna.load_study(study_name=None, storage=start.storage()).trials
    return start


def test_a_search_finds_better_values_and_says_which(study, tmp_path):
    (best,) = study(n_trials=12)
    assert best.value == min(trial.value for trial in study.trials())
    assert best.value < study.trials()[0].value
    (written,) = json.loads((tmp_path / "search" / search.BEST_FILE).read_text())
    assert written["params"] == best.params
    assert written["after/loss"] == best.value


def test_seeds_are_repeats_of_a_trial(study):
    study(n_trials=3, seeds=(1, 2, 6))
    assert len(study.ran) == 9
    for trial in study.trials():
        assert trial.value == abs(trial.params["training.warmup_steps"] - 600) + 3  # the mean of the seeds


def test_several_metrics_give_a_front(study):
    best = study(n_trials=12, metrics=["after/loss", "memory/rss_peak_mib"])
    assert all(len(trial.values) == 2 for trial in best)
    for one in best:
        assert not any(all(a < b for a, b in zip(two.values, one.values, strict=True)) for two in study.trials())


def test_a_search_that_was_cut_off_goes_on(study):
    with pytest.raises(KeyboardInterrupt):
        study(n_trials=8, stop_after=4)
    assert [trial.state for trial in study.trials()] == 4 * [TrialState.COMPLETE] + [TrialState.RUNNING]
    study(n_trials=8)
    trials = study.trials()
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert len(trials) == len(study.ran) == 8  # nothing ran twice
    drawn = [trial.params["training.warmup_steps"] for trial in trials]
    assert len(set(drawn)) == 8  # nor was it drawn twice
    study(n_trials=8)
    assert len(study.ran) == 8


def test_trials_side_by_side(study):
    study(n_trials=5, how=SweepConfig(n_jobs=2))
    trials = study.trials()
    assert len(trials) == 5
    assert trials[1].datetime_start < trials[0].datetime_complete
    assert trials[2].datetime_start > trials[1].datetime_complete


def test_a_failed_job_is_a_failed_trial_and_the_search_goes_on(study):
    with pytest.raises(Exception, match="did not end well"):
        study(n_trials=4, fails=lambda number: number == 1)
    states = [trial.state for trial in study.trials()]
    assert states.count(TrialState.FAIL) == 1
    assert states.count(TrialState.COMPLETE) == 3
    study.ran.clear()
    with pytest.raises(Exception, match="1 of 4 jobs did not end well"):
        study(n_trials=4)
    assert study.ran == []
    study(n_trials=4, how=SweepConfig(rerun="failed"))
    assert len(study.ran) == 1
    assert [trial.state for trial in study.trials()].count(TrialState.COMPLETE) == 4
    study(n_trials=4, how=SweepConfig(rerun="failed"))
    assert len(study.ran) == 1


def test_a_killed_job_goes_on_when_the_search_is_started_again(study):
    with pytest.raises(Exception, match="1 of 3 jobs did not end well"):
        study(n_trials=3, fails=lambda number: number == 1, outcome="killed")
    assert [trial.state for trial in study.trials()].count(TrialState.RUNNING) == 1
    study(n_trials=3)
    assert len(study.ran) == 4
    assert {trial.state for trial in study.trials()} == {TrialState.COMPLETE}


def test_a_launcher_that_cannot_start_uses_up_no_trials(study):
    with pytest.raises(Exception, match="1 of 1 jobs did not end well"):
        study(n_trials=5, fails=lambda number: True, outcome=None)
    study.ran.clear()
    study(n_trials=5)
    assert len(study.ran) == 5
    assert {trial.state for trial in study.trials()} == {TrialState.COMPLETE}


def test_of_a_few_choices_each_is_tried_before_one_is_again(study):
    study(n_trials=4, space={"method.r": CategoricalDistribution([2, 4, 8, 16])})
    assert sorted(trial.params["method.r"] for trial in study.trials()) == [2, 4, 8, 16]


def test_a_study_that_found_nothing_gives_way(study):
    with pytest.raises(ConfigError, match="did you mean"):
        study(n_trials=1, metrics=["after/los"])
    study(n_trials=1)
    assert len(study.trials()) == 1


def test_what_a_search_found_before_is_in_its_table_again(study, capsys):
    study(n_trials=2)
    study(n_trials=3)
    assert capsys.readouterr().out.count("│ ok ") == 2 + 3


def test_one_process_searches_at_a_time(study, tmp_path):
    (tmp_path / "search").mkdir()
    with (
        FileLock(tmp_path / "search" / f"{search.STUDY_FILE}.running"),
        pytest.raises(ConfigError, match="another process is searching"),
    ):
        study(n_trials=2)
    assert study.ran == []


def test_a_trial_that_a_kill_left_without_values_is_none(study):
    study(n_trials=1)
    storage = study.storage()
    optuna.load_study(study_name=None, storage=storage).ask()
    study(n_trials=3)
    assert [trial.state for trial in study.trials()].count(TrialState.FAIL) == 1
    assert len(study.ran) == 2


def test_a_study_keeps_to_its_space_and_directions(study):
    study(n_trials=1)
    with pytest.raises(ConfigError, match=r"method\.r, training\.warmup_steps: not what the study"):
        study(n_trials=2, space={"method.r": CategoricalDistribution([2, 8])})
    with pytest.raises(ConfigError, match=r"search\.directions: not what the study"):
        study(n_trials=2, directions=["maximize"])


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
    with pytest.raises(ConfigError, match=r"search\.directions: give them"):
        search._study(tmp_path, SearchConfig(metrics=["after/lm_eval/arc_easy/acc"]), {})


def test_a_metric_that_jobs_do_not_have_is_named(study):
    with pytest.raises(ConfigError, match="did you mean 'after/loss'"):
        study(n_trials=2, metrics=["after/los"])


def test_a_study_keeps_to_its_metrics(study):
    study(n_trials=1)
    with pytest.raises(ConfigError, match=r"sweep\.name=ANOTHER"):
        study(n_trials=2, metrics=["memory/rss_peak_mib"])


def test_a_job_that_does_worse_than_earlier_trials_is_pruned(tmp_path):
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / search.STUDY_FILE))
    )
    study = optuna.create_study(storage=storage, study_name="after/loss")
    for _ in range(4):
        trial = study.ask()
        for step in (1, 2):
            trial.report(1.0, step)
        study.tell(trial, 1.0)
    good, bad = (judge({"file": str(tmp_path / search.STUDY_FILE), "trial": study.ask().number}) for _ in range(2))
    good(0.9, 1)
    good(0.8, 2)
    with pytest.raises(PrunedError, match="at step 1 is worse"):
        bad(1.1, 1)


def test_settings_that_contradict_each_other_are_refused(config):
    with pytest.raises(ConfigError, match="one for each of metrics"):
        config("search.directions=[minimize,maximize]")
    for metrics in (["after/loss", "memory/rss_peak_mib"], ["after/rougeL"]):
        with pytest.raises(ConfigError, match="judges by the held-out loss"):
            config("search.prune=true", f"search.metrics=[{','.join(metrics)}]")
    with pytest.raises(ConfigError, match="minimized"):
        config("search.prune=true", "search.directions=[maximize]")
    with pytest.raises(ConfigError, match="training.eval_strategy=steps"):
        config("search.prune=true")
