"""llama.cpp itself reads what is written: the same tokens, and the same answers as transformers."""

import json
import urllib.request

import pytest
import torch
from helpers.gguf_models import LLAMA3, SPLITS, TEXT, write_tiny_gguf

from qlora_exp.deploy import export, gguf, llama_cpp, load
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


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "head_dim": 32}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        ("qwen3", {"head_dim": 32}),
    ],
    ids=str,
)
def test_llama_cpp_computes_what_transformers_computes(model_type, fields, tmp_path):
    model, tokenizer = write_tiny_gguf(tmp_path, model_type, scale=True, **fields)
    whole = tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        every = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    # llama.cpp tells no probabilities where the likeliest byte is a part of a character only.
    last = max(place for place, one in enumerate(every.argmax(-1)) if tokenizer.decode(one).isascii())
    ids, expected = whole[: last + 1], every[last]
    server = llama_cpp.load(tmp_path / "model.gguf", 128, 1)
    asked = {"prompt": ids, "n_predict": 1, "n_probs": 5, "temperature": 0, "ignore_eos": True}
    found = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(found) == 5
    for one in found:  # llama.cpp keeps keys and values in 16 bits
        assert one["logprob"] == pytest.approx(expected[one["id"]].item(), abs=5e-2)
    assert found[0]["id"] == expected.argmax()
    assert last > 10


@pytest.mark.parametrize("pre", SPLITS)
def test_llama_cpp_tokenizes_like_the_tokenizer(pre, tmp_path):
    _, tokenizer = write_tiny_gguf(tmp_path, "llama", pre)
    server = llama_cpp.load(tmp_path / "model.gguf", 64, 1)
    for text in (TEXT, "12345 1234 12 don't DON'T  \n\n x\r\n", "</s>a<s>"):
        found = post(server, "/tokenize", {"content": text, "add_special": True, "parse_special": True})
        assert found["tokens"] == tokenizer(text)["input_ids"]


def test_llama_cpp_tokenizes_like_the_llama_2_tokenizer(tmp_path):
    _, tokenizer = write_tiny_gguf(tmp_path, "llama", "pieces", vocab_size=420)
    server = llama_cpp.load(tmp_path / "model.gguf", 64, 1)
    for text in (TEXT, "concrete carry  load\n", "a", "</s>how long"):
        found = post(server, "/tokenize", {"content": text, "add_special": True, "parse_special": True})
        assert found["tokens"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("mistake", ["_permuted", "rope_freqs"])
def test_missing_position_data_changes_the_output(mistake, tmp_path, monkeypatch):
    tensors = gguf._tensors

    def forgetful(model, names, permuted):
        found = tensors(model, names, permuted and mistake != "_permuted")
        return ((name, one) for name, one in found if name != f"{mistake}.weight")

    monkeypatch.setattr(gguf, "_tensors", forgetful)
    with pytest.raises((AssertionError, TypeError)):
        test_llama_cpp_computes_what_transformers_computes("llama", {"rope_parameters": LLAMA3}, tmp_path)


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


def test_missing_llama_cpp_is_detected(monkeypatch):
    assert llama_cpp.installed()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert not llama_cpp.installed()
