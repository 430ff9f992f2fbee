import pytest
from pydantic import BaseModel
from support import exit_code

from qlora_exp.config.schema import Config


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


def test_settings_of_peft_are_explained(capsys):
    assert exit_code("keys", "method.r") == 0
    text = capsys.readouterr().out
    assert text.startswith("method.r: int = 8, of PEFT's LoraConfig\n")
    for part in (
        "r * (in + out)",
        "Allowed: above 0",
        "vera (256)",
        "16: method=deft",
        "[rule of thumb]",
        "[published: ",
    ):
        assert part in " ".join(text.split())


def test_settings_of_another_method_are_explained(capsys):
    assert exit_code("keys", "method.r", "method=vera") == 0
    text = capsys.readouterr().out
    assert text.startswith("method.r: int = 256, of PEFT's VeraConfig\n")
    assert "rule of thumb" not in text
    assert exit_code("keys", "method.d_initial", "method=vera") == 0
    assert capsys.readouterr().out.startswith("method.d_initial: float = 0.1, of PEFT's VeraConfig\n")


def test_values_are_those_of_the_run_that_is_named(capsys):
    assert exit_code("keys", "training.max_steps", "training.max_steps=7") == 0
    assert "; 7 in this run" in capsys.readouterr().out
    assert exit_code("keys", "training.max_steps", "training.max_stepz=7") == 1


def test_every_key_has_a_meaning():
    sections = [field.annotation for field in Config.model_fields.values()]
    nested = [kind for kind in sections if isinstance(kind, type) and issubclass(kind, BaseModel)]
    assert [key for kind in nested for key, field in kind.model_fields.items() if not field.description] == []
    assert [kind for kind in nested if not kind.__doc__] == []
