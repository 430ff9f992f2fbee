"""llama.cpp itself reads what is written: the same tokens, and the same answers as transformers."""

import json
import urllib.request
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.gguf_models import (
    HARD_TEXTS,
    LLAMA3,
    TOKENIZERS,
    exact_server,
    largest_difference,
    make_model,
    write_tiny_gguf,
)
from helpers.prompt_paths import Paths, compare

from qlora_exp.deploy import export, llama_cpp, load
from qlora_exp.deploy.gguf import families
from qlora_exp.deploy.gguf.families import FAMILIES
from qlora_exp.deploy.gguf.write import write
from qlora_exp.deploy.llama_cpp import complete, generator

pytestmark = pytest.mark.slow


def greedy(model, ids: list[int], count: int) -> list[int]:
    with torch.no_grad():
        found = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=-1)
    return found[0, len(ids) :].tolist()


def post(server, path: str, body: dict) -> dict:
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


WINDOW = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
TURNING_A_PART = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
EXACT, GELU = 1e-5, 2e-3
"""Of the largest log probability. llama.cpp takes GELU from a table of 16-bit values."""
COMPUTED = [
    ("llama", {"tie_word_embeddings": True}, EXACT),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}, EXACT),
    ("llama", {"rope_parameters": LLAMA3}, EXACT),
    ("mistral", {"sliding_window": None}, EXACT),
    ("qwen2", {}, EXACT),
    ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, EXACT),
    ("qwen2", {"rope_parameters": YARN}, EXACT),
    ("qwen3", {"head_dim": 32}, EXACT),
    ("phi3", {}, EXACT),
    ("phi3", {"rope_parameters": TURNING_A_PART, "tie_word_embeddings": True}, EXACT),
    ("smollm3", {"num_hidden_layers": 5}, EXACT),
    ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
                 "attention_multiplier": 0.2}, EXACT),
    ("olmo2", {}, EXACT),
    ("stablelm", {"use_qkv_bias": True}, EXACT),
    ("stablelm", {"use_parallel_residual": True, "rope_parameters": TURNING_A_PART}, EXACT),
    ("gemma", {"head_dim": 32}, GELU),
    ("gemma2", {**WINDOW, "num_hidden_layers": 3}, GELU),
    ("gemma3_text", {**WINDOW, "num_hidden_layers": 7}, GELU),
    ("gpt2", {}, GELU),
    ("gpt2", {"n_inner": 96, "tie_word_embeddings": False}, GELU),
    ("gpt_neox", {}, GELU),
    ("gpt_neox", {"use_parallel_residual": False, "rope_parameters": TURNING_A_PART}, GELU),
    ("starcoder2", {"sliding_window": None}, GELU),
]  # fmt: skip


THOROUGH = (1, 4, 5, 6, 9, 14, 19, 21)
"""Places of further settings of a family, which `nox -s thorough` tries."""
CASES = [
    pytest.param(*case, marks=pytest.mark.thorough if place in THOROUGH else ()) for place, case in enumerate(COMPUTED)
]


@pytest.mark.parametrize(("model_type", "fields", "most"), CASES, ids=str)
def test_llama_cpp_computes_what_transformers_computes(model_type, fields, most, tmp_path):
    model, _ = write_tiny_gguf(tmp_path, model_type, "ascii", train=True, **fields)
    server = exact_server(tmp_path / "model.gguf")
    difference, compared = largest_difference(server, model, torch.randint(3, 300, (80,)).tolist())
    assert difference < most
    assert compared >= 64


@pytest.mark.parametrize("model_type", ["llama", "gemma", "gpt_neox"])
def test_tensor_stored_in_the_layout_of_transformers_changes_the_output(model_type, tmp_path, monkeypatch):
    plain = replace(FAMILIES[model_type], layouts=())
    monkeypatch.setitem(FAMILIES, model_type, plain)
    with pytest.raises(AssertionError):
        test_llama_cpp_computes_what_transformers_computes(model_type, {}, GELU, tmp_path)


def test_missing_factors_of_rotary_positions_change_the_output(tmp_path, monkeypatch):
    tensors = families.tensors
    monkeypatch.setattr(families, "tensors", lambda model: (one for one in tensors(model) if one.key is not None))
    with pytest.raises(AssertionError):
        test_llama_cpp_computes_what_transformers_computes("llama", {"rope_parameters": LLAMA3}, EXACT, tmp_path)


def assert_same_tokens(server, tokenizer, texts):
    for text in texts:
        for special in (True, False):
            asked = {"content": text, "add_special": special, "parse_special": True}
            assert (text, post(server, "/tokenize", asked)["tokens"]) == (
                text, tokenizer(text, add_special_tokens=special)["input_ids"],
            )  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_splits_hard_texts_into_the_same_tokens(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    write(make_model("llama", vocab_size=len(tokenizer) + 3), tokenizer, tmp_path / "model.gguf", "f32", "tiny")
    assert_same_tokens(llama_cpp.load(tmp_path / "model.gguf", 64, 1), tokenizer, HARD_TEXTS)


def test_system_message_with_unicode_is_read(trained_adapters, tmp_path):
    told = "dataset.system_message='Sei höflich. 🙂'"
    saved = load.find(str(trained_adapters("dataset.format=chat", told)), device="cpu")
    export.export(saved, tmp_path / "made", "gguf", type_="f32")
    server = llama_cpp.load(tmp_path / "made" / "model.gguf", 512, 1)
    asked = [{"role": "user", "content": "What is it?"}]
    assert "Sei höflich. 🙂" in post(server, "/apply-template", {"messages": asked})["prompt"]


def test_exported_run_answers_in_its_training_format(trained_adapters, tmp_path):
    export.export(load.find(str(trained_adapters()), device="cpu"), tmp_path / "made", "gguf", type_="f32")
    model, tokenizer = load.load(str(tmp_path / "made"), device="cpu")
    server = llama_cpp.load(tmp_path / "made" / "model.gguf", 512, 1)
    asked = [{"role": "user", "content": "What is it?"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert "### Instruction:\nWhat is it?" in prompt
    assert post(server, "/apply-template", {"messages": asked})["prompt"] == prompt
    ids = tokenizer(prompt)["input_ids"]
    told = generator(server, 6)([ids])
    assert told.texts == [tokenizer.decode(greedy(model, ids, 6))]
    assert told.texts[0] == complete(server, prompt, 6)["choices"][0]["text"]
    assert told.tokens == 6
    assert len(told.step_seconds) == 5
    assert 0 < told.first_token_seconds < told.seconds
    chat = post(server, "/v1/chat/completions", {"messages": asked, "max_tokens": 6, "temperature": 0})
    assert chat["choices"][0]["message"]["content"].strip() == told.texts[0].strip()


@pytest.mark.parametrize(
    "name",
    [
        "ChatML, tokenizer that adds BOS",
        "prompt_completion, pieces with a mark at the beginning",
        "text, tokenizer that adds BOS",
    ],
)
def test_prompt_in_llama_cpp_is_that_of_training(name, tmp_path):
    paths = Paths(name, tmp_path)
    asked = [[{"role": "user", "content": text}] for text in ("Why?", " Why\n is it?", "12 <|im_end|>", "“Why?”")]
    counts = Counter[str]()
    compare(paths, asked, counts, paths.llama_cpp())
    assert counts["llama.cpp"] == len(asked)


def test_missing_llama_cpp_is_detected(monkeypatch):
    assert llama_cpp.installed()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert not llama_cpp.installed()
