"""Whole runs of methods that each need something of their own; `test_probe` tries every method in small."""

import json

import pytest
import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
from torch.nn.functional import cross_entropy

from qlora_exp.config.hydra_compose import compose
from qlora_exp.data import tokenization
from qlora_exp.data.rows import load_rows
from qlora_exp.deploy.load import load
from qlora_exp.utils.errors import ConfigError

TOKENS = "method.token_indices=[41,42]"  # of the tiny models' tokenizer, and in every row


def words(name: str) -> list[str]:
    more = {"trainable_tokens": [TOKENS], "freeze": ["method.trainable_layers=1", "optimizer=muon"]}
    return [f"method={name}", *more.get(name, [])]


# One of each kind: what is put before the rows, into the layers, beside them, in place of weights; some layers.
WHOLE_RUNS = ["adaption_prompt", "cartridge", "freeze", "ia3", "osf", "p_tuning", "shadow"]
WHOLE_RUNS += ["trainable_tokens", "waveft"]
# Those that start from rows or from the base's weights.
VARIANTS = [f"lora_variant={name}" for name in ("corda", "eva", "loftq", "lora_ga", "pissa")]


IN_CI = ("cartridge", "osf", "shadow", "lora_variant=eva", "lora_variant=loftq")
"""One of each kind; the others run with `nox -s thorough`."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in IN_CI else pytest.mark.thorough) for name in (*WHOLE_RUNS, *VARIANTS)],
)
def test_saved_model_has_the_loss_that_was_measured(name: str, run_quick):
    given = ["method=lora", name] if name in VARIANTS else words(name)
    given += ["lora_variant.init_rows=4"] if name.endswith(("corda", "eva", "lora_ga")) else []
    given += ["quantization=nf4"] if "loftq" in name else []
    given += ["method.r=2"] if "eva" in name else []  # which has more directions to find
    result = run_quick(*given, "evaluation=loss_only", "evaluation.before=true")
    assert result.metrics["after/loss"] != result.metrics["before/loss"]
    assert 0 < result.metrics["trainable_share"] < 1
    line = (result.output_dir / "evaluation" / "after_losses.jsonl").read_text().splitlines()[0]
    model, tokenizer = load(str(result.output_dir))
    config = compose(["dataset.max_eval_rows=4", "dataset.max_train_rows=16"])
    heldout = load_rows(config.dataset).heldout
    _, tokens = tokenization.cut(heldout, tokenization.tokenize(heldout, config, tokenizer), config.training.max_length)
    ids, labels = (torch.tensor(tokens[0][key]) for key in ("input_ids", "labels"))
    loss = cross_entropy(logits(model, ids[None])[:-1], labels[1:], ignore_index=tokenization.IGNORED, reduction="sum")
    assert loss.item() == pytest.approx(json.loads(line)["nll"], rel=1e-4)


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Of one row, without what a method puts before it."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]


def test_adalora_redistributes_ranks_within_its_budget(run_quick):
    result = run_quick(
        "method=adalora", "method.init_r=6", "method.target_r=3", "evaluation=loss_only", "training.max_steps=6"
    )
    settings = json.loads((result.output_dir / "model" / "adapter_config.json").read_text())
    ranks = [sum(kept) for kept in settings["rank_pattern"].values()]
    assert settings["total_step"] == 6
    assert sum(ranks) == 3 * len(ranks)  # the budget
    assert len(set(ranks)) > 1


@pytest.mark.parametrize("name", ["adalora", "adamss"])
def test_rank_allocation_is_updated_at_every_step(name: str, run_quick, monkeypatch):
    told = []
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(name.upper())]
    monkeypatch.setattr(tuner, "update_and_allocate", lambda self, step: told.append(step))
    run_quick(f"method={name}", "evaluation=loss_only", "training.max_steps=3")
    assert told == [0, 1, 2]


def test_adalora_schedule_without_a_step_between_is_rejected(run_quick):
    with pytest.raises(ConfigError, match=r"method.tinit=2 and method.tfinal=1 steps .* none of 3"):
        run_quick("method=adalora", "method.tinit=2", "training.max_steps=3")
