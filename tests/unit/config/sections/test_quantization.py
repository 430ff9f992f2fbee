import pytest

from qlora_exp.config.sections.quantization import QuantizationConfig


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"load_in_4bit": True, "quant_method": "torchao", "weights": "int8"}, "exclude each other"),
        ({"quant_method": "torchao", "weights": "int4"}, "int8, float8"),
        ({"quant_method": "quanto"}, "one of int8, float8, int4, int2"),
        ({"weights": "int8"}, "must be null"),
    ],
)
def test_quantization_keys_that_contradict_each_other_are_rejected(settings: dict, says: str):
    with pytest.raises(ValueError, match=says):
        QuantizationConfig(**settings)
