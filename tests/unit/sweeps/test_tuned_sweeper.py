import json
import math
from pathlib import Path

import optuna
import pytest
from helpers.tracking import end_job
from optuna.trial import TrialState
from support import exit_code

from qlora_exp.results.compare import compare
from qlora_exp.results.records import find
from qlora_exp.results.report import table
from qlora_exp.sweeps import hydra_sweepers, search
from qlora_exp.sweeps.jobs import Ending
from qlora_exp.sweeps.sweep import Sweep

BEST = {"lora": 4e-3, "oft": 3e-4}
WORDS = [
    "train", "-m", "sweep=tuned_methods", "model=tiny_llama", "method=lora,oft", "training.max_steps=9",
    "training.learning_rate=tag(log,interval(1e-5,1e-1))", "tuning.n_trials=4", "tuning.reduction_factor=2", "seed=1,2",
]  # fmt: skip


@pytest.fixture
def run_tuned(monkeypatch, mlflow_uri, request):
    """Run a tuned comparison with made-up losses in place of training; `run_tuned.ran` are the configs that ran."""
    experiment = request.node.name[:40]

    def start(*words: str, fails=lambda config: "", stop_after=10**6) -> int:
        def launch(waiting, more):
            endings = []
            for job in waiting:
                config = job.config
                if len(start.ran) >= stop_after:
                    raise KeyboardInterrupt
                start.ran.append(config)
                if outcome := fails(config):
                    endings.append(Ending(outcome, "made up"))
                    continue
                off = math.log10(config.training.learning_rate / BEST[config.method.name])
                loss = 3 + off**2 + 1 / config.training.max_steps + 0.001 * (config.seed % 3)
                (job.folder / "model").mkdir()
                end_job(job, mlflow_uri, experiment, {"after/loss": loss, "after/rougeL": -loss})
                endings.append(None)
            return endings

        def begin(self, folder, settings, is_part=False):
            return Sweep(folder, settings, launch, is_part=is_part)

        monkeypatch.setattr(hydra_sweepers.JobSweeper, "begin", begin)
        monkeypatch.setattr(Sweep, "_compare", lambda self: None)  # drawing it takes longer than all else
        return exit_code(*WORDS, f"tracking.uri={mlflow_uri}", f"tracking.experiment_name={experiment}", *words)

    start.ran, start.uri, start.experiment = [], mlflow_uri, experiment
    return start


def test_each_row_gets_the_same_trials_and_its_winner_runs_with_every_seed(run_tuned, capsys):
    assert run_tuned() == 0
    shown = capsys.readouterr().out
    trials = [config for config in run_tuned.ran if config.dataset.evaluate_on == "validation"]
    finals = [config for config in run_tuned.ran if config.dataset.evaluate_on is None]
    lengths = [(config.method.name, config.training.max_steps) for config in trials]
    assert lengths == 4 * [("lora", 4)] + 4 * [("oft", 4)] + 2 * [("lora", 9)] + 2 * [("oft", 9)]
    assert {config.seed for config in trials} == {0}
    assert [(config.method.name, config.seed) for config in finals] == [
        (name, seed) for name in BEST for seed in (1, 2)
    ]
    assert {config.training.max_steps for config in finals} == {9}
    assert {config.dataset.validation_size for config in run_tuned.ran} == {0.1}
    for name, best in BEST.items():  # the tried rate that is nearest to the best
        tried = {config.training.learning_rate for config in trials if config.method.name == name}
        nearest = min(tried, key=lambda rate: abs(math.log(rate / best)))
        assert {config.training.learning_rate for config in finals if config.method.name == name} == {nearest}
        assert f"method={name}: learning_rate={nearest:.3g}: after/loss" in shown
    assert not [*Path("multirun/tuned_methods_trials").glob("*/model")]  # trials keep no weights
    assert len([*Path("multirun/tuned_methods").glob("*/model")]) == 4

    storage = search.storage(Path("multirun/tuned_methods_trials"))
    study = optuna.load_study(study_name="method=oft", storage=storage)
    assert [trial.state for trial in study.trials].count(TrialState.PRUNED) == 2
    assert study.best_params["training.learning_rate"] == pytest.approx(3e-4, rel=1.5)
    written = json.loads(Path("multirun/tuned_methods_trials/tuning.json").read_text())
    assert written["method=oft"]["budget"] == ["4 x training.max_steps=4", "2 x training.max_steps=9"]

    found = compare(find(run_tuned.uri, ["tuned_methods"], experiment=run_tuned.experiment))
    assert {row.name for row in found.rows} == {"method=lora", "method=oft"}
    assert found.rows[0].tuned.minutes == pytest.approx(6 / 60)
    headings, cells = table(found)
    assert cells[1][headings.index("tuned")].startswith("learning_rate=0.0")
    assert cells[1][headings.index("median trial")].endswith(" worse")
    assert not [line for line in found.warnings if "settings:" in line]
    run_tuned.ran.clear()
    assert run_tuned() == 0  # all is done
    assert not run_tuned.ran


def test_interrupted_tuning_resumes(run_tuned):
    assert run_tuned("method=oft", stop_after=0) == 130
    study = optuna.load_study(study_name=None, storage=search.storage(Path("multirun/tuned_methods_trials")))
    study.ask()  # as if the process had been killed before the trial had its values
    assert run_tuned("method=oft", stop_after=5) == 130
    assert run_tuned("method=oft") == 0
    assert len(run_tuned.ran) == 6 + 2  # nothing ran twice


def test_more_trials_continue_those_that_are_done(run_tuned):
    assert run_tuned("method=oft", "tuning.n_trials=3") == 0
    first = [config.training.learning_rate for config in run_tuned.ran if config.dataset.evaluate_on]
    run_tuned.ran.clear()
    assert run_tuned("method=oft", "tuning.n_trials=4", "tuning.reduction_factor=4") == 0
    assert run_tuned.ran[0].training.learning_rate not in first
    assert len([config for config in run_tuned.ran if config.dataset.evaluate_on]) == 1
    assert run_tuned("method=oft", "training.learning_rate=tag(log,interval(1e-5,1e-3))") == 1  # another range


def test_failed_trials_lose_and_a_row_without_a_good_one_is_left_out(run_tuned, capsys):
    def fails(config) -> str:
        return "nan" if config.training.learning_rate > 1e-3 or config.method.name == "oft" else ""

    assert run_tuned(fails=fails) == 1
    finals = [config for config in run_tuned.ran if config.dataset.evaluate_on is None]
    assert [(config.method.name, config.seed) for config in finals] == [("lora", 1), ("lora", 2)]
    assert finals[0].training.learning_rate <= 1e-3
    shown = capsys.readouterr()
    assert "trials that failed: 1" in shown.out
    assert "1 of 2 rows could not be tuned, and were not run: method=oft" in shown.err


@pytest.mark.thorough
def test_higher_is_better_where_it_is(run_tuned):
    assert run_tuned("method=oft", "tuning.metric=after/rougeL", "seed=5") == 0
    final = run_tuned.ran[-1]
    assert final.seed == 5
    assert final.training.learning_rate == pytest.approx(3e-4, rel=1.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset.validation_size=null"], "set dataset.validation_size, such as 0.1"),
        (["dataset.evaluate_on=validation"], "dataset.evaluate_on: a tuned comparison sets it itself"),
        (["seed=0,1"], "tuning.seed=0 is also the seed of a final run"),
        (["training.learning_rate=1e-4"], "tuning.tuned_keys: training.learning_rate has no values to try"),
        (["method.r=interval(2,8)"], "tuning.tuned_keys=[training.learning_rate,method.r]"),
        (["search.n_trials=3"], "this works only in a search; add hydra/sweeper=optuna"),
        (["tuning.metric=after/lm_eval/mmlu/acc"], "tuning.direction: must be set"),
        (["training.max_steps=1"], "too few to try runs of 1/2"),
        (["training.learning_rate=interval(1,1e-4)"], "search space"),
        (["training.learning_rate=interval(-1,1)"], "training.learning_rate"),
        (["tuning.n_trials=0"], "tuning.n_trials"),
        (["optimizer.loraplus_lr_ratio=8"], "would change nothing: it is for optimizer=loraplus"),
    ],
)
def test_what_would_not_be_a_fair_comparison_is_refused_before_any_job(words, message, tmp_path, capsys):
    assert exit_code(*WORDS, *words) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_settings_of_tuning_are_refused_elsewhere(capsys):
    assert exit_code("train", "-m", "method.r=4,8", "tuning.n_trials=3") == 1
    assert "this works only in a tuned comparison; add hydra/sweeper=tuned" in capsys.readouterr().err
    assert exit_code("train", "tuning.n_trials=3") == 1
    assert "it is for sweeps, and this is a single run: add -m" in capsys.readouterr().err


def test_dry_run_lists_the_first_trials_and_says_what_follows(tmp_path, capsys):
    assert exit_code(*WORDS, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert shown.count("training.max_steps=4") == 8
    assert "then for each of 2 rows: 2 with training.max_steps=9, 2 final runs" in shown
    assert not list(tmp_path.iterdir())


def test_missing_optuna_is_named(monkeypatch, capsys):
    monkeypatch.setattr(hydra_sweepers.importlib.util, "find_spec", lambda name: None)
    assert exit_code(*WORDS) == 1
    assert "hydra/sweeper=tuned needs the package optuna: pip install 'qlora-exp[optuna]'" in capsys.readouterr().err
