"""A key that the user sets for nothing is refused by name; what option files set, and what acts in some job, is not."""

import logging

import pytest

from qlora_exp.config import idle
from qlora_exp.config.hydra_compose import check_command, compose
from qlora_exp.config.untrusted import changed
from qlora_exp.config.validate import from_dict, known_keys
from qlora_exp.utils.errors import ConfigError

NAMES = ("dataset.sources.a", "dataset.sources.b")
SOURCES = ("dataset=own", *(f"{name}.path={number}.jsonl" for number, name in enumerate(NAMES)))
FILE = ("dataset=own", "dataset.path=rows.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset.split=test"], "dataset.split=test would change nothing: it is for datasets of the hub"),
        ([*FILE, "dataset.revision=main"], "not rows.jsonl, which is read as a whole"),
        ([*FILE, "dataset.eval_split=test"], "dataset.eval_split=test: only datasets of the hub have splits"),
        ([*FILE, "dataset.eval_path=x.jsonl", "dataset.eval_size=3"], "eval_path has the held-out rows"),
        ([*FILE, "dataset.format=alpaca", "dataset.text_column=body"], "it is for format=text, not format=alpaca"),
        ([*FILE, "dataset.format=text", "dataset.prompt_column=q"], "format=text reads text_column"),
        ([*FILE, "dataset.reasoning_gym_size=9"], "is no reasoning_gym:TASK"),
        ([*FILE, "dataset.sources.a.path=x.jsonl"], "dataset.path=rows.jsonl would change nothing: no source takes it"),
        ([*SOURCES, "dataset.input_column=a", *(f"{name}.input_column=x" for name in NAMES)], "no source takes it"),
        ([*SOURCES, "dataset.format=alpaca", "dataset.text_column=x"], "it is for format=text"),
        ([*SOURCES, "dataset.sources.b.split=test"], "dataset.sources.b.split=test would change nothing: it is for"),
        ([*SOURCES, "dataset.stopping=all_exhausted"], "give sources weights or a temperature"),
        ([*FILE, "dataset.mixing_temperature=2"], "there are no dataset.sources to mix"),
        (["unrelated.drop_leaks=none"], "unrelated text is not trained on"),
        (["unrelated.max_train_rows=3"], "use unrelated.max_eval_rows"),
        (["unrelated=none", "unrelated.eval_size=3"], "unrelated.path=none"),
        (["model.revision=main"], "only models of the hub have revisions"),
        (["model=llama3_8b", "model.model_name_or_path=a/b", "model.architecture.vocab_size=9"], "it describes meta"),
        (["method=full", "method.adapter_dtype=bfloat16"], "full fine-tuning has no adapter"),
        (["lora_variant=eva", "model.adapter=a", "lora_variant.init_rows=8"], "model.adapter is initialized already"),
        (["lora_variant.init_rows=8"], "init_lora_weights is none of corda, eva, lora_ga"),
        (["method.layers_to_transform=[0]"], "list the names of modules"),
        (["method=oft", "method.eps=1e-3"], "it needs coft=True"),
        (["method=adalora", "method.r=4"], "AdaLoraConfig does not use it"),
        (["method=lokr", "method.rank_dropout_scale=true"], "it needs rank_dropout"),
        (["method=lora", "quantization.bnb_4bit_compute_dtype=float16"], "does not store this base in 4 bits"),
        (["quantization.llm_int8_threshold=3"], "does not store this base in 8 bits"),
        (["optimizer=sgd", "optimizer.adam_epsilon=1e-6"], "optim=sgd does not use it"),
        (["optimizer=loraplus", "optimizer.riemannian_reg=0.1"], "it is for optimizer=riemannian"),
        (["optimizer.optim_target_modules=mlp"], "works on all trained parameters"),
        (["method=full", "optimizer=schedule_free_radam", "training.warmup_steps=5"], "needs no warmup"),
        (["training.num_train_epochs=3"], "training.max_steps=30 overrides it: set training.max_steps=-1"),
        (["training.lr_scheduler_type=constant", "training.warmup_steps=5"], "use constant_with_warmup"),
        (["training.packing_strategy=bfd_split"], "it needs training.packing=true"),
        (["training.padding=free", "training.packing=true"], "are not padded"),
        (["training.padding=free", "training.per_device_train_batch_size=1"], "batches of one row"),
        (["training.padding=by_length"], "a step is one batch"),
        (["training.recomputed_layers=4"], "it needs training.gradient_checkpointing=true"),
        (["training.eval_strategy=epoch", "training.eval_steps=3"], "it needs training.eval_strategy=steps, not epoch"),
        (["training.save_steps=10"], "it needs training.save_strategy=steps, not no"),
        (["training.save_total_limit=1"], "saves no checkpoint"),
        (["training.early_stopping_threshold=0.1"], "it needs training.early_stopping_patience"),
        (["evaluation.lm_eval_limit=3"], "it needs evaluation.lm_eval_tasks"),
        (["tracking.log_full_model=true"], "method=qlora trains an adapter"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_key_that_changes_nothing_is_refused_with_the_reason(words: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        compose(words)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_defaults_nulls_and_values_of_option_files_are_accepted():
    assert compose(["dataset.split=train", "training.eval_strategy=no"]).training.eval_steps == 12
    assert compose(["dataset.format=text", "dataset.input_column=null"])
    assert compose(["training.lr_scheduler_type=constant"]).training.warmup_steps == 0.1


def test_settings_of_answers_that_are_not_generated_are_only_logged(caplog):
    with caplog.at_level(logging.WARNING):
        compose(["evaluation.generate_rows=0", "evaluation.max_new_tokens=4"])
    assert "evaluation.max_new_tokens=4 changes nothing: evaluation.generate_rows=0" in caplog.text


def test_key_of_a_sweep_must_act_in_one_job_only():
    words = ["quantization.bnb_4bit_compute_dtype=float32"]
    nf4 = compose(["method=lora", "quantization=nf4", *words])
    plain = from_dict(nf4.model_dump(mode="json") | {"quantization": {"bnb_4bit_compute_dtype": "float32"}})
    assert [*idle.problems([plain, nf4], words, sweeping=True)] == []
    assert len([*idle.problems([plain, plain], words, sweeping=True)]) == 1


def test_named_sweep_without_m_may_set_keys_of_sweeps():
    check_command(["sweep=rank_scaling", "sweep.timeout_minutes=60"])
    check_command(["sweep.dry_run=true"])
    check_command(["hydra/launcher=slurm"], shows_config=True)
    for word in ("sweep.timeout_minutes=60", "search.n_trials=2", "hydra/launcher=slurm", "hydra.sweep.dir=here"):
        with pytest.raises(ConfigError, match=rf"{word}(\.0)? would change nothing: .* single run: add -m"):
            check_command([word])


def test_change_of_a_recorded_run_must_act():
    values = compose(["method=lora"]).model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"training\.packing_strategy=bfd_split would change nothing"):
        changed(values, {"training.packing_strategy": "bfd_split"}, "run x")


@pytest.mark.parametrize("words", [["method=lora", "unrelated=none"], ["method=full", "dataset.format=text"]])
def test_every_idle_key_exists(words: list[str]):
    sections = dict(idle.idle(compose(words)))
    settings = {key for key in sections if key.startswith(("method.", "lora_variant."))}
    assert sections.keys() - settings <= {*known_keys()}
