"""What llama.cpp gets is the model, read back by transformers; test_llama_cpp.py asks llama.cpp itself."""

import json
import logging

import gguf
import pytest
import torch
from helpers.gguf_models import (
    LLAMA3,
    SPLITS,
    TEXT,
    as_phi3,
    make_model,
    make_pieces,
    make_tokenizer,
    taking_whole_words,
    with_metaspace,
    write_tiny_gguf,
)
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_exp.deploy.gguf.families import FAMILIES, check_config, check_family
from qlora_exp.deploy.gguf.tokenizers import SPLITS as NAMES
from qlora_exp.deploy.gguf.tokenizers import check_tokenizer, differences, model_name
from qlora_exp.deploy.gguf.write import check, read, round_weights, write
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
        ("gpt2", {}),
        ("phi3", {}),
        ("stablelm", {"use_qkv_bias": True}),
        ("starcoder2", {"sliding_window": None}),
    ],
    ids=str,
)
def test_model_family_survives_a_gguf_round_trip(model_type, fields, tmp_path):
    model, tokenizer = write_tiny_gguf(tmp_path, model_type, **fields)
    # Of biases in Llama's attention and of other families transformers 5.23 does not read all in the file.
    told = (
        {"config": model.config}
        if model_type not in ("llama", "mistral", "qwen2") or "attention_bias" in fields
        else {}
    )
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True), **told
    ).eval()
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(back(ids).logits, model(ids).logits, atol=1e-5)
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size", "max_position_embeddings"):
        if key in model.config.to_dict():
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
    write(model, tokenizer, tmp_path / "turns.gguf", "f32", "tiny")
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


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("type_", ["f32", "q8_0"])
def test_what_is_read_back_is_what_was_rounded(model_type, type_, tmp_path):
    layers = {"gemma3_text": 7, "smollm3": 4}.get(model_type, 2)
    window = {"sliding_window": 128, "query_pre_attn_scalar": 16} if "gemma" in model_type else {"sliding_window": None}
    fields = {"num_hidden_layers": layers, "head_dim": 16} | (window if model_type != "gpt2" else {})
    model, _ = write_tiny_gguf(tmp_path, model_type, type_=type_, **fields)
    round_weights(model, type_)
    kind, found = read(model.config, tmp_path / "model.gguf")
    assert kind is type(model)
    for name, value in model.state_dict().items():
        if name in found or not model.config.tie_word_embeddings:
            assert torch.allclose(found[name], value, atol=1e-6), name
    assert len(found) + model.config.tie_word_embeddings == len(model.state_dict())


@pytest.mark.parametrize(
    ("model_type", "fields", "says"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 32, "attention_factor": 1.7}}, "with attention_factor"),
        ("mistral", {"sliding_window": 16}, "sliding window"),
        ("phi3", {"sliding_window": 16}, "sliding window"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8}, "original_max_position_embeddings": 64}, "rope_type longrope"),
        ("gpt2", {"activation_function": "relu"}, "activation_function relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gemma2", {"query_pre_attn_scalar": 100, "head_dim": 16}, "query_pre_attn_scalar 100, not 16"),
        ("gemma2", {"query_pre_attn_scalar": 16, "head_dim": 16, "layer_types": ["full_attention"] * 2},
         "all but one in 2 attend"),
        ("gemma3_text", {"query_pre_attn_scalar": 16, "head_dim": 16, "attn_logit_softcapping": 30.0}, "softcapping"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "all but one in 4 rotate"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("gemma", {"head_dim": 16, "tie_word_embeddings": False}, "output layer that is not its embedding"),
    ],
    ids=str,
)  # fmt: skip
def test_model_that_llama_cpp_computes_otherwise_is_rejected(model_type, fields, says):
    with pytest.raises(ConfigError, match=rf"{says}.*which llama.cpp does not compute.*Use --to merged"):
        check_config(make_model(model_type, **fields).config)


@pytest.mark.parametrize("family", ["falcon", "mixtral", "cohere", "gpt_bigcode", "qwen3_moe", "bloom", "phi", "gptj"])
def test_family_that_only_llama_cpps_script_writes_is_rejected_with_its_command(family):
    with pytest.raises(ConfigError, match=f"of type {family} are not supported.*convert_hf_to_gguf.py FOLDER"):
        check_family(family)


@pytest.mark.parametrize("family", ["opt", "gpt_neo", "codegen", "xglm", "biogpt"])
def test_family_that_llama_cpp_does_not_have_is_rejected_without_that_command(family):
    with pytest.raises(ConfigError, match="llama.cpp has no such models. Use --to merged") as found:
        check_family(family)
    assert "convert" not in str(found.value)


def test_tensor_without_a_place_is_rejected(tmp_path):
    model = make_model("qwen2")
    model.model.layers[0].mlp.more = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="no place for the tensor model.layers.0.mlp.more.weight in models of type"):
        write(model, make_tokenizer(SPLITS["gpt-2"]), tmp_path / "model.gguf", "f32", "tiny")
    assert [*tmp_path.iterdir()] == []


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
QWEN2 = pre_tokenizers.Split(Regex(NAMES["qwen2"][0]), "isolated")


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("splits a text by .*add_prefix_space", {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}),
        ("splits a text by bytes", {"pre_tokenizer": BYTES}),
        ("splits a text by .*Whitespace", {"pre_tokenizer": pre_tokenizers.Whitespace()}),
        ("splits a text by .*individual_digits",
         {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(False), SPLITS["gpt-2"]])}),
        ("splits a text by ", {"pre_tokenizer": pre_tokenizers.Sequence([QWEN2, SPLITS["gpt-2"]])}),
        ("splits a text by ", {"pre_tokenizer": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(NAMES["qwen2"][0]), "isolated", invert=True), BYTES])}),
        ("changes texts by Lowercase", {"normalizer": normalizers.Lowercase()}),
        ("changes texts by NFKC", {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.NFKC()])}),
        ("begins texts with .*<unk>", {"post_processor": processors.TemplateProcessing(
            single="<s> <unk> $A", special_tokens=[("<s>", 1), ("<unk>", 0)])}),
    ],
)  # fmt: skip
def test_tokenizer_that_llama_cpp_does_not_have_is_rejected(says, change):
    tokenizer = make_tokenizer(SPLITS["gpt-2"])
    for name, part in change.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    with pytest.raises(ConfigError, match=f"{says}.*llama.cpp would read other tokens. Use --to merged"):
        check_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("changes texts by NFKC", {"normalizer": normalizers.NFKC()}),
        ("has no mark for blanks", {"normalizer": normalizers.Prepend("▁")}),
        ("puts several blanks before a text",
         {"normalizer": normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")])}),
    ],
)  # fmt: skip
def test_tokenizer_of_pieces_that_llama_cpp_does_not_have_is_rejected(says, change):
    tokenizer = make_pieces()
    for name, part in change.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    with pytest.raises(ConfigError, match=says):
        check_tokenizer(tokenizer)


def test_merges_that_llama_cpp_would_not_follow_are_rejected():
    tokenizer = make_pieces("Ho", "ow", "How")
    check_tokenizer(tokenizer)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [*backend["model"]["merges"]]
    merges.remove(["Ho", "w"])
    for changed, says in ((merges, "does not join all pairs"), ([["Ho", "w"], *merges], "do not follow one another")):
        backend["model"]["merges"] = changed
        again = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>")
        with pytest.raises(ConfigError, match=says):
            check_tokenizer(again)


def test_whole_words_without_merges_are_rejected_where_llama_cpp_merges_them():
    with pytest.raises(ConfigError, match="ignore_merges"):
        check_tokenizer(taking_whole_words(make_tokenizer(SPLITS["qwen2"])))


def test_composed_characters_are_said_to_differ():
    tokenizer = make_tokenizer(SPLITS["qwen2"])
    assert differences(tokenizer) == []
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    check_tokenizer(tokenizer)
    assert "llama.cpp does not compose characters (NFC)" in differences(tokenizer)[0]


@pytest.mark.parametrize(
    ("scheme", "template", "says", "adds"),
    [
        ("first", None, "none before a text that begins with a space, and none after special tokens", True),
        ("first", "<s>[INST]", "puts no space before other texts", False),
        ("always", "<s>[INST]", "none before a text that begins with a space", True),
        ("never", "<s>[INST]", "", False),
    ],
)
def test_blank_before_a_text_is_decided_by_the_chat_template(scheme, template, says, adds, tmp_path):
    tokenizer = with_metaspace(make_pieces(), scheme)
    tokenizer.chat_template = template
    write(make_model("llama", vocab_size=420), tokenizer, tmp_path / "model.gguf", "f32", "tiny")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.add_space_prefix"].contents() == adds
    assert [says in said for said in differences(tokenizer)] == [True] * bool(says)


def test_blank_before_prompts_only_is_rejected():
    """llama.cpp would put one after each special token between the turns of a dialogue, too."""
    tokenizer = with_metaspace(make_pieces(), "first")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match="a space before a prompt, but none after special tokens in it"):
        check_tokenizer(tokenizer)


@pytest.mark.parametrize(("option", "says"), [("lstrip", "takes blanks"), ("rstrip", "takes blanks")])
def test_added_token_that_takes_blanks_is_rejected(option, says):
    tokenizer = make_tokenizer(SPLITS["gpt-2"])
    tokenizer.add_tokens([AddedToken("<|x|>", **{option: True})])
    with pytest.raises(ConfigError, match=says):
        check_tokenizer(tokenizer)


def test_name_of_the_model_does_not_change_how_llama_cpp_treats_blanks():
    plain, phi3 = make_pieces(), as_phi3(make_pieces())
    assert model_name("Phi-3-mini", plain) == "Phi_3-mini"
    assert model_name("my-phi3", plain) == "my-phi_3"
    assert model_name("llama-3", plain) == "llama-3"
    assert model_name("Phi-3-mini", phi3) == "Phi-3-mini"
    assert model_name("mine", phi3) == "mine (as phi-3)"


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs the package gguf: pip install"):
        check(make_model("llama").config, make_tokenizer(SPLITS["gpt-2"]), "f32")


def test_writing_logs_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_tiny_gguf(tmp_path, "llama")
    assert caplog.text == ""


def test_rows_that_fit_no_block_are_stored_in_16_bits(tmp_path):
    write_tiny_gguf(tmp_path, "llama", type_="q8_0", intermediate_size=100)
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
