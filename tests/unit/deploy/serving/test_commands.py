"""Commands of other servers, and what `serve` refuses before anything is loaded or written."""

import json
import os
import shutil
import socket

import pytest
from support import exit_code

from qlora_exp.deploy import export, load
from qlora_exp.deploy.serving import commands
from qlora_exp.utils.errors import ConfigError

pytestmark = pytest.mark.slow


def test_adapter_is_merged_once_for_serving(trained_adapters, tmp_path):
    saved = load.find(str(trained_adapters()), device="cpu")
    assert commands.folder_of(saved, tmp_path / "served") == tmp_path / "served"
    written = os.stat(tmp_path / "served" / "model.safetensors").st_mtime_ns
    commands.folder_of(saved, tmp_path / "served")
    assert os.stat(tmp_path / "served" / "model.safetensors").st_mtime_ns == written
    whole = load.find(str(tmp_path / "served"), device="cpu")
    assert commands.folder_of(whole, tmp_path / "unused") == whole.folder
    other = load.find(str(trained_adapters("lora_variant=dora")), device="cpu")
    with pytest.raises(ConfigError, match="contains something else"):
        commands.folder_of(other, tmp_path / "served")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--with", "vllm"], "pip install vllm"),
        (["--with", "llama.cpp"], "needs a GGUF file"),
        (["--with", "vllm", "--adapter", "b=x"], "--adapter: only for a model that is served by this"),
        (["--print", "--max-new-tokens", "7"], "--max-new-tokens: only for a model that is served by this"),
        (["--out", "served"], "--out: only for other programs"),
        (["--api-key-env", "NOT_SET"], "--api-key-env NOT_SET: this environment variable is not set"),
        (["--temperature", "-1"], "temperature=-1.0 must be 0, or from"),
        (["--adapter", "nothing"], "must be NAME=SOURCE"),
        (["--port", "99999"], "cannot serve at"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_cannot_be_served_is_refused_before_anything_is_loaded(
    words, says, trained_adapters, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(load, "load_saved", lambda *_: pytest.fail("loaded"))
    assert exit_code("serve", str(trained_adapters()), *words) == 1
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_gguf_file_is_not_for_vllm(trained_adapters, tmp_path, capsys):
    export.export(load.find(str(trained_adapters()), device="cpu"), tmp_path / "made", "gguf", type_="q8_0")
    assert exit_code("serve", str(tmp_path / "made"), "--with", "vllm") == 1
    assert "serve it --with llama.cpp" in capsys.readouterr().err
    assert exit_code("serve", str(tmp_path / "made"), "--print", "--port", "81") == 0
    assert f"llama-server -m {tmp_path / 'made' / 'model.gguf'} --host 127.0.0.1 --port 81" in capsys.readouterr().out


def test_serve_print_shows_commands_without_starting_them(trained_adapters, capsys, tmp_path):
    assert exit_code("serve", str(trained_adapters()), "--print", "--out", "served") == 0
    shown = capsys.readouterr().out
    assert f"qlora-exp merge {trained_adapters()} --out served\n" in shown
    assert f"qlora-exp serve {trained_adapters()} --host 127.0.0.1 --port 8000\n" in shown
    assert "vllm serve served" in shown
    assert "--enable-lora" not in shown  # nobody else has a random base
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def vllm_command(trained_adapters, tmp_path):
    """Return vLLM's command for an adapter of a hub model whose config is changed, or None."""
    folder = shutil.copytree(trained_adapters(), tmp_path / "adapter")
    written = json.loads((folder / "adapter_config.json").read_text())

    def command(revision=None, **changes):
        (folder / "adapter_config.json").write_text(json.dumps(written | changes))
        saved = load.find(str(folder), device="cpu")
        hub = saved.config.model.model_copy(update={"model_name_or_path": "org/model", "revision": revision})
        of_hub = export.replace(saved, config=saved.config.model_copy(update={"model": hub}))
        made = commands.adapter_on_vllm(of_hub, "127.0.0.1", 8000)
        return None if made is None else made.command

    return command


def test_vllm_serves_plain_lora_without_merging(vllm_command, tmp_path):
    command = vllm_command()
    assert command[:6] == ["vllm", "serve", "org/model", "--enable-lora", "--max-lora-rank", "16"]
    assert f"adapter={tmp_path / 'adapter'}" in command
    commit = "a" * 40
    assert vllm_command(commit)[:5] == ["vllm", "serve", "org/model", "--revision", commit]
    for rank, most in ((1, "1"), (4, "8"), (17, "32"), (300, "320"), (512, "512")):
        command = vllm_command(r=rank, use_rslora=True)
        assert command[command.index("--max-lora-rank") + 1] == most


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_base_that_was_quantized_in_training_is_named(method, trained_adapters, tmp_path):
    saved = load.find(str(trained_adapters(f"method={method}")), device="cpu")
    hub = saved.config.model.model_copy(update={"model_name_or_path": "org/model"})
    of_hub = export.replace(saved, config=saved.config.model_copy(update={"model": hub}))
    (line,) = [line for line in commands.commands(of_hub, tmp_path, "127.0.0.1", 80) if "without merging" in line]
    says = "a base that is not stored as nf4_double, so another model than the run measured"
    assert (says in line) == (method == "qlora")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"trainable_token_indices": [3]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"r": 513},
        {"a_setting_of_later_versions": True},
    ],
    ids=str,
)
def test_adapter_that_vllm_would_refuse_or_misread_is_served_merged_only(changes, vllm_command):
    assert vllm_command(**changes) is None


def test_occupied_port_is_reported(trained_adapters, capsys, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert exit_code("serve", str(trained_adapters()), "--port", str(taken.getsockname()[1])) == 1
    assert "cannot serve at" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
