"""Files that both versions of transformers read; here names are compared, `nox -s takeaway` runs version 4."""

import json

import pytest
from helpers import tiny_models
from transformers import AutoConfig, AutoTokenizer

from qlora_exp.models.transformers_4 import add_old_names

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(
    ("kind", "rope", "old"),
    [
        ("llama", {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            "llama",
            {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3,
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        ),
        ("qwen2", YARN | {"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_scaling": YARN}),
        ("phi", {"rope_theta": 2e4, "partial_rotary_factor": 0.25}, {"rope_theta": 2e4, "partial_rotary_factor": 0.25}),
        ("gpt_neox", {"rope_theta": 2e4, "partial_rotary_factor": 0.5}, {"rotary_emb_base": 2e4, "rotary_pct": 0.5}),
        (
            "phi3",
            {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
        ),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
            },
            {"rope_theta": 1e6, "rope_local_base_freq": 3e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        ("gpt2", None, {}),
    ],
)
def test_config_has_the_names_of_both_versions(kind, rope, old, tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    config = AutoConfig.for_model(kind, **sizes, **({"rope_parameters": rope} if rope else {}), dtype="bfloat16")
    config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    new = read(tmp_path)
    add_old_names(tmp_path)
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    if rope:
        assert after["rope_parameters"] | before.pop("rope_parameters") == after["rope_parameters"]
    assert after | before == after
    assert new | old | {"torch_dtype": "bfloat16"} | read(tmp_path) == read(tmp_path)
    assert {key: read(tmp_path)[key] for key in old} == old


def test_config_without_an_old_form_is_left_and_reported(tmp_path, caplog):
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    rope["sliding_attention"] = {"rope_type": "default", "rope_theta": 3e4}
    AutoConfig.for_model("gemma3_text", rope_parameters=rope).save_pretrained(tmp_path)
    values = read(tmp_path) | {"model_type": "laguna"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    add_old_names(tmp_path)
    assert "rope_theta" not in read(tmp_path)
    assert "transformers 5 only" in caplog.text


def test_tokenizer_has_a_class_of_both_versions(tmp_path):
    tokenizer = tiny_models.tokenizer(special=(*tiny_models.SPECIAL, "<|more|>"))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|more|>"]})
    tokenizer.save_pretrained(tmp_path)
    assert read(tmp_path, "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    add_old_names(tmp_path)
    values = read(tmp_path, "tokenizer_config.json")
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert values["additional_special_tokens"] == ["<|more|>"]
    assert "extra_special_tokens" not in values
    assert values["model_input_names"] == ["input_ids", "attention_mask"]
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("Say <|more|> 12.") == tokenizer("Say <|more|> 12.")
    assert again.extra_special_tokens == ["<|more|>"]
    assert again.get_chat_template() == tokenizer.get_chat_template()


def test_named_special_tokens_are_a_mapping_in_transformers_4(tmp_path):
    special = (*tiny_models.SPECIAL, "<|more|>")
    tiny_models.tokenizer(special=special, extra_special_tokens={"image_token": "<|more|>"}).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    add_old_names(tmp_path)
    assert read(tmp_path, "tokenizer_config.json")["extra_special_tokens"] == {"image_token": "<|more|>"}
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.image_token == "<|more|>"
    assert again.all_special_tokens == tokenizer.all_special_tokens
