"""Runs on tiny models of families that differ from Llama in what they need."""

import json
import random
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_exp.deploy.chat import Sampling, asked, load_chat_model
from qlora_exp.deploy.load import find, load
from qlora_exp.deploy.merge import logits, whole
from qlora_exp.deploy.serving import commands
from qlora_exp.models.layers.experts import packed_experts
from qlora_exp.utils.errors import ConfigError

WORDS = ["tap", "pipe", "roof", "wall", "door", "lamp"]


@pytest.fixture
def rows(write_jsonl):
    """Write rows of unequal length; give the overrides that read them."""
    draw = random.Random(0)
    prompts, answers = ([" ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(20)] for _ in range(2))
    file = write_jsonl([{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)])
    return ("dataset=own", f"dataset.path={file}", "dataset.eval_size=9", "evaluation.before=false")


def held_out_loss(result) -> float:
    lines = [json.loads(line) for line in (result.output_dir / "journal.jsonl").read_text("utf-8").splitlines()]
    return [line["values"]["eval/loss"] for line in lines if "eval/loss" in line.get("values", {})][-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields", "method"),
    [
        ("llama", {}, "lora"),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "full"),
        (
            "qwen3_moe",
            {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
            "lora",
        ),
    ],
)
def test_held_out_loss_in_training_is_that_after_it(kind, fields, method, rows, tiny_model, run_quick):
    model = tiny_model(kind, **fields)
    for batch in (1, 4):
        done = run_quick(
            *rows,
            "model=hub",
            f"model.model_name_or_path={model}",
            f"method={method}",
            *([] if method == "full" else ["method.target_modules=attention"]),
            f"training.per_device_eval_batch_size={batch}",
            "training.eval_strategy=steps",
            "training.eval_steps=3",
            f"evaluation.generate_rows={2 if batch == 1 else 0}",  # two prompts of unequal length: a padded batch
        )
        assert held_out_loss(done) == pytest.approx(done.metrics["after/loss"], abs=1e-6)
    if method == "full":
        saved, tokenizer = (
            each.from_pretrained(done.output_dir / "model") for each in (AutoModelForCausalLM, AutoTokenizer)
        )
        assert saved.config.output_router_logits is False
        saved.generate(**tokenizer(["tap", "a longer prompt"], padding=True, return_tensors="pt"), max_new_tokens=2)


@pytest.mark.slow
def test_logged_losses_are_without_the_routers(rows, run_quick, read_losses):
    """A rate that changes nothing: the losses of the steps are those of the language model, whatever the router's."""
    words = (*rows, "model.model_name_or_path=random:qwen3_moe", "method=full", "training.learning_rate=1e-12")
    words = (*words, "training.gradient_accumulation_steps=2", "evaluation.generate_rows=0", "training.logging_steps=1")
    without, weighted = (
        run_quick(*words, f"+model.random_config.router_aux_loss_coef={share}", folder=f"router{share}")
        for share in (0.0, 0.5)
    )
    assert read_losses(weighted) == pytest.approx(read_losses(without), abs=1e-4)
    assert weighted.metrics["train_loss"] == pytest.approx(without.metrics["train_loss"], abs=1e-4)
    lines = (weighted.output_dir / "journal.jsonl").read_text("utf-8")
    assert '"train/aux_loss": 2.' in lines
    assert "train/aux_loss" not in (without.output_dir / "journal.jsonl").read_text("utf-8")


@pytest.mark.slow
def test_the_end_of_the_templates_turns_ends_answers(write_jsonl, tiny_model, run_quick):
    tokenizer = tiny_models.tokenizer(eos_token="<|endoftext|>")
    model = tiny_model("llama", tokenizer)
    turns = ("user", "Greet {}"), ("assistant", "Hi {}!")
    rows = [[{"role": role, "content": text.format(word)} for role, text in turns] for word in WORDS]
    file = write_jsonl([{"messages": messages} for messages in rows])
    stops = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    chat = ("dataset=own", f"dataset.path={file}", "dataset.format=chat", "dataset.messages_column=messages")
    for method in ("full", "lora"):
        done = run_quick(
            *chat, "dataset.eval_size=2", "model=hub", f"model.model_name_or_path={model}", f"method={method}"
        )
        assert load(str(done.output_dir))[0].generation_config.eos_token_id == stops
        if method == "full":  # for programs that read the folder
            saved = json.loads((done.output_dir / "model" / "generation_config.json").read_text("utf-8"))
            assert saved["eos_token_id"] == stops


@pytest.mark.slow
def test_text_that_ends_the_templates_turns_ends_answers(write_jsonl, tiny_model, run_quick, tmp_path):
    template = tiny_models.CHATML.replace("<|im_end|>\n", "### End\n")
    model = tiny_model("llama", tiny_models.tokenizer(template=template, eos_token="<|endoftext|>"))
    file = write_jsonl([{"prompt": f"Greet {word}", "completion": "Hi!"} for word in WORDS])
    done = run_quick(
        *("dataset=own", f"dataset.path={file}", "dataset.format=chat", "dataset.eval_size=2", "method=full"),
        *("model=hub", f"model.model_name_or_path={model}", "training.max_steps=40", "training.learning_rate=1e-2"),
        *("evaluation.before=false", "evaluation.max_new_tokens=16"),
    )
    assert done.metrics["labels/eos_learned_share"] == 1
    assert done.metrics["after/exact_match"] == 1
    saved = done.output_dir / "model"
    assert json.loads((saved / "generation_config.json").read_text("utf-8"))["stop_strings"] == ["### End"]
    talker, pieces = load_chat_model({"default": str(saved)}, device="cpu"), []
    assert talker.answer(asked("Greet tap"), Sampling(16), pieces.append) == "Hi!"
    assert "".join(pieces) == "Hi!"
    assert talker.model.generation_config.stop_strings is None  # another adapter may have another end
    shown = commands.commands(find(str(saved), device="cpu"), tmp_path, "127.0.0.1", 1)
    assert '"stop": ["### End"]' in "\n".join(shown)


@pytest.mark.slow
def test_experts_in_4_bits_are_trained_loaded_and_merged(rows, tiny_model, run_quick, tmp_path, caplog):
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    mixtral = (*rows, "model=hub", f"model.model_name_or_path={model}", "method=qlora")
    with pytest.raises(
        ConfigError, match=r"experts of this model.* LoRA on them has no dropout: set method.lora_dropout=0"
    ):
        run_quick(*mixtral, "method.lora_dropout=0.1")
    assert not (tmp_path / "run0").exists()
    done = run_quick(*mixtral, "method.lora_dropout=0", "training.max_steps=4")
    attention, experts, router = 2 * 64 * (64 + 32 + 32 + 64), 2 * 4 * 3 * 64 * 128, 2 * 4 * 64
    quantized = attention + experts
    assert done.metrics["quantized_share"] == pytest.approx(quantized / (quantized + router))
    assert "stay in" not in caplog.text
    assert "model.layers.*.mlp.experts.gate_up_proj (2)" in caplog.text
    loaded, tokenizer = load(str(done.output_dir / "model"), device="cpu")
    assert quantized_experts(loaded) == 4
    ids = tokenizer("tap pipe", return_tensors="pt").input_ids
    merged = whole(find(str(done.output_dir / "model"), device="cpu"), base="trained").model
    assert quantized_experts(merged) == 0
    assert torch.allclose(logits(merged, ids), logits(loaded, ids), atol=1e-4)
    plain, _ = load(str(done.output_dir / "model"), device="cpu", quantization="none")
    assert quantized_experts(plain) == 0
    assert not torch.allclose(logits(plain, ids), logits(loaded, ids), atol=1e-4)
    recorded = done.output_dir / "model" / "qlora_exp.yaml"
    assert "  bnb_4bit_experts: true\n" in recorded.read_text("utf-8")
    recorded.write_text(recorded.read_text("utf-8").replace("  bnb_4bit_experts: true\n", ""), "utf-8")
    Path(Path(model).name).symlink_to(model)  # where an adapter looks for its base once its run is not known
    for chosen, count in ((None, 0), ("nf4_double", 0), ("nf4", 4)):  # a run of an older version
        older, _ = load(str(done.output_dir / "model"), device="cpu", quantization=chosen)
        assert quantized_experts(older) == count, chosen


def quantized_experts(model) -> int:
    return sum(1 for _ in packed_experts(model))


@pytest.mark.slow
def test_positions_of_a_table_limit_rows_and_answers(write_jsonl, tiny_model, run_quick, caplog):
    model = tiny_model("gpt2", max_position_embeddings=64)
    file = write_jsonl([{"prompt": f"q{i}" + "x" * 57, "completion": "a"} for i in range(6)])
    long = (
        "dataset=own",
        f"dataset.path={file}",
        "dataset.eval_size=2",
        "model=hub",
        f"model.model_name_or_path={model}",
    )
    done = run_quick(*long, "training.max_length=64", "evaluation.max_new_tokens=9")
    assert done.metrics["after/loss"] > 0
    assert "answers are cut where the model's 64 positions end" in caplog.text
    with pytest.raises(ConfigError, match=r"longest row has 6\d tokens and the prefix 8, but .* has 64 positions"):
        run_quick(*long, "training.max_length=64", "method=prompt_tuning", "method.num_virtual_tokens=8")
