"""Runs that train on from the adapter of another run."""

import json
import shutil

import pytest
import torch
from peft import PeftModel

from qlora_exp.config.hydra_compose import compose
from qlora_exp.deploy import merge, model_card
from qlora_exp.deploy.export import export
from qlora_exp.deploy.load import find
from qlora_exp.models import base
from qlora_exp.results.reproduce import find_run, judge, recorded_config, start
from qlora_exp.training import evaluation
from qlora_exp.utils.errors import ConfigError

LORA = ("method=lora", "training.learning_rate=1e-2", "evaluation.generate_rows=0")
SAVING = ("training.save_strategy=steps", "training.save_steps=1")


@pytest.mark.slow
def test_adapter_is_trained_on_merged_and_reproduced(run_quick, shared_run, mlflow_uri, tmp_path):
    first = shared_run(*LORA)
    words = [*LORA, "evaluation.before=true", "seed=3", "dataset.format=prompt_completion"]
    same = run_quick(*LORA, f"model.adapter={first.run_id}", "evaluation.before=true", "training.max_steps=1")
    assert same.metrics["before/loss"] == first.metrics["after/loss"]  # the same held-out rows, and exactly the model
    second = run_quick(*words, f"model.adapter={first.run_id}")
    record = find_run(mlflow_uri, second.run_id)
    assert record.params["resolved.adapter_run"] == first.run_id
    assert len(record.params["resolved.adapter_sha256"]) == 64
    assert "prompt format: it was trained with" in record.params["resolved.adapter_differs"]
    assert record.tags["identity.adapter"]

    saved = find(second.run_id, mlflow_uri, "cpu")
    assert saved.config.model.model_name_or_path == "random:llama"
    assert f"run {first.run_id}, SHA-256" in model_card.write(record, saved.config, "here")
    whole = merge.whole(saved)
    plain = PeftModel.from_pretrained(base.load_unquantized(saved.config.model), saved.folder)
    expected = merge.logits(plain.merge_and_unload(), whole.ids)
    assert torch.allclose(merge.logits(whole.model, whole.ids), expected, atol=1e-5)
    before = merge.logits(
        PeftModel.from_pretrained(base.load_unquantized(saved.config.model), first.output_dir / "model"), whole.ids
    )
    assert not torch.allclose(before, expected, atol=1e-3)

    config = recorded_config(record, {}, mlflow_uri)
    again = find_run(mlflow_uri, start(record, config, tmp_path / "again"))
    assert judge(record, again, config).grade == "bit-identical"

    export(saved, tmp_path / "merged")
    on_merged = run_quick(*LORA, "model=hub", f"model.model_name_or_path={tmp_path / 'merged'}", "training.max_steps=1")
    origin = find_run(mlflow_uri, on_merged.run_id).params["resolved.base_origin"]
    assert origin == f"merged from run {second.run_id} on random:llama"


@pytest.mark.slow
def test_interrupted_run_goes_on_from_its_checkpoint_and_the_same_adapter(
    run_quick, trained_adapters, read_losses, tmp_path, monkeypatch
):
    adapter = shutil.copytree(trained_adapters(), tmp_path / "adapter")
    words = [*LORA, *SAVING, "evaluation.before=false", f"model.adapter={adapter}"]
    whole = run_quick(*words)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evaluation, "evaluate", interrupt)
        run_quick(*words, folder="cut")
    (tmp_path / "cut" / "checkpoints" / "checkpoint-3" / "trainer_state.json").unlink()  # the last is not complete
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match="began with another adapter than model.adapter=.* is now; put that one back"):
        run_quick(*words, folder="cut")
    file.write_bytes(content)
    again = run_quick(*words, folder="cut")
    assert read_losses(again) == read_losses(whole)
    assert again.metrics["after/loss"] == whole.metrics["after/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["pissa", pytest.param("eva", marks=pytest.mark.thorough)])
def test_initialized_adapters_are_exactly_what_is_trained_on(variant, run_quick, shared_run):
    words = [*LORA, f"lora_variant={variant}", "evaluation.before=true"]
    first = shared_run(*words)
    ours = compose([*LORA, "model=tiny_llama"]).peft_settings
    more = [f"lora_variant={variant}"]
    if variant == "pissa":
        more = [f"method.r={2 * ours['r']}", f"method.lora_alpha={2 * ours['lora_alpha']}"]
    on = run_quick(*LORA, *more, f"model.adapter={first.output_dir}", "evaluation.before=true", "training.max_steps=1")
    assert on.metrics["before/loss"] == pytest.approx(
        first.metrics["after/loss"], abs=1e-6 if variant == "pissa" else 0
    )
    settings = [json.loads((run.output_dir / "model" / "adapter_config.json").read_text()) for run in (first, on)]
    assert settings[0]["r"] == settings[1]["r"]
    assert settings[0]["rank_pattern"] == settings[1]["rank_pattern"]
