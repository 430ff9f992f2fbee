"""Every method with a file in conf/method: it learns, all of it is saved, and a quantized base is as its file says."""

import json

import bitsandbytes as bnb
import pytest
import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftModel, PeftType
from torch.nn.functional import cosine_similarity, cross_entropy

from qlora_exp import data
from qlora_exp.adapters import allocates, attach, fit_schedule, peft_config
from qlora_exp.config import compose, options
from qlora_exp.device import Device, resolve
from qlora_exp.errors import ConfigError
from qlora_exp.loading import load
from qlora_exp.model import load_model

CPU = Device("cpu", "CPU", bf16=False, paging=False)
METHODS = sorted({*options("method")} - {"full", "lora", "qlora"})
TOKENS = "method.token_indices=[41,42]"  # of the tiny models' tokenizer, and in every row
ON_QUANTIZED = [name for name in METHODS if compose([f"method={name}"]).method.quantized_base is not False]
NOT_ON_QUANTIZED = sorted({*METHODS} - {*ON_QUANTIZED})
IDS = torch.arange(40, 72)[None]


def words(name: str) -> list[str]:
    return [f"method={name}", *([TOKENS] if name == "trainable_tokens" else [])]


# One of each kind: what is put before the rows, into the layers, beside them, in place of weights.
WHOLE_RUNS = ["adaption_prompt", "cartridge", "ia3", "osf", "p_tuning", "shadow", "trainable_tokens", "waveft"]
VARIANTS = [f"lora_variant={name}" for name in options("lora_variant")]


@pytest.mark.parametrize("name", [*WHOLE_RUNS, *VARIANTS])
def test_what_a_run_saves_is_what_it_measured(name: str, run):
    given = ["method=lora", name, "lora_variant.init_rows=4"] if name in VARIANTS else words(name)
    given += ["quantization=nf4"] if "loftq" in name else []
    result = run(*given, "evaluation=loss_only", "evaluation.before=true")
    assert result.metrics["after/loss"] != result.metrics["before/loss"]
    assert 0 < result.metrics["trainable_share"] < 1
    line = (result.output_dir / "evaluation" / "after_losses.jsonl").read_text().splitlines()[0]
    model, tokenizer = load(str(result.output_dir))
    config = compose(["dataset.max_eval_rows=4", "dataset.max_train_rows=16"])
    heldout = data.load_rows(config.dataset).heldout
    _, tokens = data.cut(heldout, data.tokenize(heldout, config, tokenizer), config.training.max_length)
    ids, labels = (torch.tensor(tokens[0][key]) for key in ("input_ids", "labels"))
    loss = cross_entropy(logits(model, ids[None])[:-1], labels[1:], ignore_index=data.IGNORED, reduction="sum")
    assert loss.item() == pytest.approx(json.loads(line)["nll"], rel=1e-4)


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Of one row, without what a method puts before it."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]


@pytest.mark.parametrize("name", METHODS)
def test_only_what_a_method_adds_learns_and_all_of_it_is_saved(name: str, tmp_path):
    config, model = base(name, "none")
    adapted = attach(model, peft_config(config, model), "float32")
    if allocates(adapted):
        fit_schedule(adapted, 3)
    before = {key: parameter.detach().clone() for key, parameter in adapted.named_parameters()}
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=0.01)
    for step in range(3):
        gradients(adapted)
        optimizer.step()
        if allocates(adapted):
            adapted.base_model.update_and_allocate(step)
    changed = {key for key, parameter in adapted.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed
    assert changed <= {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(name, "none")[1], tmp_path)
    torch.testing.assert_close(logits(again, IDS), logits(adapted, IDS), rtol=1e-4, atol=1e-5)


def base(name: str, quantization: str):
    config = compose(["model=tiny_llama", *words(name), "method.quantized_base=null", f"quantization={quantization}"])
    resolved = resolve(config, CPU)
    return config, load_model(config.model, config.quantization, resolved)


def dequantized(layer) -> torch.Tensor:
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.weight.data.float() * layer.weight.SCB.float()[:, None] / 127


def gradients(model) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(1)
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def agreement(name: str, quantization: str) -> float:
    """The lowest cosine of an adapter weight's gradient with that on the base's values, away from its start."""
    config, quantized = base(name, quantization)
    _, plain = base(name, "none")
    for (_, layer), (_, full) in zip(quantized.named_modules(), plain.named_modules(), strict=True):
        if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            full.weight.data = dequantized(layer)
    settings = peft_config(config, plain)
    adapted = []
    for model in (quantized, plain):
        torch.manual_seed(0)
        adapted.append(attach(model, settings, "float32"))
    same = dict(adapted[1].named_parameters())
    torch.manual_seed(2)
    for key, parameter in adapted[0].named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
            same[key].data.copy_(parameter.data)
    found, expected = map(gradients, adapted)
    assert found.keys() == expected.keys()
    pairs = [(found[key].flatten(), one.flatten()) for key, one in expected.items() if one.norm() > 1e-9]
    assert pairs
    return min(cosine_similarity(*pair, dim=0).item() for pair in pairs)


@pytest.mark.parametrize("quantization", ["nf4_double", "int8"])
@pytest.mark.parametrize("name", ON_QUANTIZED)
def test_on_a_quantized_base_the_gradients_are_those_of_its_values(name: str, quantization: str):
    assert agreement(name, quantization) > 0.999


@pytest.mark.parametrize("name", NOT_ON_QUANTIZED)
def test_a_method_that_a_quantized_base_breaks_is_refused(name: str):
    with pytest.raises(ConfigError, match=f"method={name} cannot train a base stored as nf4"):
        compose([f"method={name}", "quantization=nf4"])
    broken = []
    for quantization in ("nf4_double", "int8"):
        try:
            broken.append(agreement(name, quantization) < 0.999)
        except (RuntimeError, ConfigError):  # as it would end in the middle of a run
            broken.append(True)
    assert any(broken), f"conf/method/{name}.yaml: quantized_base: false is not needed any more"


def test_adalora_really_moves_ranks_to_where_they_count(run):
    result = run(
        "method=adalora", "method.init_r=6", "method.target_r=3", "evaluation=loss_only", "training.max_steps=6"
    )
    settings = json.loads((result.output_dir / "model" / "adapter_config.json").read_text())
    ranks = [sum(kept) for kept in settings["rank_pattern"].values()]
    assert settings["total_step"] == 6
    assert sum(ranks) == 3 * len(ranks)  # the budget
    assert len(set(ranks)) > 1


@pytest.mark.parametrize("name", ["adalora", "adamss"])
def test_a_method_that_moves_its_budget_is_told_of_every_step(name: str, run, monkeypatch):
    told = []
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(name.upper())]
    monkeypatch.setattr(tuner, "update_and_allocate", lambda self, step: told.append(step))
    run(f"method={name}", "evaluation=loss_only", "training.max_steps=3")
    assert told == [0, 1, 2]


def test_an_adalora_schedule_that_leaves_no_step_is_refused(run):
    with pytest.raises(ConfigError, match=r"method.tinit=2 and method.tfinal=1 steps .* none of 3"):
        run("method=adalora", "method.tinit=2", "training.max_steps=3")
