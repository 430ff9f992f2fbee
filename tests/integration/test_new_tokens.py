"""Runs with new tokens: trained, saved alone, loaded, merged, exported, trained on from."""

import pytest
import torch
from safetensors.torch import load_file

from qlora_exp.deploy import llama_cpp
from qlora_exp.deploy.export import export
from qlora_exp.deploy.load import find, load
from qlora_exp.models.builtin import folder_of
from qlora_exp.utils.errors import ConfigError

pytestmark = pytest.mark.slow

TOKENS = 'model.new_tokens=["/tool","</tool>"]'
TEXT = "call 3 /tool 3</tool> done"


@pytest.fixture
def words(write_jsonl):
    """The overrides of a run on rows with the tokens."""
    file = write_jsonl([{"prompt": f"call {i}", "completion": f"/tool {i}</tool> done"} for i in range(20)])
    data = ["dataset=own", f"dataset.path={file}", "dataset.eval_size=4", "training.learning_rate=1e-2"]
    return [*data, "training.max_steps=4", "training.per_device_train_batch_size=4", TOKENS]


def logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def test_new_tokens_are_trained_saved_loaded_and_merged(words, run_quick, tmp_path, caplog):
    saving = ["training.save_strategy=steps", "training.save_steps=2"]
    done = run_quick(*words, "method=qlora", "+model.random_config.tie_word_embeddings=true", *saving)
    assert done.metrics["after/loss"] < done.metrics["before/loss"]
    assert "occur" not in caplog.text
    saved = load_file(done.output_dir / "model" / "adapter_model.safetensors")
    assert [tuple(value.shape) for name, value in saved.items() if "lora" not in name] == [(2, 64)]  # not all rows
    model, tokenizer = load(str(done.output_dir), device="cpu")
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[7:9] == ["/tool", "\u0120"]
    assert max(ids) == 260
    first = load_file(folder_of("random:llama", {"tie_word_embeddings": True}) / "model.safetensors")
    parts = [tokenizer.convert_tokens_to_ids(letter) for letter in "/tool"]
    (rows,) = [value for name, value in saved.items() if "lora" not in name]
    mean = first["model.embed_tokens.weight"][parts].mean(dim=0)
    assert 0 < (rows[0] - mean).abs().max() < 0.1
    made = export(find(str(done.output_dir), device="cpu"), tmp_path / "merged", base="trained")
    assert made.max_logit_difference < 1e-4
    merged, again = load(str(tmp_path / "merged"), device="cpu")
    assert again(TEXT)["input_ids"] == ids
    assert torch.allclose(logits(merged, ids), logits(model, ids), atol=1e-3)
    with pytest.raises(ConfigError, match=r'use .model.new_tokens=\["/tool", "</tool>"\]'):
        run_quick(*words[:-1], f"model.adapter={done.output_dir}", "method=qlora",
                  "+model.random_config.tie_word_embeddings=true")  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", ["method=lora"]),
        ("llama", ["method=lora", "quantization=int8"]),
        ("llama", ["method=full"]),
        ("gemma2", ["method=qlora"]),
        ("gpt2", ["method=lora"]),
        ("qwen3", ["method=lora", "lora_variant=dora"]),
        ("llama", ["method=qlora", "lora_variant=loftq"]),
        ("llama", ["method=lora", "optimizer=lorafa"]),
        ("llama", ["method=lora", "optimizer=loraplus"]),
        ("llama", ["method=lora", "optimizer=riemannian"]),
        ("llama", ["method=lora", "training.gradient_checkpointing=true", "training.packing=true"]),
        ("mixtral", ["method=lora", "method.lora_dropout=0"]),
        ("llama", ["method=lora", "method.modules_to_save=[embed_tokens,lm_head]"]),
    ],
)
def test_new_tokens_in_llama_cpp_and_merged_models(family, more, words, run_quick, tmp_path):
    done = run_quick(*words, f"model.model_name_or_path=random:{family}", *more)
    assert done.metrics["after/loss"] < done.metrics["before/loss"]
    saved = find(str(done.output_dir), device="cpu")
    form, (_, tokenizer) = "gguf" if family != "mixtral" else "merged", load(str(done.output_dir), device="cpu")
    made = export(saved, tmp_path / "out", form=form, type_="f32", base="trained" if "loftq" in str(more) else "auto")
    assert made.max_logit_difference < 1e-4
    if form == "gguf":
        model, _ = load(str(tmp_path / "out"), device="cpu")
        ids = tokenizer(TEXT)["input_ids"]
        expected = logits(model, ids).log_softmax(-1)
        found = llama_cpp.log_probabilities(
            llama_cpp.load(tmp_path / "out" / "model.gguf", 64, 1, exact=True), ids, 261
        )
        assert 260 in found
        assert torch.tensor([*found.values()]) == pytest.approx(expected[-1, [*found]], abs=5e-3)
    if saved.adapter:
        onward = [*words, f"model.model_name_or_path=random:{family}", *more, f"model.adapter={done.output_dir}"]
        later = run_quick(*onward)
        assert later.metrics["before/loss"] == pytest.approx(done.metrics["after/loss"], abs=1e-4)
