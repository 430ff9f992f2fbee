import subprocess
import sys

import pytest

from qlora_exp.config import conf_folder
from qlora_exp.config.hydra_compose import check_command, compose, conf_dir, grid, options, own_options, sweeper
from qlora_exp.utils.errors import ConfigError

GROUPS = [
    "model",
    "quantization",
    "lora_variant",
    "optimizer",
    "dataset",
    "training",
    "evaluation",
    "tracking",
    "method",
]
GIVEN = {
    "hub": ["model.model_name_or_path=org/name"],
    "own": ["dataset.path=x.jsonl"],
    "server": ["tracking.uri=http://h"],
    "adam_mini": ["method=full"],
    "galore_adamw": ["method=full"],
    "apollo_adamw": ["method=full"],
}


def test_composing_imports_no_torch():
    code = "import sys; from qlora_exp.config.hydra_compose import compose; compose(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.slow
@pytest.mark.parametrize("choice", [f"{group}={option}" for group in GROUPS for option in options(group)])
def test_every_option_composes(choice: str):
    option = choice.split("=")[1]
    plain = choice in ("quantization=none", "method=lora") or choice.startswith("lora_variant=")
    stored = {"lora_variant=loftq": "nf4", "lora_variant=qalora": "gptq"}
    quantized = [f"quantization={stored[choice]}"] if choice in stored else []
    assert compose([*(["method=lora"] if plain else []), *quantized, choice, *GIVEN.get(option, [])])


def test_method_sets_default_quantization_and_optimizer():
    assert compose(["method=qlora"]).quantization.name == "nf4_double"
    assert compose(["method=qlora"]).optimizer.optim == "paged_adamw_32bit"
    assert compose(["method=lora"]).quantization.name == "none"


def test_command_line_overrides_method_and_experiment():
    assert compose(["method=qlora", "quantization=int8"]).quantization.name == "int8"
    assert compose(["experiment=smollm2_faq_qlora", "quantization=fp4"]).quantization.name == "fp4"
    assert compose(["experiment=smollm2_faq_qlora", "method.r=3"]).method.settings["r"] == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantizaton=nf4"], "did you mean 'quantization'"),
        (["training.learning_rat=1"], "did you mean 'training.learning_rate'"),
        (["+training.max_step=1"], "did you mean 'training.max_steps'"),
        (["+sed=1"], "did you mean 'seed'"),
        (["hydra.launcher.tasks=1"], "+hydra.launcher.tasks=VALUE adds one"),
        (["quantization=nf5"], "quantization: no option 'nf5'; did you mean 'nf4'? Options: awq, fp4"),
        (["hydra/launcher=lokal"], "hydra/launcher: no option 'lokal'; did you mean 'local'"),
        (["training={max_step: 3}"], "training.max_step: no such key or group; did you mean 'training.max_steps'"),
        (["~trainin"], "did you mean 'training'"),
        (["tracking.tags.x=1"], "tracking.tags.x: must be text, got 1; quote it: tracking.tags.x='\"1\"'"),
        (["+method=lora"], "write method=OPTION without '+'"),
        (["++method=lora"], "++method=lora: write method=lora"),
        (["seed=${hydra:job.num}"], "seed: values of ${hydra:...} are not available"),
        (["hydra.sweeper.n_trials=5"], "did you mean 'search.n_trials'"),
        (["hydra.sweeper.direction=minimize"], "did you mean 'search.directions'"),
        (["hydra.launcher.n_jobs=5"], "did you mean 'sweep.n_jobs'"),
        (["experiment=smollm2_faq_lorra"], "did you mean 'smollm2_faq_lora'"),
    ],
)
def test_unknown_key_or_option_is_rejected_with_a_suggestion(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["model.new_tokens", "evaluation.metrics", "method.unfrozen_parameters"])
def test_mapping_in_the_place_of_a_list_is_said_to_be_one(key: str):
    words = ["method=freeze"] if key.startswith("method") else []
    with pytest.raises(ConfigError, match=rf"^{key}: must be a list, such as {key}=\[VALUE,VALUE\]$"):
        compose([*words, f"{key}={{a: 1}}"])


def test_keys_inside_free_mappings_need_no_plus():
    words = ["model.random_config.hidden_size=32", "model.architecture={model_type: llama}", "tracking.tags.team=a"]
    config = compose(["model=tiny_llama", *words, "+tracking.tags.more=b"])
    assert config.model.random_config == {"hidden_size": 32}
    assert config.model.architecture == {"model_type": "llama"}
    assert config.tracking.tags == {"team": "a", "more": "b"}


ODD = ["Übung", "a=b", "it's", "(x", "[x]", "#x", "{x", "a,b", "100%", "a%20b", "a?b", 'q"', "a;b", " a", "~a", "a\\"]


def test_users_folder_may_have_any_name(tmp_path, monkeypatch):
    for name in ODD:
        write_options(tmp_path / name, {"training/mine": "max_steps: 0"})
    for name in ODD:
        with pytest.raises(ConfigError, match="max_steps must be positive"):
            check_command(["training=mine"], str(tmp_path / name))
    monkeypatch.chdir(tmp_path / "a,b")
    with pytest.raises(ConfigError, match="max_steps must be positive"):
        compose(["training=mine"], config_dir=".")
    with pytest.raises(ConfigError, match=r"--config-dir: there is no folder .*/nothing"):
        compose([], config_dir="nothing")
    with pytest.raises(ConfigError, match=r"there is no folder /nowhere"):
        compose(["hydra.searchpath=[file:///nowhere]"])


def write_options(folder, files):
    """Write option files, given by their path without suffix."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)


HEADER = "# @package _global_\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1", "experiment: no such key; the option file of experiment that sets it lacks '# @package _global_'"),
        (f"{HEADER}defaults: [override /sweep: rank_scaling]", "cannot choose the option of sweep, which comes after"),
        (f"{HEADER}defaults: [method: lora]", "to choose method=lora, write `override /method: lora`"),
        (f"{HEADER}defaults: [/method: lora]", "`override /method: OPTION` in the defaults of a file"),
        (f"{HEADER}defaults: [override method: lora]", "relative to this file's group: write `override /method"),
        (f"{HEADER}defaults: [override /metod: lora]", "did you mean 'method'"),
        (f"{HEADER}defaults: [override /method: mylor]", "did you mean 'mylora'"),
        (f"{HEADER}defaults: [override /method: null]", "that is method=full"),
        (f"{HEADER}defaults: [override /method: []]", "that is method=full"),
        (f"{HEADER}training: [", "experiment/mine.yaml"),
    ],
)
def test_mistake_in_a_users_file_is_explained(text: str, message: str, tmp_path):
    write_options(tmp_path, {"experiment/mine": text, "method/mylora": "name: mylora"})
    with pytest.raises(ConfigError) as error:
        compose(["experiment=mine"], config_dir=tmp_path)
    assert message in str(error.value)
    write_options(
        tmp_path, {"dataset/nested": "dataset: {path: x}", "model/early": "defaults: [override /method: ia3]"}
    )
    with pytest.raises(ConfigError, match=r"dataset\.dataset: no such key; the option file of dataset"):
        compose(["dataset=nested"], config_dir=tmp_path)
    with pytest.raises(ConfigError, match="a file of model cannot choose the option of method"):
        compose(["model=early"], config_dir=tmp_path)


def test_option_files_choose_sweeper_and_launcher(tmp_path, caplog):
    text = f"{HEADER}defaults: [override /hydra/launcher: slurm, override /hydra/sweeper: optuna]"
    write_options(tmp_path, {"experiment/mine": text, "experiment/1": f"{HEADER}seed: 77"})
    check_command(["experiment=mine"], str(tmp_path))
    for chosen in ("hydra/launcher=slurm", "hydra/sweeper=optuna"):
        assert f"{chosen} of an option file is not used: it is for sweeps" in caplog.text
    assert compose(["experiment=1"], config_dir=tmp_path).seed == 77


def test_users_option_with_a_shipped_name_is_reported(tmp_path, caplog):
    same = (conf_dir() / "method" / "lora.yaml").read_text("utf-8")
    write_options(tmp_path, {"method/lora": same.replace("r: 16", "r: 3"), "method/full": same, "model/mine": ""})
    write_options(tmp_path, {"method/ia3": (conf_dir() / "method" / "ia3.yaml").read_text("utf-8")})
    assert compose(["method=lora"], config_dir=tmp_path).method.settings["r"] == 16
    assert [line.split(" is not used")[0].rpartition("/")[2] for line in caplog.messages] == ["full.yaml", "lora.yaml"]


def test_users_config_folder_adds_options(tmp_path):
    (tmp_path / "mine" / "dataset").mkdir(parents=True)
    (tmp_path / "mine" / "dataset" / "poems.yaml").write_text("path: poems.csv\nformat: text\ntext_column: poem\n")
    assert compose(["dataset=poems"], config_dir=tmp_path / "mine").dataset.text_column == "poem"


def test_shipped_config_folder_is_found():
    assert (conf_dir() / "method" / "qlora.yaml").is_file()


def test_missing_config_folder_is_an_error(monkeypatch):
    monkeypatch.setattr(conf_folder, "__file__", "/nowhere/qlora_exp/config/hydra_compose.py")
    with pytest.raises(ConfigError, match="incomplete"):
        conf_dir()


@pytest.mark.parametrize("name", ["auto_map", "_attn_implementation", "attn_implementation", "_experts_implementation"])
def test_an_architecture_cannot_ask_for_code_or_kernels(name: str):
    with pytest.raises(ConfigError, match=f"{name} is no size of a model"):
        compose(["model=tiny_llama", "method=lora", f"+model.architecture={{model_type: llama, {name}: a/b}}"])
    with pytest.raises(ConfigError, match=f"{name} is no size of a model"):
        compose(["model=tiny_llama", "method=lora", f"+model.architecture={{text_config: {{{name}: a/b}}}}"])


def test_a_named_sweep_of_ones_own_without_values_is_refused(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text("# nothing yet\n")
    token = own_options.set(tmp_path)
    try:
        with pytest.raises(ConfigError, match=r"mine.yaml: has no hydra.sweeper.params"):
            grid(["sweep=mine"])
    finally:
        own_options.reset(token)


def test_grid_has_the_lowest_value_of_an_interval():
    words = ["training.learning_rate=tag(log,interval(1e-5,1e-2))", "method.r=int(interval(4,64))", "seed=1,2"]
    rate, r = "training.learning_rate=1e-05", "method.r=4"
    assert grid([words[0], "training.learning_rate=5"]) == [["training.learning_rate=5"]]
    assert grid(words) == [[rate, r, "seed=1"], [rate, r, "seed=2"]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "grid"),
        (["sweep=null"], "grid"),
        (["sweep=rank_scaling"], "grid"),
        (["sweep=tuned_methods"], "tuned"),
        (["sweep=tuned_methods", "hydra/sweeper=grid"], "grid"),
        (["hydra/sweeper=optuna"], "optuna"),
    ],
)
def test_sweeper_is_that_of_the_words_or_the_named_sweep(words: list[str], expected: str):
    assert sweeper(words) == expected


def test_grid_expands_lists_and_named_sweeps():
    assert grid(["method.r=4,8", "seed=1"]) == [["method.r=4", "seed=1"], ["method.r=8", "seed=1"]]
    assert grid(["experiment=null,smollm2_faq_lora"]) == [[], ["experiment=smollm2_faq_lora"]]
    assert grid(["sweep=null", "quantization=glob(fp4*)"]) == [["quantization=fp4"], ["quantization=fp4_double"]]
    with pytest.raises(ConfigError, match=r"method=glob\(nothing\): no value matches"):
        grid(["method=glob(nothing)"])
    named = grid(["sweep=rank_scaling", "method.r=2,4"])
    assert len(named) == 4
    assert all("sweep=rank_scaling" in words for words in named)  # what the sweep sets besides is theirs too
    with pytest.raises(ConfigError, match="no option 'rank_scalling'"):
        grid(["sweep=rank_scalling"])
