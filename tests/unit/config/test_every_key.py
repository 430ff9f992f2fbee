"""Every key of the schema changes something that a run makes: the cheapest thing in which it shows is compared.

A key without an entry fails, in the quick loop too, so that no new key can do nothing. `test_idle.py` has the refusals
where keys cannot act.
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.lm_eval_tasks import write_task
from helpers.stages import ROWS, Stages
from pydantic import BaseModel

from qlora_exp.config import idle
from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.config.validate import from_dict
from qlora_exp.utils.errors import UserError

FILE = "tests/unit/config/test_every_key.py"
CHAT = {"dataset.format": "chat", "dataset.messages_column": "said"}
SAVING = {"training.save_strategy": "steps", "training.save_steps": 12}
HUB = {"dataset.path": "org/rows"}
UNRELATED = {"unrelated.path": "rows.jsonl", "unrelated.format": "prompt_completion", "unrelated.input_column": None,
             "unrelated.prompt_column": "prompt", "unrelated.completion_column": "answer"}  # fmt: skip
MIXTURE = {"dataset.sources": {"one": {}, "two": {"path": "other.jsonl", "max_train_rows": 4}}}
SHARED = {"distributed.engine": "ddp", "distributed.num_processes": 2}
MACHINES = {**SHARED, "distributed.num_machines": 2, "distributed.main_process_ip": "one",
            "distributed.main_process_port": 5000}  # fmt: skip
FULL = {"method.peft_type": None, **{f"method.{key}": ... for key in (
    "r", "lora_alpha", "lora_dropout", "bias", "target_modules")}}  # fmt: skip
LISA = {**FULL, "method.lisa_activated_layers": 1, "method.lisa_interval_steps": 1}
TORCHAO = {"quantization.quant_method": "torchao", "quantization.weights": "int8"}
GYM = {"dataset.path": "reasoning_gym:chain_sum", "dataset.prompt_column": "question", "dataset.reasoning_gym_size": 6}
UNRELATED_GYM = {**UNRELATED, **{key.replace("dataset", "unrelated"): value for key, value in GYM.items()}}
UNRELATED_HUB = {**UNRELATED, "unrelated.path": "org/rows"}


# key: the stage in which it shows, another value, and what else must be set for it.
ENTRIES: dict[str, tuple[Any, ...]] = {
    "model.model_name_or_path": (Stages.loading, "random:opt"),
    "model.new_tokens": (Stages.adapter, ["<tool>"]),
    "model.adapter": (Stages.first_weights, "trained"),
    "model.revision": (Stages.loading, "v2", {"model.model_name_or_path": "org/model"}),
    "model.dtype": (Stages.loading, "bfloat16"),
    "model.attn_implementation": (Stages.loading, "eager"),
    "model.device_map": (Stages.loading, "auto"),
    "model.trust_remote_code": (Stages.loading, True, {"model.model_name_or_path": "org/model"}),
    "model.architecture": (
        Stages.architecture,
        {"_name_or_path": "random:llama", "model_type": "llama", "hidden_size": 96},
    ),
    "model.random_config": (Stages.architecture, {"hidden_size": 32}),
    "method.name": (Stages.labels, "mine"),
    "method.peft_type": (Stages.adapter, "DEFT", {"method.lora_alpha": ..., "method.lora_dropout": ...}),
    "method.quantized_base": (None, True, {}, "needs a quantized base"),
    "method.adapter_dtype": (Stages.resolved, "bfloat16"),
    "method.trainable_layers": (Stages.trained, 1, {**FULL, "method.unfrozen_parameters": ["norm"]}),
    "method.unfrozen_parameters": (Stages.trained, ["lm_head"], FULL),
    "method.lisa_activated_layers": (Stages.sampled, 2, LISA),
    "method.lisa_interval_steps": (Stages.sampled, 3, LISA),
    "method.r": (Stages.adapter, 5),
    "quantization.name": (Stages.labels, "mine", {"quantization.load_in_4bit": True}),
    "quantization.quant_method": (Stages.quantizer, "gptq"),
    "quantization.weights": (Stages.quantizer, "float8", TORCHAO),
    "quantization.load_in_4bit": (Stages.quantizer, True),
    "quantization.load_in_8bit": (Stages.quantizer, True),
    "quantization.bnb_4bit_quant_type": (Stages.quantizer, "fp4", {"quantization.load_in_4bit": True}),
    "quantization.bnb_4bit_use_double_quant": (Stages.quantizer, True, {"quantization.load_in_4bit": True}),
    "quantization.bnb_4bit_experts": (Stages.experts, True, {"quantization.load_in_4bit": True}),
    "quantization.bnb_4bit_compute_dtype": (Stages.quantizer, "bfloat16", {"quantization.load_in_4bit": True}),
    "quantization.llm_int8_threshold": (Stages.quantizer, 2.0, {"quantization.load_in_8bit": True}),
    "lora_variant.name": (Stages.labels, "mine"),
    "lora_variant.init_rows": (Stages.first_rows, 3, {"lora_variant.init_lora_weights": "eva"}),
    "optimizer.name": (Stages.labels, "mine"),
    "optimizer.optim": (Stages.arguments, "sgd"),
    "optimizer.optim_args": (Stages.arguments, {"momentum": 0.9}, {"optimizer.optim": "sgd"}),
    "optimizer.optim_target_modules": (Stages.projected, "mlp", {**FULL, "optimizer.optim": "galore_adamw",
        "optimizer.optim_target_modules": "all-linear"}),
    "optimizer.adam_beta1": (Stages.arguments, 0.8),
    "optimizer.adam_beta2": (Stages.arguments, 0.8),
    "optimizer.adam_epsilon": (Stages.arguments, 1e-3),
    "optimizer.lora_optimizer": (Stages.optimizer, "lorafa"),
    "optimizer.loraplus_lr_ratio": (Stages.optimizer, 4.0, {"optimizer.lora_optimizer": "loraplus"}),
    "optimizer.riemannian_reg": (Stages.optimizer, 0.5, {"optimizer.lora_optimizer": "riemannian"}),
    "dataset.name": (Stages.labels, "mine"),
    "dataset.path": (Stages.rows, "other.jsonl"),
    "dataset.subset": (Stages.rows, "main", HUB),
    "dataset.revision": (Stages.rows, "v2", HUB),
    "dataset.split": (Stages.rows, "test", HUB),
    "dataset.eval_path": (Stages.rows, "other.jsonl"),
    "dataset.eval_split": (Stages.rows, "test", {**HUB, "dataset.drop_leaks": "none"}),
    "dataset.eval_size": (Stages.rows, 5),
    "dataset.validation_size": (Stages.rows, 4),
    "dataset.evaluate_on": (Stages.rows, "validation", {"dataset.validation_size": 4}),
    "dataset.split_seed": (Stages.rows, 1),
    "dataset.max_train_rows": (Stages.rows, 3),
    "dataset.max_eval_rows": (Stages.rows, 1),
    "dataset.format": (Stages.tokens, "alpaca"),
    "dataset.prompt_template": (Stages.rows, "Q: {prompt}"),
    "dataset.chat_template": (Stages.tokens, "{% for m in messages %}{{ m['content'] }}{% endfor %}", CHAT),
    "dataset.prompt_column": (Stages.rows, "more"),
    "dataset.input_column": (Stages.rows, "more"),
    "dataset.completion_column": (Stages.rows, "more"),
    "dataset.messages_column": (Stages.rows, "said", {"dataset.format": "chat"}),
    "dataset.history_column": (Stages.rows, "said", {"dataset.format": "chat"}),
    "dataset.system_column": (Stages.rows, "more", {"dataset.format": "chat"}),
    "dataset.text_column": (Stages.rows, "more", {"dataset.format": "text", "dataset.text_column": "answer"}),
    "dataset.system_message": (Stages.tokens, "Be kind.", {"dataset.format": "chat"}),
    "dataset.drop_matching": (Stages.rows, "word3"),
    "dataset.drop_duplicates": (Stages.rows, False),
    "dataset.drop_leaks": (Stages.rows, "none", {"dataset.eval_path": "few.jsonl"}),
    "dataset.leak_threshold": (Stages.rows, 0.1, {"dataset.drop_leaks": "near"}),
    "dataset.streaming": (Stages.rows, True, {**HUB, "dataset.max_train_rows": 4}),
    "dataset.reasoning_gym_size": (Stages.rows, 9, GYM),
    "dataset.reasoning_gym_config": (Stages.rows, {"min_terms": 5, "max_terms": 6}, GYM),
    "dataset.sources": (Stages.rows, {"one": {}, "two": {"path": "other.jsonl"}}),
    "dataset.mixing_temperature": (Stages.rows, 4.0, MIXTURE),
    "dataset.stopping": (Stages.rows, "all_exhausted", {**MIXTURE, "dataset.mixing_temperature": 2.0}),
    "dataset.replay": (Stages.rows, 0.2, UNRELATED),
    "distributed.name": (Stages.labels, "mine", SHARED),
    "distributed.engine": (Stages.journal, "ddp", {"distributed.num_processes": 2}),
    "distributed.num_processes": (Stages.processes, 4, SHARED),
    "distributed.num_machines": (Stages.processes, 2, MACHINES | {"distributed.num_machines": 1}),
    "distributed.machine_rank": (Stages.processes, 1, MACHINES),
    "distributed.main_process_ip": (Stages.processes, "other", MACHINES),
    "distributed.main_process_port": (Stages.processes, 4000, SHARED),
    "distributed.ddp_timeout": (Stages.processes, 7, SHARED),
    "distributed.cpu_offload": (Stages.arguments, True, {**SHARED, "distributed.engine": "fsdp"}),
    "training.num_train_epochs": (Stages.arguments, 2.0, {"training.max_steps": -1}),
    "training.lr_scheduler_kwargs": (Stages.arguments, {"num_cycles": 3}, {"training.lr_scheduler_type": "cosine"}),
    "training.sft_config": (Stages.arguments, {"label_smoothing_factor": 0.1}),
    "training.completion_only_loss": (Stages.tokens, False),
    "training.assistant_only_loss": (Stages.tokens, True, CHAT),
    "training.tune": (Stages.tuned, "auto"),
    "training.activation_offloading": (Stages.planned, True),
    "training.tiled_mlp": (Stages.planned, True, {"training.max_length": 2048}),
    "training.bf16": (Stages.resolved, False),
    "training.fp16": (Stages.resolved, True, {"model.dtype": "float16"}),
    "training.gradient_checkpointing": (Stages.resolved, False),
    "training.recomputed_layers": (Stages.resolved, 1, {"training.gradient_checkpointing": True}),
    "training.padding": (Stages.resolved, "free"),
    "training.packing_strategy": (Stages.arguments, "bfd_split", {"training.packing": True}),
    "training.lr_scheduler_type": (Stages.arguments, "cosine"),
    "training.train_sampling_strategy": (Stages.arguments, "sequential"),
    "training.loss_type": (Stages.arguments, "dft"),
    "training.eval_strategy": (Stages.arguments, "epoch"),
    "training.save_strategy": (Stages.arguments, "epoch"),
    "training.load_best_model_at_end": (Stages.arguments, True, SAVING),
    "training.save_steps": (Stages.arguments, 3, {"training.save_strategy": "steps"}),
    "training.save_total_limit": (Stages.arguments, 5, {"training.save_strategy": "steps"}),
    "training.early_stopping_patience": (Stages.early_stopping, 2, {"training.load_best_model_at_end": True,
        "training.save_strategy": "steps", "training.save_steps": 12}),
    "training.early_stopping_threshold": (Stages.early_stopping, 0.5, {"training.load_best_model_at_end": True,
        "training.save_strategy": "steps", "training.save_steps": 12, "training.early_stopping_patience": 2}),
    "training.resume_from_checkpoint": (None, "nowhere", {}, "folder not found: nowhere"),
    "evaluation.before": (Stages.recipe, False),
    "evaluation.generate_rows": (Stages.evaluated, 1),
    "evaluation.max_new_tokens": (Stages.evaluated, 2),
    "evaluation.generation_batch_size": (Stages.evaluated, 1),
    "evaluation.metrics": (Stages.evaluated, ["rouge"]),
    "evaluation.lm_eval_tasks": (Stages.scored, ["sums", "others"]),
    "evaluation.lm_eval_include_path": (Stages.scored, "nowhere", {}, "no folder nowhere"),
    "evaluation.lm_eval_num_fewshot": (Stages.scored, 2),
    "evaluation.lm_eval_limit": (Stages.scored, 3),
    "tracking.uri": (Stages.journal, "sqlite:///other.db"),
    "tracking.experiment_name": (Stages.journal, "mine"),
    "tracking.run_name": (Stages.journal, "mine"),
    "tracking.tags": (Stages.journal, {"team": "a"}),
    "tracking.log_adapter": (Stages.recipe, False),
    "tracking.log_full_model": (Stages.recipe, True, {"method": {"name": "full"}}),
    "tracking.plan": (Stages.recipe, True),
    "sweep.name": (Stages.sweep, "mine"),
    "sweep.n_jobs": (Stages.sweep, 2),
    "sweep.fuse": (Stages.sweep, 2),
    "sweep.fused_rows": (Stages.sweep, True, {"sweep.fuse": 2}),
    "sweep.timeout_minutes": (Stages.sweep, 5.0),
    "sweep.fail_fast": (Stages.sweep, True),
    "sweep.rerun": (Stages.sweep, "failed"),
    "sweep.dry_run": (Stages.sweep, True),
    "sweep.unfit": (Stages.sweep, "skip"),
    "sweep.vram": (Stages.sweep, 8.0, {"sweep.unfit": "skip"}),
    "search.n_trials": (Stages.search, 2),
    "search.metrics": (Stages.search, ["after/rougeL"]),
    "search.directions": (Stages.search, ["maximize"]),
    "search.sampler": (Stages.search, "random", {"search.n_trials": 12}),
    "search.seed": (Stages.search, 1),
    "search.prune": (Stages.search, True),
    "search.pruner": (Stages.search, "halving", {"search.prune": True}),
    "tuning.tuned_keys": (Stages.tuning, ["training.weight_decay"]),
    "tuning.n_trials": (Stages.tuning, 3),
    "tuning.reduction_factor": (Stages.tuning, 2),
    "tuning.metric": (Stages.tuning, "after/rougeL"),
    "tuning.direction": (Stages.tuning, "maximize"),
    "tuning.seed": (Stages.tuning, 1),
    "seed": (Stages.arguments, 1),
    "device": (Stages.device, "cuda"),
}  # fmt: skip
for _key, _value in {
    "max_steps": 7, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "gradient_accumulation_steps": 2,
    "learning_rate": 0.5, "warmup_steps": 2, "weight_decay": 0.5, "max_grad_norm": 0.5, "max_length": 33,
    "neftune_noise_alpha": 5.0, "logging_steps": 3, "logging_first_step": True, "eval_steps": 2,
    "dataloader_num_workers": 1, "torch_compile": True, "packing": True,
}.items():  # fmt: skip
    ENTRIES[f"training.{_key}"] = (Stages.arguments, _value)
for _key, _value in {
    "path": "other.jsonl", "subset": "main", "revision": "v2", "split": "test", "eval_path": "other.jsonl",
    "eval_split": "test", "eval_size": 5, "split_seed": 1, "max_eval_rows": 1, "prompt_column": "more",
    "input_column": "more", "completion_column": "more", "drop_matching": "word3", "drop_duplicates": False,
}.items():  # fmt: skip
    _hub = _key in ("subset", "revision", "split", "eval_split")
    ENTRIES[f"unrelated.{_key}"] = (Stages.unrelated, _value, UNRELATED_HUB if _hub else UNRELATED)
ENTRIES |= {
    "unrelated.name": (Stages.labels, "mine", UNRELATED),
    "unrelated.max_train_rows": (Stages.unrelated, 1, {**UNRELATED_HUB, "unrelated.streaming": True,
        "unrelated.eval_size": 4, "unrelated.max_train_rows": 9}),
    "unrelated.format": (Stages.unrelated, "text", {**UNRELATED, "unrelated.text_column": "answer"}),
    "unrelated.prompt_template": (Stages.unrelated, "Q: {prompt}", UNRELATED),
    "unrelated.chat_template": (Stages.unrelated_tokens, "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        {**UNRELATED, "unrelated.format": "chat"}),
    "unrelated.messages_column": (Stages.unrelated, "said", {**UNRELATED, "unrelated.format": "chat"}),
    "unrelated.history_column": (Stages.unrelated, "said", {**UNRELATED, "unrelated.format": "chat"}),
    "unrelated.system_column": (Stages.unrelated, "more", {**UNRELATED, "unrelated.format": "chat"}),
    "unrelated.text_column": (Stages.unrelated, "more", {**UNRELATED, "unrelated.format": "text",
        "unrelated.text_column": "answer"}),
    "unrelated.system_message": (Stages.unrelated_tokens, "Be kind.", {**UNRELATED, "unrelated.format": "chat"}),
    "unrelated.streaming": (Stages.unrelated, True, {**UNRELATED_HUB, "unrelated.max_train_rows": 4,
        "unrelated.eval_size": 4}),
    "unrelated.reasoning_gym_size": (Stages.unrelated, 40, UNRELATED_GYM),
    "unrelated.reasoning_gym_config": (Stages.unrelated, {"min_terms": 5, "max_terms": 6}, UNRELATED_GYM),
}  # fmt: skip


def keys() -> list[str]:
    """List every key of the schema."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    return [
        key
        for name, kind in sections.items()
        for key in (
            [f"{name}.{inner}" for inner in kind.model_fields]
            if isinstance(kind, type) and issubclass(kind, BaseModel)
            else [name]
        )
    ]


@functools.cache
def base() -> str:
    own = ["dataset=own", "dataset.path=rows.jsonl", "dataset.completion_column=answer", "dataset.eval_size=3"]
    own += ["dataset.format=prompt_completion"]
    words = ["model=tiny_llama", "device=cpu", "method=lora", "unrelated=none", "tracking.plan=false", *own]
    return compose(words).model_dump_json()


def with_values(values: dict[str, Any]) -> Config:
    """Return the base config with other values of dotted keys; `...` removes a key."""
    config = json.loads(base())
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        place = config[section] if section else config
        if value is ...:
            del place[name]
        else:
            place[name] = value
    return from_dict(config)


def test_every_key_has_an_entry():
    missing = sorted({*keys()} - idle.ALWAYS.keys() - ENTRIES.keys())
    assert not missing, f"add an entry to ENTRIES in {FILE} for: {', '.join(missing)} (docs/how_to/add_a_key.md)"


@pytest.fixture
def stages(monkeypatch, tmp_path, tiny_tokenizer, make_store) -> Stages:
    other = [{**row, "answer": f"{row['answer']} of the other file"} for row in ROWS]
    files = {"rows": ROWS, "few": ROWS[:2], "other": other}
    for name, rows in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Stages(monkeypatch, tmp_path, tiny_tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("key", ENTRIES)
def test_key_changes_what_a_run_makes_or_is_refused(key: str, stages: Stages, make_store):
    stage, value, *rest = ENTRIES[key]
    others = dict(rest[0]) if rest else {}
    if stage is Stages.journal:
        make_store("other.db")
        others = {"tracking.uri": make_store("mlflow.db"), **others}
    if stage is Stages.scored:
        folder = write_task(Path("tasks").absolute())
        (folder / "others.yaml").write_text((folder / "sums.yaml").read_text().replace("task: sums", "task: others"))
        others = {"evaluation.lm_eval_tasks": ["sums"], "evaluation.lm_eval_include_path": str(folder), **others}

    def outcome(values: dict[str, Any]) -> Any:
        try:
            config = with_values(values)
            return stage(stages, config) if stage else config.model_dump()
        except UserError as error:
            return f"refused: {error}"

    before, after = outcome(others), outcome({**others, key: value})
    assert not str(before).startswith("refused: "), before
    assert after != before
    if len(rest) > 1:
        assert rest[1] in after
    elif not str(after).startswith("refused: "):
        sweeping = key.startswith(idle.SWEEP_ONLY)
        assert key not in dict(idle.idle(with_values({**others, key: value}), sweeping))


@pytest.mark.slow
@pytest.mark.parametrize("key", idle.ALWAYS)
def test_inherited_key_that_never_acts_is_refused(key: str):
    values = {"drop_leaks": "none", "leak_threshold": 0.1, "validation_size": 4, "evaluate_on": "validation"}
    config = with_values({f"unrelated.{name}": value for name, value in values.items()} | UNRELATED)
    assert len([*idle.problems([config], [key])]) == 1
