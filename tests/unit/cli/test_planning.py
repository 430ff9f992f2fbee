import pytest
from support import exit_code


@pytest.mark.parametrize("command", ["plan", "advise"])
@pytest.mark.parametrize(("word", "option"), [("vram=24", "--vram 24"), ("gpu=t4", "--gpu t4")])
def test_an_option_written_as_a_key_is_refused_with_the_option(command: str, word: str, option: str, capsys):
    assert exit_code(command, "model=tiny_llama", word) == 1
    assert f"no such key or group; did you mean {option}?" in capsys.readouterr().err


def test_a_tuned_comparison_is_planned_with_its_trials(capsys):
    words = ["hydra/sweeper=tuned", "model=tiny_llama", "method.r=2,4", "seed=1,2", "dataset.validation_size=0.1"]
    words += ["training.learning_rate=tag(log,interval(1e-4,1e-1))", "tuning.n_trials=9", "training.max_steps=30"]
    assert exit_code("plan", "method=lora", *words, "--gpu", "a10") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "trials, 9 with 1/3 of the steps and 3 with all steps, which take as long as 6 final runs" in shown
    assert "the whole comparison takes 4 times the hours" in shown


def test_runs_that_differ_in_nothing_that_is_planned_are_planned_once(capsys, monkeypatch):
    from qlora_exp.planning.planner import Planner

    made: list[int] = []
    predict = Planner.predict

    def counted(self, *arguments, **more):
        made.append(1)
        return predict(self, *arguments, **more)

    monkeypatch.setattr(Planner, "predict", counted)
    words = ["model=tiny_llama", "method=lora", "method.r=2,4", "seed=1,2,3", "training.learning_rate=1e-4,2e-4"]
    assert exit_code("plan", *words, "--gpu", "a10,l40s") == 0
    assert len(made) == 2
    assert "12 runs" in capsys.readouterr().out
