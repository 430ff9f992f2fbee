"""Settings of optimizers, their packages, and what they cannot be combined with, in one line each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.training_args import OptimizerNames

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.optimizer import OptimizerConfig
from qlora_exp.config.tables import optimizers
from qlora_exp.recipe.inputs import check_config
from qlora_exp.utils.errors import ConfigError


def test_names_are_those_of_transformers():
    names = {name.value for name in OptimizerNames}
    assert {*optimizers.SETTINGS, *optimizers.OWN} - names == {"adam_mini", "muon"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer=sgd", "optimizer.optim_args.momentun=0.9"], "has no such setting; did you mean 'momentum'"),
        (["optimizer=sgd", "optimizer.optim_args.nesterov=true"], "needs optim_args.momentum above 0"),
        (["optimizer=galore_adamw", "optimizer.optim_args.rank=0"], "optim_args.rank: Input should be greater than 0"),
        (["optimizer=galore_adamw", "optimizer.optim_args.rank=true"], "optim_args.rank: Input should be a valid int"),
        (["optimizer=galore_adamw", "optimizer.optim_args.proj_type=up"], "proj_type: Input should be 'std'"),
        (["optimizer=galore_adamw", "optimizer.optim_target_modules=null"], "needs optim_target_modules"),
        (["optimizer=galore_adamw", "method=qlora"], "trains an adapter: use method=full"),
        (["optimizer=apollo_adamw", "method=lora"], "trains an adapter: use method=full"),
        (["optimizer=adam_mini", "method=lora"], "has learning rates for rows of whole weight matrices"),
        (["optimizer=adam_mini", "method=qlora"], "trains an adapter: use method=full"),
        (["optimizer=adam_mini", "optimizer.optim_args={dim: 2}"], "has no such setting"),
        (["optimizer=adam_mini", "distributed=fsdp", "distributed.num_processes=2"], "cannot be sharded"),
        (["optimizer=schedule_free_adamw", "training.lr_scheduler_type=linear"], "use training.lr_scheduler_type"),
        (["optimizer=schedule_free_adamw", "optimizer.adam_beta1=0"], "adam_beta1, which must be above 0"),
        (["optimizer=muon", "method=lora", "optimizer.lora_optimizer=loraplus"], "loraplus cannot extend muon"),
        (["optimizer=muon", "distributed=fsdp", "distributed.num_processes=2"], "cannot be sharded"),
        (["optimizer=adamw_torch_8bit", "device=mps"], "was never tested on mps"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_an_optimizer_cannot_do_is_refused_by_name(words: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        compose(["method=full", *words])
    assert message in str(error.value)


@given(st.sampled_from(sorted(optimizers.OWN)), st.text(min_size=1, max_size=8), st.integers() | st.text(max_size=3))
def test_unknown_settings_are_never_accepted(optim: str, name: str, value: int | str):
    expected = name not in optimizers.SETTINGS[optim]
    assert not expected or len([*optimizers.problems(optim, {name: value})]) == 1


@pytest.mark.parametrize("optim", sorted({*optimizers.OWN} - {"muon"}))
def test_missing_package_is_one_line_before_anything_loads(optim: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    config = compose(["method=full", f"optimizer={optim}"])
    with pytest.raises(ConfigError, match=rf"^optimizer\.optim={optim} needs an extra package: pip install '.+'$"):
        check_config(config)


def test_defaults_of_the_section_need_no_package():
    optimizers.check_package(OptimizerConfig().optim)
