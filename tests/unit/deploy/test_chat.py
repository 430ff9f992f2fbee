"""Answers in the format that each adapter was trained with, from one base."""

import io
import json
from dataclasses import replace

import pytest
import torch
from support import QUICK, exit_code

from qlora_exp.config.hydra_compose import compose
from qlora_exp.data.end_of_turn import EndOfTurn
from qlora_exp.data.prompts import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from qlora_exp.deploy import load
from qlora_exp.deploy.chat import (
    BASE,
    Request,
    Sampling,
    answers,
    asked,
    load_chat_model,
    read_requests,
)
from qlora_exp.models.base import stop_tokens
from qlora_exp.utils.errors import ConfigError, DataError, ModelError

pytestmark = pytest.mark.slow

SHORT = Sampling(max_new_tokens=6)
CHAT = "dataset.format=chat"


@pytest.fixture(scope="module")
def talker(trained_adapters):
    """Two adapters on one base, trained in different formats."""
    sources = {"default": str(trained_adapters("training.max_steps=9")), "same_kind": str(trained_adapters(CHAT))}
    return load_chat_model(sources, device="cpu")


def test_prompt_has_the_format_the_adapter_was_trained_with(talker):
    assert talker.prompt(asked("Why?")) == (ALPACA_WITHOUT_INPUT.format(prompt="Why?"), True)
    chat = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert talker.prompt(asked("Why?", "same_kind")) == (chat, True)
    given = Request(asked("Why?").messages, input="rain")
    assert talker.prompt(given) == (ALPACA_WITH_INPUT.format(prompt="Why?", input="rain"), False)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    whole, _ = talker.prompt(Request(turns))
    one, two = (ALPACA_WITHOUT_INPUT.format(prompt=word) for word in "ac")
    assert whole == f"{one}b<|im_end|>{two}"


@pytest.mark.parametrize("format_", ["text", "prompt_completion"])
def test_plain_formats_leave_the_prompt_unchanged(format_, trained_adapters):
    words = (f"dataset.format={format_}", *(["dataset.text_column=output"] if format_ == "text" else []))
    plain = load_chat_model({"default": str(trained_adapters(*words))}, device="cpu")
    assert plain.prompt(asked("Why?"))[0] == "Why?"


def test_request_is_answered_by_its_adapter(talker, trained_adapters):
    def alone(words, text):
        model, tokenizer = load.load(str(trained_adapters(*words)), device="cpu")
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()

    first = alone(("training.max_steps=9",), talker.prompt(asked("Why?"))[0])
    second = alone((CHAT,), talker.prompt(asked("Why?", "same_kind"))[0])
    for _ in range(2):  # switched there and back
        assert talker.answer(asked("Why?"), SHORT) == first
        assert talker.answer(asked("Why?", "same_kind"), SHORT) == second
    model, tokenizer = load.load(str(trained_adapters("training.max_steps=9")), device="cpu")
    ids = tokenizer(talker.prompt(asked("Why?"))[0], return_tensors="pt")["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        found = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    base = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert talker.answer(asked("Why?", BASE), SHORT) == base != first


def test_answer_is_streamed(talker):
    pieces = []
    answer = talker.answer(asked("Why?"), SHORT, pieces.append)
    assert "".join(pieces) == answer


def test_each_adapter_ends_its_answers_with_its_own_end(talker):
    ends = {"default": EndOfTurn(None, "### End\n"), "same_kind": EndOfTurn(9, "")}
    changed = replace(talker, ends=ends)
    eos = stop_tokens(talker.model, talker.tokenizer)
    assert changed._stops(None) == (eos, ["### End"])
    assert changed._stops("same_kind") == (sorted([*eos, 9]), [])


def test_sampling_is_determined_by_its_seed(talker):
    drawn = [
        talker.answer(asked("Why?"), Sampling(16, 1, top_p=1, repetition_penalty=1, seed=seed)) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1, 1e-39, 1e39, float("nan"), float("inf")]),
        ("repetition_penalty", [0, 1e-39, float("nan"), float("inf")]),
        ("top_p", [0, 1.1, float("nan")]),
        ("top_k", [-1]),
        ("max_new_tokens", [0, -5]),
        ("seed", [-1, 2**32]),
    ],
)
def test_invalid_sampling_values_are_rejected(name, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"sampling.*{name}"):
            Sampling(**{name: value})


def test_request_that_does_not_fit_the_format_is_rejected(talker):
    system = [{"role": "system", "content": "Be brief."}, *asked("Why?").messages]
    with pytest.raises(DataError, match="refuses this dialogue.*has only user and assistant turns"):
        talker.answer(Request(system), SHORT)
    assert "system\nBe brief." in talker.prompt(Request(system, adapter="same_kind"))[0]
    with pytest.raises(DataError, match="an `input` besides the prompt"):
        talker.answer(Request(asked("Why?").messages, "rain", "same_kind"), SHORT)
    with pytest.raises(DataError, match="longer than the 2048"):
        talker.answer(asked("a" * 3000), SHORT)
    with pytest.raises(ConfigError, match="no adapter 'same'; did you mean 'same_kind'"):
        talker.answer(asked("Why?", "same"), SHORT)


def test_system_message_that_the_format_leaves_out_is_rejected(talker):
    system = [{"role": "system", "content": "Be brief."}, *asked("Why?").messages]
    silent = "{% for m in messages if m['role'] == 'user' %}Q: {{ m['content'] }}\n{% endfor %}"
    loud = "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}"
    changed = replace(talker, templates={"default": silent, "same_kind": loud})
    with pytest.raises(DataError, match="leaves out messages with the role system"):
        changed.prompt(Request(system))
    assert changed.prompt(asked("Why?")) == ("Q: Why?\n", True)
    assert changed.prompt(Request(system, adapter="same_kind")) == ("BE BRIEF.\nWHY?\n", True)


def test_trained_prompt_takes_room(talker):
    config = compose([*QUICK, "method=prompt_tuning", "method.num_virtual_tokens=8"])
    changed = replace(talker, saved={"default": replace(talker.saved["default"], config=config)})
    assert (changed.room(None, 10), changed.room(BASE, 10), talker.room(None, 10)) == (2030, 2038, 2038)


def test_full_model_answers_and_has_no_base(trained_adapters):
    whole = load_chat_model(
        {"default": str(trained_adapters("method=full", "tracking.log_full_model=true"))}, device="cpu"
    )
    assert isinstance(whole.answer(asked("Why?"), SHORT), str)
    with pytest.raises(ConfigError, match="a complete model, without a base"):
        whole.answer(asked("Why?", BASE), SHORT)


@pytest.mark.parametrize(("quantization", "stored"), [("nf4", "Params4bit"), ("int8", "Int8Params")])
def test_base_is_quantized_on_request(quantization, stored, trained_adapters):
    small = load_chat_model({"default": str(trained_adapters())}, device="cpu", quantization=quantization)
    kinds = {type(one).__name__ for one in small.model.parameters()}
    assert stored in kinds


def test_adapters_of_different_bases_are_rejected(trained_adapters):
    llama, opt = str(trained_adapters()), str(trained_adapters("model=tiny_opt"))
    with pytest.raises(ModelError, match="was trained on random:opt"):
        load_chat_model({"default": llama, "b": opt}, device="cpu")
    with pytest.raises(ModelError, match="is a complete model"):
        load_chat_model(
            {"default": llama, "b": str(trained_adapters("method=full", "tracking.log_full_model=true"))}, device="cpu"
        )
    for name in (BASE, "v1.0", ""):
        with pytest.raises(ConfigError, match=f"cannot be called '{name}'"):
            load_chat_model({name: llama}, device="cpu")


def test_adapters_of_different_types_are_rejected_before_loading(trained_adapters, monkeypatch):
    sources = {"default": str(trained_adapters()), "other": str(trained_adapters("method=ia3"))}
    monkeypatch.setattr(load, "load_saved", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ModelError, match="other: .* is an adapter of type IA3, and .* one of type LORA"):
        load_chat_model(sources, device="cpu")


def test_empty_prompt_in_plain_format_is_rejected(trained_adapters):
    plain = load_chat_model(
        {"default": str(trained_adapters("dataset.format=text", "dataset.text_column=output"))}, device="cpu"
    )
    with pytest.raises(DataError, match="an empty prompt"):
        plain.answer(asked(""), SHORT)


def test_requests_are_read_from_text_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("One?\n\nTwo?\n")
    assert [*read_requests(tmp_path / "a.txt")] == [asked("One?"), asked("Two?")]
    (tmp_path / "c.jsonl").write_text('{"prompt": "One\u2028line\x85?"}\n')
    assert [*read_requests(tmp_path / "c.jsonl")] == [asked("One\u2028line\x85?")]
    lines = [{"prompt": "One?", "input": "x", "adapter": "b"}, {"messages": asked("Two?").messages}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [*read_requests(tmp_path / "b.jsonl")] == [Request(asked("One?").messages, "x", "b"), asked("Two?")]


def test_content_of_a_request_is_text(tmp_path):
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "a 1."}]
    said = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    lines = [{"messages": [{"role": "user", "content": parts}]}, {"prompt": parts}, {"prompt": 7}]
    lines += [{"messages": [{"role": "user", "content": "a"}, said]}]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, lines)).encode())
    one, two, three, called = read_requests(tmp_path / "a.jsonl")
    assert one == two == asked("Say a 1.")
    assert three == asked("7")
    assert called.messages[1] == said
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfWhy?\n")
    assert [*read_requests(tmp_path / "a.txt")] == [asked("Why?")]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}]},
        {"messages": [{"role": "user", "content": {"text": "a"}}]},
        {"messages": [{"role": "human", "content": "a"}]},
        {"messages": "a"},
        {"prompt": {"text": "a"}},
        {"prompt": "a", "input": ["b"]},
    ],
)
def test_content_that_is_no_text_is_rejected_with_its_place(fields, tmp_path):
    (tmp_path / "b.jsonl").write_text(f'{{"prompt": "a"}}\n{json.dumps(fields)}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: "):
        list(read_requests(tmp_path / "b.jsonl"))


@pytest.mark.parametrize("line", ["{", "[]", '"a"', '{"question": "a"}', "3"])
def test_invalid_request_line_is_named(line, tmp_path):
    (tmp_path / "b.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: not an object with `prompt`"):
        list(read_requests(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match="none"):
        list(read_requests(tmp_path / "none.txt"))


def test_answers_include_their_requests(talker):
    found = [*answers(talker, [asked("Why?"), asked("Who?", "same_kind")], SHORT)]
    assert found[1]["adapter"] == "same_kind"
    assert found[0] == {"messages": asked("Why?").messages, "answer": talker.answer(asked("Why?"), SHORT)}


def test_generate_command_answers_a_prompt_or_a_file(trained_adapters, tmp_path, capsys):
    folder, short = str(trained_adapters()), ("--max-new-tokens", "4", "--device", "cpu")
    assert exit_code("generate", folder, "--prompt", "Why?", *short) == 0
    one = capsys.readouterr().out.strip()
    (tmp_path / "p.txt").write_text("Why?\nWho?\n")
    assert exit_code("generate", folder, "--file", "p.txt", "--out", "a.jsonl", *short) == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == ["Why?", "Who?"]
    assert lines[0]["answer"] == one
    assert exit_code("generate", folder, "--file", "p.txt", "--out", "none/a.jsonl", *short) == 1
    assert "no folder" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("Why?\n" + "long " * 2000)
    assert exit_code("generate", folder, "--file", "p.txt", "--out", "b.jsonl", *short) == 1
    assert "request 2: the dialogue has" in capsys.readouterr().err
    assert not list(tmp_path.glob("b.jsonl*"))
    assert exit_code("generate", folder, *short) == 1
    assert "give --prompt TEXT or --file FILE" in capsys.readouterr().err


def test_chat_command_continues_after_mistakes(trained_adapters, monkeypatch, capsys):
    said = "Why?\n/adapter none\n/adapter b\nWho?\n/what\n/system Be brief.\nWho?\n/reset\n/exit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    words = ("--adapter", f"b={trained_adapters(CHAT)}", "--max-new-tokens", "4", "--device", "cpu")
    assert exit_code("chat", str(trained_adapters()), *words) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 3
    assert "no adapter 'none'" in err
    assert "/adapter NAME" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("word", ["nothing", "=x", "default=x"])
def test_adapter_without_a_name_is_rejected(word, trained_adapters, capsys):
    assert exit_code("chat", str(trained_adapters()), "--adapter", word) == 1
    assert "NAME=SOURCE" in capsys.readouterr().err
