import pytest
from support import exit_code

from qlora_exp.config.describe import presets


@pytest.mark.parametrize("section", [None, "method", "training"])
def test_keys_says_what_keys_mean(section: str | None, capsys):
    assert exit_code("keys", *[section] * bool(section)) == 0
    text = capsys.readouterr().out
    assert ("gradient_checkpointing: auto | bool = auto" in text) == (section != "method")
    assert ("  max_steps: int = -1; 30 in the default run\n" in text) == (section != "method")
    assert ("use_dora" in text) == (section != "training")


def test_keys_finds_one_key(capsys):
    assert exit_code("keys", "training.eval_steps") == 0
    assert capsys.readouterr().out.startswith("training.eval_steps: int | null = null; 12 in the default run\n")
    assert exit_code("keys", "learning_rate") == 1
    assert "did you mean 'training.learning_rate'" in capsys.readouterr().err


def test_keys_explains_several_keys_in_their_order(capsys):
    assert (
        exit_code("keys", "method.r", "training.seed", "method.lora_alpha", "method=lora") == 1
    )  # only method has one
    assert "method=lora is for the keys of method" in capsys.readouterr().err
    assert exit_code("keys", "method.r", "training.max_steps", "method.lora_alpha") == 0
    text = f"\n{capsys.readouterr().out}"
    places = [text.index(f"\n{key}: ") for key in ("method.r", "training.max_steps", "method.lora_alpha")]
    assert places == sorted(places)
    assert exit_code("keys", "method", "method=loha", "method=lokr") == 1
    assert "name one method" in capsys.readouterr().err


def test_keys_of_a_source_are_those_of_the_section(capsys):
    assert exit_code("keys", "dataset.sources.talk.eval_path") == 0
    assert "Where the held-out rows come from" in capsys.readouterr().out
    assert exit_code("keys", "dataset.sources.talk.weight") == 0
    assert "weight" in capsys.readouterr().out.partition("\n")[2]


def test_keys_lists_further_arguments_of_trl_and_explains_the_others(capsys):
    assert exit_code("keys", "training.sft_config") == 0
    text = capsys.readouterr().out
    assert "\n      label_smoothing_factor: float (at least 0 and below 1). Share of " in text
    assert "torch_compile_mode: default | reduce-overhead | max-autotune. Mode" in text
    assert exit_code("keys", "training.sft_config.eval_delay") == 0
    text = capsys.readouterr().out
    assert text.startswith("training.sft_config.eval_delay: float = null\n")
    assert "range: at least 0\n" in text
    assert exit_code("keys", "training.sft_config.learning_rate") != 0
    assert "set training.learning_rate instead" in capsys.readouterr().err


def test_keys_does_not_list_what_never_acts(capsys):
    assert exit_code("keys", "unrelated") == 0
    assert "drop_leaks" not in capsys.readouterr().out
    assert exit_code("keys", "unrelated.drop_leaks") == 1
    assert "did you mean 'dataset.drop_leaks'" in capsys.readouterr().err


def test_keys_explains_a_setting_of_peft(capsys):
    assert exit_code("keys", "method.r") == 0
    text = capsys.readouterr().out
    assert text.startswith("method.r: int = 8; 16 in the default run\n      Rank of the update")
    for part in (
        "range: above 0\n",
        "16 in deft, ",
        "sweep=: 4,8,16 in rank_alpha_quant",
        "[rule of thumb]",
        "[published",
    ):
        assert " ".join(part.split()) in " ".join(text.split())
    assert "method=miss: int = 64. The rank of MiSS" in text


@pytest.mark.parametrize("key", ["method.block_size", "lora_variant.use_dora", "method.target_modules"])
def test_keys_explains_settings_of_any_method(key: str, capsys):
    assert exit_code("keys", key) == 0
    assert capsys.readouterr().out.startswith(f"{key}: ")


def test_keys_lists_the_settings_of_one_method(capsys):
    assert exit_code("keys", "method", "method=loha") == 0
    text = capsys.readouterr().out
    assert "  r: int = 8; 8 with method=loha. LoHa rank\n" in text
    assert "lora_alpha" not in text
    assert exit_code("keys", "method.r", "method=loha") == 0
    assert "\n      LoHa rank\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["method.rr"], "did you mean 'method.r'"),
        (["lora_variant.block_size"], "LoRA has no such setting"),
        (["method", "method=lohaa"], "did you mean 'loha'"),
        (["method", "method=full"], "no option with PEFT settings"),
        (["method.lora_alpha", "method=loha"], "method=loha has no such setting"),
        (["training", "method=loha"], "is for the keys of method"),
        (["method.use_rslora", "method=adalora"], "has no such setting"),
    ],
)
def test_keys_refuses_what_does_not_exist(words: list[str], problem: str, capsys):
    assert exit_code("keys", *words) == 1
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("tracking=local", ["tracking=local: MLflow in an SQLite file", "\n  tracking.uri: sqlite:///"]),
        ("method=qlora", ["method=qlora: QLoRA (Dettmers", "\n  quantization=nf4_double\n", "\n  method.r: 16\n"]),
        ("model=codellama_34b", ["model=codellama_34b\n", "\n  model.model_name_or_path: codellama/"]),
        ("sweep=rank_scaling", ["\n  lora_variant=lora,rslora\n", "\n  method.r: 8,16,32,64,128\n"]),
        ("hydra/launcher=slurm", ["SLURM, through submitit", "\n  hydra.launcher.parameters: {timeout_min: "]),
        ("hydra/sweeper", ["options: grid, optuna, tuned\n", "`qlora-exp keys hydra/sweeper=NAME` explains one"]),
        ("experiment", ["options: ", "smollm2_faq_qlora"]),
    ],
)
def test_keys_explains_an_option_or_lists_those_of_a_group(word: str, parts: list[str], capsys):
    assert exit_code("keys", word) == 0
    text = capsys.readouterr().out
    assert text.startswith(word) or "=" not in word
    for part in parts:
        assert part in text
    assert "_target_" not in text


def test_keys_explains_every_option(capsys):
    words = [f"{group}={name}" for group, names in presets.options().items() for name in names]
    assert exit_code("keys", *words) == 0
    text = capsys.readouterr().out
    assert [word for word in words if f"\n{word}" not in f"\n{text}"] == []


def test_method_is_an_option_alone_and_whose_settings_to_explain_with_a_key(capsys):
    assert exit_code("keys", "method=loha", "method=lokr") == 0
    text = capsys.readouterr().out
    assert text.index("method=loha: LoHa") < text.index("method=lokr: LoKr")
    assert exit_code("keys", "method.r", "method=loha") == 0
    assert "LoHa rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("tracking=locl", "tracking: no option 'locl'; did you mean 'local'? Options: auto, local, server"),
        ("hydra/launcher=", "hydra/launcher: no option ''. Options: local, ray, slurm"),
        ("training.max_steps=3", "the value of a key, which `qlora-exp keys training.max_steps` explains"),
        ("hydra.launcher", "`qlora-exp train --cfg hydra -p hydra.launcher hydra/launcher=NAME` prints it (NAME: "),
        ("hydra.sweeper.params", "`qlora-exp train --cfg hydra -p hydra.sweeper hydra/sweeper=NAME` prints it"),
        ("hydra.run.dir", "`qlora-exp train --cfg hydra -p hydra.run` prints it"),
        ("hydra", "`qlora-exp train --cfg hydra` prints it"),
    ],
)
def test_keys_says_what_to_type_for_what_is_no_key(word: str, problem: str, capsys):
    assert exit_code("keys", word) == 1
    assert problem in capsys.readouterr().err
