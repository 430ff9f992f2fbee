import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.training import TrainingConfig
from qlora_exp.utils.errors import ConfigError


def test_early_stopping_with_a_best_model_is_accepted():
    TrainingConfig(
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, early_stopping_patience=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.load_best_model_at_end=true"], "load_best_model_at_end"),
        (["training.early_stopping_patience=2"], "early_stopping_patience"),
        (["training.bf16=true", "training.fp16=true"], "exclude each other"),
        (["training.max_steps=0"], "max_steps"),
        (["training.resume_from_checkpoint=nowhere"], "folder not found: nowhere"),
    ],
)
def test_training_keys_that_contradict_each_other_are_rejected(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert message in str(error.value)
