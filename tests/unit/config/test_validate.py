import pytest

from qlora_exp.config.hydra_compose import compose
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
