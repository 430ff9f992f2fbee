import pytest
from support import exit_code

from qlora_exp.sweeps.hydra_sweepers import few_seeds


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
        (["optimizer=adamw_torch,loraplus", "optimizer.loraplus_lr_ratio=8"], ["optimizer=loraplus"]),
        (["experiment=null,smollm2_faq_lora"], ["experiment=null", "experiment=smollm2_faq_lora"]),
        (["sweep=null", "seed=1,2"], ["seed=1", "seed=2"]),
        (["hydra/sweeper=optuna", "optimizer=glob(adamw_t*)"], ["would search optimizer"]),
        (["sweep=rank_scaling"], ["lora_variant=rslora method.r=128"]),
        (["sweep=rank_scaling", "method.r=2,4"], ["lora_variant=lora method.r=2", "lora_variant=rslora method.r=4"]),
    ],
)
def test_sweep_expression_is_expanded(words: list[str], jobs: list[str], tmp_path, capsys):
    assert exit_code("train", "-m", "--dry-run", *words) == 0
    shown = capsys.readouterr().out
    for job in jobs:
        assert job in shown
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
        (["hydra/sweeper=optuna", "method.r=4,8", "seed=1,2", "search.prune=true"], "use one seed only"),
        (["seed=1,2", "optimizer.loraplus_lr_ratio=8"], "would change nothing: it is for optimizer=loraplus"),
        (["hydra/sweeper=optuna", "method.r=4,8", "training.save_steps=9"], "it needs training.save_strategy=steps"),
        (["optimizer=glob(nothing*)"], "optimizer=glob(nothing*): no value matches"),
        (["method.r=range(4,4)"], "no value matches"),
        (["method.r=range(1,9,0)"], "method.r=range(1,9,0): range() arg 3 must not be zero"),
        (["seed=1,2", "hydra.sweep.subdir=x"], "hydra.sweep.subdir=x would change nothing"),
        (["seed=1,2", "hydra.run.dir=x"], "hydra.run.dir=x would change nothing"),
        (["hydra/sweeper=optuna", "optimizer=glob(nothing*)"], "nothing matches"),
        (["hydra/sweeper=optuna", "method.r=range(4,4)"], "method.r=range(4,4)"),
        (["experiment=1,2"], "experiment: no option '1'"),
        (["experiment=null", "method=null,lora"], "method: a run needs an option"),
        (["sweep=rank_scaling,quant_types"], "hydra.sweeper: must be the same for all jobs"),
        (
            ["hydra/sweeper=basic", "seed=1,2"],
            "hydra/sweeper=basic: this launcher needs hydra/sweeper=grid",
        ),
        (["seed=${hydra:job.num},7"], "seed: values of ${hydra:...} are not available"),
        (["hydra/sweeper=optuna", "method.r=interval(2,9)"], "needs KEY=int(interval(A,B))"),
        (["hydra/sweeper=optuna", "method.r=4,8", "seed=interval(1,3)"], "seeds are repeats of a trial: list them"),
        (["hydra/sweeper=optuna", "method.r=4,8", "seed=1,-1"], "seed: Input should be greater"),
        (["hydra/sweeper=optuna", "method.r=4,8", "+hydra.sweeper.n_trials=5"], "did you mean 'search.n_trials'"),
        (
            ["hydra/sweeper=optuna", "method=lora,ia3", "method.lora_alpha=4,8"],
            "2 of the combinations to search cannot",
        ),
        (["hydra/sweeper=optuna", "dataset.system_message=a,hf_abcdefghijklmnopqrst"], "a choice contains a secret"),
        (["hydra.sweep.dir='a\\b'", "seed=1"], "does not accept a folder with a backslash"),
    ],
)
def test_invalid_sweep_is_rejected_before_any_job(words: list[str], message: str, tmp_path, capsys):
    assert exit_code("train", "-m", "--dry-run", *words) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_named_sweep_needs_no_multirun_flag(capsys):
    assert exit_code("train", "sweep=quant_types", "--dry-run") == 0
    assert capsys.readouterr().out.count("new") == 5


def test_users_files_choose_sweeper_and_launcher(tmp_path, capsys):
    header = "# @package _global_\n"
    for name, text in (
        ("experiment/on_ray", "defaults: [override /hydra/launcher: ray]"),
        ("sweep/ranks", "defaults: [override /hydra/sweeper: optuna]\nhydra: {sweeper: {params: {method.r: '4,8'}}}"),
        ("sweep/seeds", "hydra: {sweeper: {params: {seed: '1,2'}}}"),
        ("sweep/names", "hydra: {sweeper: {params: {dataset.name: 'ü,b'}}}"),
    ):
        file = tmp_path / "own" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(header + text)
    own = ["--config-dir", "own"]
    assert exit_code("train", *own, "experiment=on_ray", "--cfg", "hydra", "-p", "hydra.launcher") == 0
    assert "RayLauncher" in capsys.readouterr().out
    assert exit_code("train", *own, "sweep=ranks", "search.n_trials=3", "--dry-run") == 0
    assert "would search method.r" in capsys.readouterr().out
    assert exit_code("train", *own, "sweep=seeds", "--dry-run") == 0
    assert "2 jobs" in capsys.readouterr().out
    assert exit_code("train", *own, "sweep=names", "--dry-run") == 1
    assert "dataset.name=ü,b: this value must be quoted" in capsys.readouterr().err
    assert exit_code("train", *own, "-m", "experiment=null,on_ray", "--dry-run") == 1
    shown = capsys.readouterr().err
    assert "hydra.launcher: must be the same for all jobs" in shown
    assert "experiment=on_ray" in shown


@pytest.mark.parametrize(
    ("ranks", "seeds", "says"),
    [
        (4, ["1", "2"], "2 seeds are too few to compare 4 rows whose results vary with the seed: use 3"),
        (4, ["1", "2", "3", "4"], ""),
        (4, ["1"], ""),
        (1, ["1", "2"], ""),
    ],
)
def test_too_few_seeds_are_said_before_they_are_trained(ranks: int, seeds: list[str], says: str):
    swept = [{"method.r": str(r), "seed": seed} for r in range(ranks) for seed in seeds]
    assert few_seeds(swept) == says


def test_sweeps_without_seeds_are_not_warned_of():
    assert few_seeds([{"method.r": "4"}, {"method.r": "8"}]) == ""
