import pytest

optuna = pytest.importorskip("optuna")


def test_what_is_reported_to_a_reopened_trial_is_the_studys():
    from qlora_exp.libraries.optuna import reopened

    study = optuna.create_study()
    study.ask()
    number = study.ask().number
    reopened(study, number).report(0.5, 3)
    assert [trial.intermediate_values for trial in study.trials] == [{}, {3: 0.5}]
