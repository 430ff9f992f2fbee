"""The main job for real: the embedded model, the embedded data, fewer steps."""

import json

import pytest


@pytest.mark.embedded
@pytest.mark.long
def test_builtin_model_learns(mlflow_uri, tmp_path, read_losses):
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.recipe.finetune import run

    training = [
        "training.max_steps=2",
        "training.per_device_train_batch_size=1",
        "training.eval_strategy=no",
        "training.learning_rate=1e-3",
    ]
    measuring = ["dataset.max_eval_rows=3", "evaluation.generate_rows=1", "evaluation.max_new_tokens=3"]
    measuring += ["unrelated.max_eval_rows=1", "tracking.plan=false"]
    config = compose([f"tracking.uri={mlflow_uri}", "device=cpu", *training, *measuring])
    result = run(config, tmp_path / "run")
    assert len(read_losses(result)) == 2
    assert result.metrics["after/loss"] < result.metrics["before/loss"] < 5.0
    assert result.metrics["total_parameters"] - result.metrics["trainable_parameters"] == 134_515_008
    audit = json.loads((result.output_dir / "label_audit.json").read_text())
    assert audit["eos_learned_share"] == 1.0
    assert audit["sample"].endswith("<|im_end|>]]")


@pytest.mark.embedded
def test_builtin_model_is_the_published_one():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora_exp.models.builtin import SMOLLM2, folder_of

    folder = folder_of(SMOLLM2)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer("2024")["input_ids"]) == 4  # each digit is a token
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0][ids["input_ids"].shape[1] :])
