"""Every named experiment composes, and runs end to end on a tiny model of its own family and rows of its own shape."""

import pytest

from qlora_exp.config.hydra_compose import compose, grid, options

FAMILY = {"opt125m": "opt", "smollm2": "llama", "llama3": "llama", "llama31": "llama", "qwen25": "qwen2"}
COLUMNS = {
    "databricks/databricks-dolly-15k": ("instruction", "context", "response"),
    "tatsu-lab/alpaca": ("instruction", "input", "output"),
    "yahma/alpaca-cleaned": ("instruction", "input", "output"),
}


IN_CI = ("smollm2_faq_full", "qwen25_1_5b_alpaca_qlora", "llama31_70b_chat_qlora", "opt125m_dolly_lora")
"""One of each dataset; the others are composed in other tests, and run with `nox -s thorough`."""
OTHERS = [pytest.param(name, marks=pytest.mark.thorough) for name in options("experiment") if name not in IN_CI]


@pytest.mark.parametrize("name", [*IN_CI, *OTHERS])
def test_shipped_experiment_runs_on_a_tiny_model(name: str, run_quick, write_jsonl, read_losses):
    config = compose([f"experiment={name}"])
    overrides = [
        f"experiment={name}", f"model=tiny_{FAMILY[name.split('_')[0]]}",
        "model.attn_implementation=sdpa", "model.device_map=null",
        f"training.eval_strategy={config.training.eval_strategy}", "training.max_steps=2",
        "training.logging_steps=1",
        *(["training.eval_steps=1"] if config.training.eval_strategy == "steps" else []),
        *(["training.save_steps=1"] if config.training.save_strategy == "steps" else []),
        "training.max_length=600", "training.gradient_accumulation_steps=2",
    ]  # fmt: skip
    if config.dataset.path in COLUMNS:
        prompt, context, completion = COLUMNS[config.dataset.path]
        rows = [{prompt: f"Say {i}.", context: "loud" if i % 2 else "", completion: f"It is {i}."} for i in range(100)]
        overrides.append(f"dataset.path={write_jsonl(rows)}")
    result = run_quick(*overrides)
    assert len(read_losses(result)) == 2
    assert result.metrics["steps"] == 2
    assert result.metrics["after/perplexity"] > 1


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("opt125m_dolly_full", "training.learning_rate", 2e-5),
        ("opt125m_dolly_full", "model.dtype", "float32"),
        ("opt125m_dolly_lora", "method.target_modules", "q_v"),
        ("opt125m_dolly_lora", "method.lora_alpha", 32),
        ("opt125m_dolly_qlora", "method.r", 64),
        ("opt125m_dolly_qlora", "method.lora_alpha", 16),
        ("opt125m_dolly_qlora", "method.target_modules", "attention"),
        ("opt125m_dolly_qlora", "training.max_steps", 100),
        ("qwen25_1_5b_alpaca_qlora", "optimizer.optim", "paged_adamw_8bit"),
        ("qwen25_1_5b_alpaca_qlora", "training.packing", True),
        ("qwen25_1_5b_alpaca_qlora", "dataset.eval_size", 0.02),
        ("llama31_70b_chat_qlora", "training.max_length", 2048),
        ("llama31_70b_chat_qlora", "training.max_grad_norm", 0.3),
        ("llama3_8b_alpaca_lora", "method.r", 16),
        ("llama3_8b_alpaca_lora", "training.lr_scheduler_type", "constant"),
        ("llama3_8b_alpaca_qlora", "method.lora_alpha", 128),
        ("llama3_8b_qlora", "training.num_train_epochs", 3),
        ("llama3_8b_qlora", "training.save_total_limit", None),
    ],
)
def test_shipped_experiment_has_the_settings_of_its_source(name: str, key: str, value: object):
    from qlora_exp.config.values import flatten

    assert flatten(compose([f"experiment={name}"]))[key] == value


@pytest.mark.parametrize("sweep", ["cost_comparison", "llama3_8b_alpaca", "opt125m_dolly"])
def test_sweep_of_experiments_has_all_of_its_family(sweep: str):
    """Each row of a published comparison is an experiment; the sweep runs them all."""
    rows = {words[0].removeprefix("experiment=") for words in grid([f"sweep={sweep}"])}
    family = "smollm2_faq" if sweep == "cost_comparison" else sweep
    assert rows == {name for name in options("experiment") if name.rpartition("_")[0] == family}
    for name in rows:
        assert compose([f"experiment={name}"]).sweep.name is None
