import pytest
from support import exit_code


@pytest.mark.parametrize("section", [None, "method", "training"])
def test_keys_says_what_keys_mean(section: str | None, capsys):
    assert exit_code("keys", *[section] * bool(section)) == 0
    text = capsys.readouterr().out
    assert ("gradient_checkpointing: auto | bool = 'auto'" in text) == (section != "method")
    assert ("  max_steps: int = -1; 30 in the default run\n" in text) == (section != "method")
    assert ("use_dora" in text) == (section != "training")


def test_keys_finds_one_key(capsys):
    assert exit_code("keys", "training.eval_steps") == 0
    assert capsys.readouterr().out.startswith("  eval_steps: int | null = None; 12 in the default run\n")
    assert exit_code("keys", "learning_rate") == 1
    assert "did you mean 'training.learning_rate'" in capsys.readouterr().err


def test_keys_of_a_source_are_those_of_the_section(capsys):
    assert exit_code("keys", "dataset.sources.talk.eval_path") == 0
    assert "Where the held-out rows come from" in capsys.readouterr().out


def test_keys_lists_further_arguments_of_trl_and_explains_the_others(capsys):
    assert exit_code("keys", "training.sft_config") == 0
    text = capsys.readouterr().out
    assert "\n      label_smoothing_factor: float\n" in text
    assert "torch_compile_mode: default | reduce-overhead | max-autotune\n" in text
    assert exit_code("keys", "training.sft_config.eval_delay") == 0
    assert capsys.readouterr().out == "training.sft_config.eval_delay: float\n"
    assert exit_code("keys", "training.sft_config.learning_rate") != 0
    assert "set training.learning_rate instead" in capsys.readouterr().err


def test_keys_does_not_list_what_never_acts(capsys):
    assert exit_code("keys", "unrelated") == 0
    assert "drop_leaks" not in capsys.readouterr().out
    assert exit_code("keys", "unrelated.drop_leaks") == 1
    assert "did you mean 'dataset.drop_leaks'" in capsys.readouterr().err
