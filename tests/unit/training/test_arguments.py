"""Arguments in `training.sft_config` reach TRL's trainer, and it acts on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.planning import CPU, GPU

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.config.tables import sft_arguments
from qlora_exp.config.validate import from_dict
from qlora_exp.environment.device import resolve
from qlora_exp.environment.memory import MemoryMonitor
from qlora_exp.libraries.torch import fp32_precision_kept
from qlora_exp.models import adapters, base, checks
from qlora_exp.training import trainer as training
from qlora_exp.training.arguments import arguments
from qlora_exp.utils.errors import ConfigError

Build = Callable[..., training.Trainer]

SHOWN = {
    "data_seed",
    "dataloader_multiprocessing_context",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "eval_delay",
    "gradient_checkpointing_kwargs",
    "label_smoothing_factor",
    "pad_to_multiple_of",
    "router_aux_loss_coef",
    "torch_compile_backend",
    "torch_compile_mode",
}
"""Arguments whose effect is shown below."""


def test_each_accepted_argument_is_shown_to_act_or_needs_a_gpu():
    shown = SHOWN | {*sft_arguments.GPU_ONLY}
    assert not (missing := sorted(sft_arguments.ACCEPTED.keys() - shown)), (
        "accepted by ACCEPTED of qlora_exp/config/tables/sft_arguments.py; show in a test of this file that each acts, "
        f"and add it to SHOWN, or to GPU_ONLY there: {', '.join(missing)}"
    )
    gone = sorted(shown - sft_arguments.ACCEPTED.keys())
    assert not gone, f"not in ACCEPTED any more, so remove from SHOWN or GPU_ONLY: {', '.join(gone)}"


def config_with(*words: str, **given: Any) -> Config:
    values = compose(["device=cpu", "method=lora", "model=tiny_llama", "tracking.plan=false", *words]).model_dump()
    values["training"]["sft_config"] = given
    return from_dict(values)


@pytest.fixture
def build(tiny_tokenizer, tmp_path) -> Build:
    rows = [[9 + place + row for place in range(row % 5 + 3)] for row in range(12)]
    tokens = Dataset.from_dict({"input_ids": rows, "labels": rows})

    def made(*words: str, **given: Any) -> training.Trainer:
        config = config_with("training.per_device_train_batch_size=3", *words, **given)
        torch.manual_seed(0)
        model = base.load_unquantized(config.model)
        adapted = adapters.attach(model, adapters.peft_config(config, model), None)
        resolved = resolve(config, CPU)
        return training.build(
            adapted, tiny_tokenizer, tokens, tokens, config, resolved, tmp_path / "out", MemoryMonitor("cpu")
        )

    return made


def loss_of(trainer: training.Trainer) -> float:
    """Return the loss of the first rows in training, without dropout."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    trainer.model.eval()
    trainer.model.training = True
    trainer.current_gradient_accumulation_steps = 1
    return float(trainer.compute_loss(trainer.model, batch))


def test_a_run_follows_its_arguments(build: Build):
    trainer = build(
        "training.max_steps=4", "training.eval_strategy=steps", "training.eval_steps=1", "optimizer.optim=sgd",
        "optimizer.optim_args.momentum=0.5", "optimizer.optim_args.nesterov=true",
        "training.gradient_checkpointing=true",
        eval_delay=3, gradient_checkpointing_kwargs={"every_n_layers": 2},
        pad_to_multiple_of=16,
    )  # fmt: skip
    widths, curves = set(), []
    hook = trainer.model.register_forward_pre_hook(lambda _, __, given: widths.add(given["input_ids"].shape[1]),
                                                   with_kwargs=True)  # fmt: skip
    training.train(trainer, lambda values, step: curves.append((step, values)))
    hook.remove()
    assert [step for step, values in curves if "eval/loss" in values] == [3, 4]
    layers = trainer.model.get_base_model().model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [number % 2 == 0 for number in range(len(layers))]
    assert {(group["momentum"], group["nesterov"]) for group in trainer.optimizer.param_groups} == {(0.5, True)}
    assert widths == {16}


def test_smoothed_labels_have_the_loss_of_all_tokens_besides(build: Build):
    plain, smoothed = (loss_of(build(label_smoothing_factor=factor)) for factor in (0.0, 0.2))
    trainer = build()
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    scored = batch["labels"][:, 1:] != -100
    uniform = -logits.log_softmax(-1).mean(-1)[scored].mean().item()
    assert smoothed == pytest.approx(0.8 * plain + 0.2 * uniform, rel=1e-5)


def test_router_loss_has_its_coefficient(build: Build):
    words = ("model.model_name_or_path=random:mixtral", "method.target_modules=[q_proj]")
    without, little, much = (loss_of(build(*words, router_aux_loss_coef=weight)) for weight in (0.0, 0.1, 1.0))
    assert much - without == pytest.approx(10 * (little - without), rel=1e-3)
    assert little > without


def test_router_loss_of_a_model_without_router_is_refused():
    config = config_with(router_aux_loss_coef=0.1)
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef: random:llama is no mixture of experts"):
        checks.check_model(config, resolve(config, CPU), lambda _: {})


def test_workers_load_rows_as_asked(build: Build):
    loader: Any = build(
        "training.dataloader_num_workers=1", dataloader_prefetch_factor=7, dataloader_persistent_workers=True,
        dataloader_multiprocessing_context="spawn",
    ).get_train_dataloader()  # fmt: skip
    assert (loader.prefetch_factor, loader.persistent_workers) == (7, True)
    assert loader.multiprocessing_context.get_start_method() == "spawn"


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_rows_have_an_order_of_their_own(build: Build, strategy: str):
    def order(**given: Any) -> list[Any]:
        trainer = build(f"training.train_sampling_strategy={strategy}", "seed=7", **given)
        return [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]

    assert order(data_seed=7) == order() != order(data_seed=8)


def test_processes_and_compiler_are_set_as_asked(build: Build):
    shared = ("distributed=ddp", "distributed.num_processes=1")
    handler = build(*shared, ddp_bucket_cap_mb=3, ddp_broadcast_buffers=False).accelerator.ddp_handler
    assert (handler.bucket_cap_mb, handler.broadcast_buffers) == (3, False)
    compiled = build("training.torch_compile=true", torch_compile_backend="inductor", torch_compile_mode="max-autotune")
    plugin = compiled.accelerator.state.dynamo_plugin
    assert (plugin.backend.value, plugin.mode) == ("INDUCTOR", "max-autotune")


def test_arguments_for_gpus_are_handed_on_and_refused_elsewhere(monkeypatch):
    given = {"dataloader_pin_memory": False, "torch_empty_cache_steps": 2, "tf32": True}
    values = config_with("training.bf16=false").model_dump() | {"device": "auto"}
    values["training"] |= {"sft_config": given, "activation_offloading": True}
    config = from_dict(values)
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    before = torch.backends.fp32_precision
    with fp32_precision_kept():
        found = arguments(config, resolve(config, GPU), Path("out"))
        assert torch.backends.fp32_precision == "tf32"
    assert torch.backends.fp32_precision == before
    assert {name: getattr(found, name) for name in given} == given
    assert found.activation_offloading
    with pytest.raises(ConfigError, match="training.activation_offloading: it needs a CUDA device, not cpu"):
        resolve(from_dict(values), CPU)
    values["training"]["activation_offloading"] = False
    for name, value in given.items():
        values["training"]["sft_config"] = {name: value}
        with pytest.raises(ConfigError, match=f"training.sft_config.{name}: it needs a CUDA device, not cpu"):
            resolve(from_dict(values), CPU)
