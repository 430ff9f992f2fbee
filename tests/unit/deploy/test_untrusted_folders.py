"""A saved folder of a stranger is loaded or refused in one line, in bounded time and memory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.tiny_models import CHATML

from qlora_exp.deploy import chat, load, untrusted_folders
from qlora_exp.utils.errors import ModelError, UserError
from qlora_exp.utils.processes.limits import call_limited

pytestmark = pytest.mark.slow


@pytest.fixture
def adapter(trained_adapters, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_adapters(), tmp_path / "adapter"))


@pytest.fixture
def whole(trained_adapters, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_adapters("method=full", "tracking.log_full_model=true"), tmp_path / "whole"))


@pytest.fixture
def limit_seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let calls take at most so many seconds."""

    def limit(most: int) -> None:
        monkeypatch.setattr(
            untrusted_folders, "call_limited", lambda *words, seconds, mib: call_limited(*words, seconds=most, mib=mib)
        )

    return limit


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_adapter_config_is_untrusted(adapter: Path, limit_seconds):
    file = adapter / "adapter_config.json"
    before = file.read_text()
    hangs = "(([a-z._0-9])+)+Q"
    for values, why in (
        ({"peft_type": "EVIL"}, "peft_type is 'EVIL', but the config of its run says LORA"),
        ({"peft_type": 3}, "peft_type is 3"),
        ({"target_modules": hangs}, "adapter_config.json: attaching the adapter needs more than 1 seconds"),
        ({"rank_pattern": {hangs: 4}}, "more than 1 seconds"),
        ({"init_lora_weights": "pissa_niter_99999999"}, "more than 1 seconds"),
        ({"r": 10**6}, "adapter_config.json describes an adapter with 2,0.* values, which its files have not"),
        ({"r": "x"}, "does not fit"),
        ({"target_modules": 3}, "does not fit"),
        ({"modules_to_save": ["lm_head"]}, "cannot be loaded, a file may be damaged: KeyError"),
        ({"alora_invocation_tokens": ["x"]}, "may be damaged: ValueError"),
    ):
        file.write_text(before)
        edit(file, **values)
        limit_seconds(1 if "seconds" in why else 10)
        with pytest.raises(ModelError, match=why):
            load.load(str(adapter), device="cpu")
    file.write_text(before)
    edit(file, base_model_name_or_path="/etc/passwd", auto_mapping={"parent_library": "os", "base_model_class": "x"})
    load.load(str(adapter), device="cpu")  # neither is read


def test_tokenizer_is_untrusted(adapter: Path, limit_seconds):
    limit_seconds(2)
    file = adapter / "tokenizer.json"
    before = json.loads(file.read_text())
    expanding = [{"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 10}] * 9
    for values, why in (
        ({"a": 1, "added_tokens": None, "model": None}, "the tokenizer is missing or incomplete"),
        ({"model": {"type": "EVIL"}}, "incomplete"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
            "Onig",
        ),
        ({"normalizer": {"type": "Sequence", "normalizers": expanding}}, "the tokenizer needs more than .* short text"),
    ):
        file.write_text(json.dumps(before | values))
        with pytest.raises(ModelError, match=why):
            load.find(str(adapter), device="cpu").tokenizer()
    file.write_text(json.dumps(before))
    for values, why in (({"eos_token": None}, "eos_token must be a text"), ({"chat_template": 3}, "incomplete")):
        edit(adapter / "tokenizer_config.json", **values)
        (adapter / "chat_template.jinja").unlink(missing_ok=True)
        with pytest.raises(ModelError, match=why):
            load.find(str(adapter), device="cpu").tokenizer()


def test_generation_settings_of_a_stranger_take_no_effect(whole: Path, caplog):
    file = whole / "generation_config.json"
    before = file.read_text()
    edit(file, num_beams=10**5, stop_strings=["xyz"], custom_generate="evil/repo", penalty_alpha=0.5, is_assistant=True)
    model = chat.load_chat_model({"default": str(whole)}, device="cpu")
    assert model.answer(chat.asked("hi"), chat.Sampling(max_new_tokens=2)) is not None
    assert "not used: custom_generate, is_assistant, num_beams, penalty_alpha" in caplog.text
    assert model.model.generation_config.stop_strings == ["xyz"]
    config = (whole / "config.json").read_text()
    edit(whole / "config.json", output_hidden_states="x")
    with pytest.raises(ModelError, match="may be damaged: TypeError"):
        load.load(str(whole), device="cpu")
    (whole / "config.json").write_text(config)
    file.write_text(before)
    edit(file, eos_token_id="x")
    with pytest.raises(ModelError, match="generation_config.json: eos_token_id must be the number of a token"):
        load.load(str(whole), device="cpu")
    for stops in ("x", [3], ["x" * 1000], ["x"] * 1000):
        file.write_text(before)
        edit(file, stop_strings=stops)
        with pytest.raises(ModelError, match="stop_strings must be at most 20 short texts"):
            load.load(str(whole), device="cpu")


def test_weights_that_are_missing_or_too_many_are_refused(whole: Path):
    for layers, why in ((1, "have 9 tensors that its config does not describe"), (3, "lack 9 tensors")):
        edit(whole / "config.json", num_hidden_layers=layers)
        with pytest.raises(ModelError, match=why):
            load.load(str(whole), device="cpu")
    edit(whole / "config.json", num_hidden_layers=1000)
    with pytest.raises(ModelError, match="its config describes a model with more than"):
        load.load(str(whole), device="cpu")


def test_config_that_is_no_text_is_refused(adapter: Path):
    (adapter / "qlora_exp.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="qlora_exp.yaml is damaged"):
        load.find(str(adapter))
    for content in (b"[]", b"[" * 100_000, b"{}"):
        shutil.copy(adapter / "base.json", adapter / "kept")
        (adapter / "base.json").write_bytes(content)
        with pytest.raises(UserError):
            load.find(str(adapter))


def test_token_without_an_embedding_is_refused(adapter: Path, monkeypatch):
    model = chat.load_chat_model({"default": str(adapter)}, device="cpu")
    assert model.tokenizer.chat_template != CHATML  # that of the run's format
    monkeypatch.setattr(type(model.tokenizer), "__call__", lambda *_, **__: {"input_ids": [[10**9]]})
    with pytest.raises(ModelError, match="has the token 1000000000, but the model only"):
        model.answer(chat.asked("hi"), chat.Sampling(max_new_tokens=2))
