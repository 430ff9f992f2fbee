import json

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from qlora_exp import jobs, search
from qlora_exp.errors import ConfigError, PrunedError
from qlora_exp.journal import Journal
from qlora_exp.schema import SearchConfig, SweepConfig
from qlora_exp.sweep import Ending, Sweep


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
        journal.append({"op": "start", "uri": store, "tags": {}})
        journal.append({"op": "end", "outcome": "ok", "seconds": 1.0, "metrics": metrics})
        journal.close()

    def start(*, seeds=(0,), fails=lambda number: False, stop_after=10**6, at_once=1, **settings):
        folder = tmp_path / "search"

        def launch(waiting):
            endings = []
            for job in waiting:
                if len(ran) >= stop_after:
                    raise KeyboardInterrupt
                if fails(len(ran)):
                    ran.append(dict(job.swept))
                    endings.append(Ending("oom", "made up"))
                else:
                    ends(job)
                    endings.append(None)
            return endings

        def jobs_of(values):
            words = [[*(f"{key}={value}" for key, value in values.items()), f"seed={seed}"] for seed in seeds]
            swept = [{**{key: str(value) for key, value in values.items()}, "seed": str(seed)} for seed in seeds]
            base = ["method=lora", f"tracking.uri={store}", "tracking.experiment_name=search"]
            return jobs.jobs([config(*base, *word) for word in words], swept, words, folder)

        with Sweep(folder, SweepConfig(), launch) as running:
            return search.search(running, space, jobs_of, SearchConfig(**settings), at_once)

    start.ran = ran
    start.trials = lambda: (
        optuna.load_study(
            study_name=None,
            storage=optuna.storages.JournalStorage(
                optuna.storages.journal.JournalFileBackend(str(tmp_path / "search" / search.STUDY_FILE))
            ),
        ).trials
    )
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
    study(n_trials=5, at_once=2)
    assert len(study.trials()) == 5


def test_a_failed_job_is_a_failed_trial_and_the_search_goes_on(study):
    with pytest.raises(Exception, match="did not end well"):
        study(n_trials=4, fails=lambda number: number == 1)
    states = [trial.state for trial in study.trials()]
    assert states.count(TrialState.FAIL) == 1
    assert states.count(TrialState.COMPLETE) == 3


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
    good, bad = (
        search.judge({"file": str(tmp_path / search.STUDY_FILE), "trial": study.ask().number}) for _ in range(2)
    )
    good(0.9, 1)
    good(0.8, 2)
    with pytest.raises(PrunedError, match="at step 1 is worse"):
        bad(1.1, 1)


def test_settings_that_contradict_each_other_are_refused(config):
    with pytest.raises(ConfigError, match="one for each of metrics"):
        config("search.directions=[minimize,maximize]")
    with pytest.raises(ConfigError, match="single metric"):
        config("search.prune=true", "search.metrics=[after/loss,memory/rss_peak_mib]")
    with pytest.raises(ConfigError, match="training.eval_strategy=steps"):
        config("search.prune=true")
