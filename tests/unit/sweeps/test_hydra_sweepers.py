import json
import subprocess
import sys

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support import QUICK

from qlora_exp.config.hydra_compose import conf_dir, register
from qlora_exp.sweeps.composer import Composer
from qlora_exp.sweeps.hydra_sweepers import _quoted
from qlora_exp.tracking.mlflow_store import client


def dry_run(*words: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "qlora_exp", "train", "-m", "--dry-run", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


@pytest.mark.parametrize(
    ("words", "jobs"),
    [
        (["method.r=4,8", "seed=1,2,3"], ["method.r=4 seed=1", "method.r=8 seed=3"]),
        (["experiment=glob(smollm2_*)"], ["experiment=smollm2_faq_full", "experiment=smollm2_faq_qlora"]),
        (["method.r=range(2,8,2)", "seed=choice(1,2)"], ["method.r=2 seed=1", "method.r=6 seed=2"]),
        (
            ["method.target_modules=[q_proj],[q_proj,v_proj]", "+tracking.tags.note='a b'"],
            ["method.target_modules=[q_proj]", "method.target_modules=[q_proj,v_proj]"],
        ),
        (["sweep=rank_scaling"], ["lora_variant=rslora method.r=128"]),
        (["sweep=rank_scaling", "method.r=2,4"], ["lora_variant=lora method.r=2", "lora_variant=rslora method.r=4"]),
    ],
)
def test_every_kind_of_sweep_is_expanded(words: list[str], jobs: list[str], tmp_path):
    result = dry_run(*words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for job in jobs:
        assert job in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.r=4,8", "seed=1,-1"], "seed=-1"),
        (["training.learning_rate=interval(1e-5,1e-3)"], "add hydra/sweeper=optuna"),
        (["sweep=rank_scalin"], "did you mean 'rank_scaling'"),
        (["sweep.name=a/b"], "sweep.name"),
        (["sweep.n_jobs=0"], "sweep.n_jobs"),
        (["sweep.name=.."], "sweep.name"),
        (["method.r=4,8", "search.n_trials=3"], "add hydra/sweeper=optuna"),
        (["hydra/sweeper=optuna", "training.learning_rate=interval(1e-2,1e-4)"], "search space"),
        (["hydra/sweeper=optuna", "training.learning_rate=tag(log,interval(0,1e-2))"], "search space"),
        (["hydra/sweeper=optuna", "method.r=4,8", "seed=1,2", "search.prune=true"], "leave one seed"),
        (["hydra.sweep.dir='a\\b'", "seed=1"], "no folder with a backslash"),
    ],
)
def test_a_wrong_sweep_is_refused_before_any_job(words: list[str], message: str, tmp_path):
    result = dry_run(*words, cwd=tmp_path)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_named_sweep_needs_no_flag(tmp_path):
    command = [sys.executable, "-m", "qlora_exp", "train", "sweep=quant_types", "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("new") == 5


@pytest.mark.parametrize(
    "words",
    [
        ["method.r=4", "method=lora", "seed=1"],
        ["quantization=fp4", "lora_variant=dora", "method.lora_alpha=8"],
        ["experiment=opt125m_dolly_lora", "training.max_steps=5", "+tracking.tags.a=b"],
        ["method.target_modules=[q_proj,v_proj]", "~tracking.tags", "training.learning_rate=1e-3"],
        ["sweep=rank_scaling", "hydra.verbose=true", "model=tiny_opt"],
        ["training.max_steps=1.0", "training.bf16=true", "tracking.experiment_name='a: $b'", "method.lora_alpha='8'"],
        ["training.learning_rate=null", "tracking.experiment_name=run-${seed}", "seed=7"],
        ["model=hub", "model.model_name_or_path=a/b", "+model.random_config={hidden_size:8}", "model.dtype=null"],
    ],
)
def test_jobs_are_composed_as_hydra_would(words: list[str]):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
        expected = loader.load_sweep_config(master, words)
        compose = Composer(loader, master)
        for shared in (len(words) - 1, 1, 0, 0):  # the last time from what the one before kept
            composed = compose(words[:shared], words[shared:])
            rest = OmegaConf.masked_copy(expected, [key for key in expected if key != "hydra"])
            plain = OmegaConf.to_container(rest, resolve=True)
            assert json.dumps(composed) == json.dumps(plain)  # 1 is not 1.0
    with pytest.raises(Exception, match="max_step"), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        compose([], ["training.max_step=1"])


@settings(max_examples=200)
@given(st.text(alphabet="a'\"$}=, ~ü#%", min_size=1))
def test_any_folder_survives_the_override_grammar(name: str):
    text = f"/tmp/{name}"
    parsed = OverridesParser.create().parse_override(f"key={_quoted(text)}").value()
    config = OmegaConf.create({"key": parsed, "a": "wrong"})
    assert config.key == text


@pytest.mark.parametrize(
    ("launcher", "more"), [("local", []), ("joblib", []), ("slurm", ["hydra.launcher.cluster=local"])]
)
def test_every_launcher_runs_a_sweep_and_knows_it_again(launcher: str, more: list[str], store, tmp_path):
    words = [sys.executable, "-m", "qlora_exp", "train", "-m", f"hydra/launcher={launcher}", *more, *QUICK]
    words += ["evaluation=loss_only", "method=lora", "training.max_length=5,300", f"tracking.uri={store}"]
    words += [f"tracking.experiment_name={launcher}"]
    # A name that shells, Hydra and SQL would read as something else; MLflow cannot create its own default store there.
    mlflow = client(store)
    folder = tmp_path / 'it\'s here, {1}="2"'
    folder.mkdir()
    for again in ([], [] if launcher == "local" else ["--dry-run"]):
        result = subprocess.run([*words, *again], capture_output=True, text=True, check=False, cwd=folder)
        assert "Traceback" not in result.stderr
        if not again:
            assert result.returncode == 1, result.stderr  # one of the two must fail
            assert "1 of 2 jobs did not end well" in result.stderr
    assert len(list(folder.glob("multirun/*/*/model"))) == 1
    assert "sweep.rerun=failed" in result.stdout
    assert "done in" in result.stdout
    runs = mlflow.search_runs([mlflow.get_experiment_by_name(launcher).experiment_id])
    (parent,) = [run for run in runs if "sweep.keys" in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.data.tags["outcome"] for run in children) == ["error", "ok"]
    assert len(runs) == 3
