import pytest
from pydantic import ValidationError

from qlora_exp.config.schema import Config


def test_default_config_survives_a_round_trip():
    assert Config() == Config.model_validate(Config().model_dump(mode="json"))


def test_config_is_immutable():
    with pytest.raises(ValidationError):
        Config().seed = 1
