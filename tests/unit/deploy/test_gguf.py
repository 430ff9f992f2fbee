"""What llama.cpp gets is the model, read back by transformers; test_llama_cpp.py asks llama.cpp itself."""

import json
import re

import gguf
import pytest
import torch
from helpers.gguf_models import LLAMA3, SPLITS, TEXT, make_tokenizer, write_tiny_gguf
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_exp.deploy import gguf as gguf_writer
from qlora_exp.deploy.gguf import write
from qlora_exp.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
        (
            "llama",
            {"attention_bias": True, "head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        ),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 16}),
    ],
    ids=str,
)
def test_model_family_survives_a_gguf_round_trip(model_type, fields, tmp_path):
    model, tokenizer = write_tiny_gguf(tmp_path, model_type, **fields)
    # Of biases in Llama's attention and of Qwen3's head_dim transformers 5.23 reads nothing in the file.
    told = {"config": model.config} if model_type == "qwen3" or "attention_bias" in fields else {}
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True), **told
    ).eval()
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(back(ids).logits, model(ids).logits, atol=1e-5)
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size", "max_position_embeddings"):
        assert getattr(back.config, key) == pytest.approx(getattr(model.config, key))


def test_llama_3_1_rope_scaling_is_stored_as_factors(tmp_path):
    model, _ = write_tiny_gguf(tmp_path, "llama", rope_parameters=LLAMA3)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    (factors,) = [one.data for one in reader.tensors if one.name == "rope_freqs.weight"]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / torch.tensor(factors), scaled)
    assert factors[0] == 1  # the fastest turn as before
    assert factors[-1] == pytest.approx(8)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_is_described(kind, tmp_path):
    write_tiny_gguf(tmp_path, "qwen2", rope_parameters={
        "rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32
    })  # fmt: skip
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["qwen2.rope.scaling.type"].contents() == kind
    assert fields["qwen2.rope.scaling.factor"].contents() == 4


@pytest.mark.parametrize("pre", SPLITS)
def test_tokenizer_has_the_name_llama_cpp_gives_it(pre, tmp_path):
    _, tokenizer = write_tiny_gguf(tmp_path, "llama", pre)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == pre
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[-1] == "[PAD319]"
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert (kinds[0], kinds[50], kinds[-1]) == (3, 1, 5)  # control, normal, unused
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert not fields["tokenizer.ggml.add_bos_token"].contents()
    assert len(fields["tokenizer.ggml.merges"].contents()) > 10
    (tmp_path / "read").mkdir()
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert back.decode(tokenizer(TEXT)["input_ids"]) == TEXT


def test_end_of_turn_that_is_not_eos_ends_answers_in_llama_cpp(tmp_path):
    model, tokenizer = write_tiny_gguf(tmp_path, "llama")
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    write(model, tokenizer, tmp_path, tmp_path / "turns.gguf", "f32", "tiny")
    fields = gguf.GGUFReader(tmp_path / "turns.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id


def test_sentencepiece_tokenizer_has_scores_and_bytes(tmp_path):
    _, tokenizer = write_tiny_gguf(tmp_path, "llama", "pieces", vocab_size=420)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_bos_token"].contents()
    assert fields["tokenizer.ggml.add_space_prefix"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert (kinds[1], kinds[10], kinds[300], kinds[419]) == (3, 6, 1, 5)  # control, byte, normal, unused
    scores = fields["tokenizer.ggml.scores"].contents()
    joined = [place for place in range(259, len(tokenizer)) if len(tokenizer.convert_ids_to_tokens(place)) > 1]
    assert sorted(joined, key=lambda place: -scores[place]) == joined


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "gpt2", "n_embd": 64, "n_head": 4}, "of type gpt2 are not supported"),
        ({"model_type": "llama", "pre": pre_tokenizers.Whitespace()}, "this tokenizer is not supported"),
        ({"model_type": "llama", "pre": SPLITS["gpt-2"], "rope_parameters": {
            "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic are not supported"),
        ({"model_type": "qwen2", "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 32, "attention_factor": 1.7}}, "attention_factor are not supported"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding window is not supported"),
    ],
)  # fmt: skip
def test_model_that_llama_cpp_would_misread_is_rejected(fields, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        write_tiny_gguf(tmp_path, **fields)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("splits a text by .*add_prefix_space", {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}),
        ("splits a text by bytes", {"pre_tokenizer": BYTES}),
        (
            "splits a text by .*individual_digits",
            {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(False), SPLITS["gpt-2"]])},
        ),
        (
            "splits a text by ",
            {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(gguf_writer._WORDS % ""), "isolated"),
                                                       SPLITS["gpt-2"]])},
        ),
        (
            "splits a text by ",
            {"pre_tokenizer": pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(gguf_writer._WORDS % ""), "isolated", invert=True), BYTES])},
        ),
        ("changes texts by Lowercase", {"normalizer": normalizers.Lowercase()}),
        ("changes texts by NFC", {"normalizer": normalizers.Sequence([normalizers.NFC()])}),
        ("begins texts with .*<unk>", {"post_processor": processors.TemplateProcessing(
            single="<s> <unk> $A", special_tokens=[("<s>", 1), ("<unk>", 0)])}),
    ],
)  # fmt: skip
def test_tokenizer_that_llama_cpp_does_not_have_is_rejected(says, change, tmp_path):
    tokenizer = make_tokenizer(SPLITS["gpt-2"])
    for name, part in change.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    splits = gguf_writer._splits(backend["pre_tokenizer"])
    assert re.search(says, next(gguf_writer._unlike_llama_cpp(tokenizer, backend, splits)))


@pytest.mark.parametrize(("option", "says"), [("lstrip", "takes blanks"), ("rstrip", "takes blanks")])
def test_added_token_that_takes_blanks_is_rejected(option, says, tmp_path):
    tokenizer = make_tokenizer(SPLITS["gpt-2"])
    tokenizer.add_tokens([AddedToken("<|x|>", **{option: True})])
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    splits = gguf_writer._splits(backend["pre_tokenizer"])
    assert says in next(gguf_writer._unlike_llama_cpp(tokenizer, backend, splits))


def test_rows_that_fit_no_block_are_stored_in_16_bits(tmp_path):
    write_tiny_gguf(tmp_path, "llama", type_="q8_0", intermediate_size=100)
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
