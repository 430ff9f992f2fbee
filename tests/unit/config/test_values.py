import json

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.validate import from_dict
from qlora_exp.config.values import flatten, result_values, to_yaml

DEFAULTS = compose().model_dump_json()


@given(
    r=st.integers(1, 512),
    alpha=st.integers(1, 512),
    rate=st.floats(1e-7, 1.0),
    seed=st.integers(0, 2**32 - 1),
    message=st.none() | st.text(min_size=1, alphabet=st.characters(blacklist_categories=("Cs", "Cc"))),
)
@settings(max_examples=30, deadline=None)
def test_config_survives_a_yaml_round_trip(r: int, alpha: int, rate: float, seed: int, message: str | None):
    values = json.loads(DEFAULTS)
    values["method"] |= {"r": r, "lora_alpha": alpha}
    values["training"]["learning_rate"] = rate
    values["dataset"] |= {"format": "chat", "system_message": message}
    config = from_dict(values | {"seed": seed})
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


def test_flatten_gives_dotted_keys():
    flat = flatten(compose())
    assert flat["method.r"] == 16
    assert flat["evaluation.metrics"] == ["rouge", "exact_match"]
    assert not any(isinstance(value, dict) and value for value in flat.values())


def test_null_in_sft_config_is_as_not_given():
    nothing = {"training": {"sft_config": {"data_seed": None}}}
    assert result_values(nothing)["training"] == {}
    assert result_values({"training": {"sft_config": {"data_seed": 1, "tf32": None}}})["training"]["sft_config"] == {
        "data_seed": 1
    }


def test_older_records_say_that_experts_stay_in_16_bits():
    new = compose(["method=qlora", "quantization=nf4"])
    values = new.model_dump(mode="json")
    older = from_dict(
        values | {"quantization": {k: v for k, v in values["quantization"].items() if "experts" not in k}}
    )
    assert new.quantization.packs_experts
    assert not older.quantization.packs_experts
    assert "bnb_4bit_experts" not in result_values(older.model_dump(mode="json"))["quantization"]
    assert not compose(["method=qlora", "quantization=int8"]).quantization.packs_experts
