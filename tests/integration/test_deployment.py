"""From a trained run to a model that others load and ask."""

import json
import os
import signal
import socket
import time
from contextlib import suppress
from typing import Any

import mlflow
import pytest
import torch
from helpers import processes
from openai import APIConnectionError, OpenAI
from support import QUICK, exit_code

from qlora_exp.config.hydra_compose import compose
from qlora_exp.deploy import load
from qlora_exp.deploy.chat import Sampling, asked, load_chat_model
from qlora_exp.tracking.mlflow_store import client


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(["method=lora"], marks=pytest.mark.thorough),
        ["method=qlora", "lora_variant=dora"],
        ["method=full", "tracking.log_full_model=true"],
    ],
)
def test_logged_model_loads_as_it_was_trained(choice: list[str], run_quick, mlflow_uri):
    result = run_quick(*choice, "training.learning_rate=1e-2")
    ids = torch.arange(40, 60)[None]
    answers = []
    logged = client(mlflow_uri).get_run(result.run_id).outputs.model_outputs[0].model_id
    mlflow.set_tracking_uri(mlflow_uri)
    version = mlflow.register_model(f"models:/{logged}", f"mine-{result.run_id}")
    registered = f"models:/{version.name}/{version.version}"
    for source in (result.run_id, f"models:/{logged}", registered, str(result.output_dir / "model")):
        model, tokenizer = load.load(source, mlflow_uri, device="cpu")
        assert tokenizer.eos_token == "<|im_end|>"
        with torch.no_grad():
            answers.append(model(ids).logits)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    base, _ = load.load(run_quick(*choice, "training.learning_rate=1e-30").run_id, mlflow_uri, device="cpu")
    with torch.no_grad():
        assert not torch.equal(base(ids).logits, answers[0])


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.long
def test_serve_command_answers_until_ctrl_c(trained_adapters, tmp_path):
    port, log, key = free_port(), tmp_path / "log", {"KEY": "sesame"}
    words = ["serve", str(trained_adapters()), "--adapter", f"b={trained_adapters('dataset.format=chat')}"]
    words += ["--port", str(port), "--device", "cpu", "--max-new-tokens", "2000", "--api-key-env", "KEY"]
    process = processes.start(processes.interpreter, ["-m", "qlora_exp", *words], tmp_path / "out", log, key)
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sesame", max_retries=0)
    try:
        for _ in range(600):
            try:
                names = [model.id for model in client.models.list()]
                break
            except APIConnectionError:
                assert process.is_alive(), log.read_text()
                time.sleep(0.2)
        assert names == ["default", "b", "base"]
        request: dict[str, Any] = {"model": "b", "messages": [{"role": "user", "content": "Why?"}]}
        done = client.chat.completions.create(**request, max_tokens=6)
        endless = client.chat.completions.create(**request, stream=True, temperature=9, extra_body={"top_k": 50})
        next(iter(endless))
    finally:
        with suppress(ProcessLookupError):  # it ended by itself
            os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert not process.is_alive()
    assert "Traceback" not in log.read_text()
    talker = load_chat_model({"b": str(trained_adapters("dataset.format=chat"))}, device="cpu")
    assert done.choices[0].message.content == talker.answer(asked("Why?"), Sampling(6))
    shown = (tmp_path / "out").read_text()
    assert "models: default, b, base." in shown
    assert '-H "Authorization: Bearer $KEY"\n' in shown


def test_merge_and_export_commands_are_logged_to_the_run(run_quick, mlflow_uri, tmp_path, capsys):
    result = run_quick("method=lora", "evaluation=loss_only")
    words = ["--uri", mlflow_uri, "--out"]
    assert exit_code("merge", result.run_id, *words, str(tmp_path / "merged"), "--dtype", "bfloat16") == 0
    assert exit_code("export", result.run_id, *words, str(tmp_path / "gguf"), "--to", "gguf") == 0
    shown = capsys.readouterr().out
    assert "bfloat16" in shown
    assert "the same first choice" in shown
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    tags = client(mlflow_uri).get_run(result.run_id).data.tags
    assert (tags["export.merged-bfloat16"], tags["export.gguf-q8_0"]) == ("merged", "gguf")
    told = client(mlflow_uri).list_artifacts(result.run_id, "exports")
    assert [one.path for one in told] == ["exports/gguf-q8_0.json", "exports/merged-bfloat16.json"]


@pytest.mark.long
@pytest.mark.usefixtures("_imported")
def test_deployment_gap_command_measures_each_format(mlflow_uri, tmp_path, capsys, monkeypatch):
    from qlora_exp.recipe.finetune import run

    words = [
        "method=qlora",
        f"tracking.uri={mlflow_uri}",
        "tracking.experiment_name=gap",
        "training.learning_rate=1e-2",
    ]
    result = run(compose([*QUICK, *words]), tmp_path / "run")
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "200")
    forms = "merged,merged_files,nf4,gguf_q8_0"
    assert exit_code("deployment-gap", result.run_id, "--uri", mlflow_uri, "--forms", forms, "--out", "gap") == 0
    shown = capsys.readouterr().out
    assert all(form in shown for form in ("trained", *forms.split(",")))
    told = json.loads((tmp_path / "gap" / "deployment_gap.json").read_text())
    by_form = {one["form"]: one for one in told["forms"]}
    assert by_form["trained"]["metrics"]["loss"] == pytest.approx(result.metrics["after/loss"], abs=1e-5)
    changes = {form: {gap["metric"]: gap["value"] for gap in one["gaps"]} for form, one in by_form.items()}
    assert changes["merged"]["loss"] == pytest.approx(0, abs=1e-4)
    assert changes["merged_files"]["loss"] != pytest.approx(0, abs=1e-4)
    assert by_form["merged"]["bytes"] > by_form["nf4"]["bytes"] > 0
    assert all(len(one["losses"]) == 4 and len(one["samples"]) == 2 for one in by_form.values())
    assert by_form["gguf_q8_0"]["metrics"]["token_seconds_p50"] > 0
    other = tmp_path / "gap" / "int8"
    other.mkdir()
    assert exit_code("deployment-gap", result.run_id, "--uri", mlflow_uri, "--forms", "int8", "--out", "gap") == 1
    assert "contains something else" in capsys.readouterr().err
    assert "deployment_gap.json" in [one.path for one in client(mlflow_uri).list_artifacts(result.run_id)]
