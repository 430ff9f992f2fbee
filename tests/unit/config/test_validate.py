import math

import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.validate import from_dict, no_such_key
from qlora_exp.utils.errors import ConfigError


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as error:
        compose(["seed=-1", "training.learning_rate=0", "method.r=0"])
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.learning_rate=abc"], "training.learning_rate: Input should be a valid number"),
        (["training.max_steps=1.5"], "training.max_steps"),
        (["training.learning_rate=nan"], "training.learning_rate"),
        (["method.r=0"], "method.r: must be positive"),
        (["method.r=abc"], "method.r: Input should be a valid integer"),
        (["method.lora_alpha=-1"], "method.lora_alpha: must be positive"),
        (["method.lora_dropout=1.0"], "method.lora_dropout"),
        (["method.bias=some"], "method.bias: Input should be 'none', 'all' or 'lora_only'"),
        (["method.peft_type=LORRA"], "did you mean 'LORA'"),
        (["method.lora_alpa=1"], "did you mean 'lora_alpha'"),
        (["lora_variant.use_dorra=true"], "did you mean 'use_dora'"),
        (["method=full", "+method.r=8"], "takes no PEFT settings"),
        (["seed=-1"], "seed"),
        (["tracking.uri=http://me:secret@host"], "MLFLOW_TRACKING_PASSWORD"),
        (["model=hub"], "model_name_or_path"),
    ],
)
def test_invalid_value_is_rejected_with_its_key(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert message in str(error.value)


def test_value_that_fits_no_type_of_a_union_is_one_problem():
    for values, message in (
        (
            {"optimizer": {"optim_target_modules": 3}},
            "optimizer.optim_target_modules: Input should be a valid string or a",
        ),
        ({"dataset": {"eval_size": math.inf}}, "dataset.eval_size: Input should be a finite number or a valid integer"),
        ({"optimizer": {"optim_args": {"momentum": None}}}, "optimizer.optim_args.momentum: must be given; add"),
    ):
        with pytest.raises(ConfigError) as error:
            from_dict(values)
        assert str(error.value).startswith(message)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("pattern", ["(", "(?i)norm", "(?:" * 5000, "a{1,99999999999}"])
def test_expressions_that_cannot_be_compiled_are_refused(pattern):
    freeze = {"name": "freeze", "peft_type": None, "unfrozen_parameters": [pattern]}
    with pytest.raises(ConfigError, match="unfrozen_parameters: .* is not a valid regular expression"):
        from_dict({"method": freeze})
    if pattern != "(?i)norm":
        with pytest.raises(ConfigError, match="drop_matching: .* is no regular expression"):
            from_dict({"dataset": {"drop_matching": pattern}})


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("training.group_by_length", "training.train_sampling_strategy=group_by_length"),
        ("group_by_length", "training.train_sampling_strategy=group_by_length"),
        ("model.use_auth_token", "HF_TOKEN"),
        ("use_auth_token", "HF_TOKEN"),
        ("tokenizer", "model.model_name_or_path"),
        ("model.tokenizer", "model.model_name_or_path"),
        ("training.warmup_ratio", "training.warmup_steps"),
        ("training.evaluation_strategy", "training.eval_strategy"),
        ("training.max_seq_length", "training.max_length"),
        ("report_to", "tracking"),
        ("training.report_to", "tracking"),
        ("dataset_num_proc", "the run tokenizes rows itself"),
        ("model.use_flash_attention_2", "model.attn_implementation"),
        ("learning_rate", "did you mean 'training.learning_rate'"),
    ],
)
def test_keys_of_other_programs_are_explained(key, hint):
    assert hint in no_such_key(key)
