from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment import turns
from qlora_exp.environment.device import detect, resolve
from qlora_exp.environment.turns import Turns
from qlora_exp.models.base import load_model
from qlora_exp.models.builtin import TINY
from qlora_exp.models.sharing.copies import SharedBase
from qlora_exp.models.sharing.rows import Rows, by_turns
from qlora_exp.training.batches import without_padding
from qlora_exp.training.evaluation import isolates_packed_rows
from qlora_exp.utils.errors import ConfigError

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 48}
ADAPTERS = [
    {"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.3},
    {"r": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_alpha": 3},
    {"r": 4, "target_modules": "all-linear", "use_dora": True, "lora_dropout": 0.1},
]
MIXTURES = [name for name, fields in TINY.items() if any("expert" in field for field in fields)]
ROWS = [(2, 7), (1, 12), (3, 5)]
"""Rows and tokens of each job's batches."""


def tiny() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))


def train(
    base: SharedBase, number: int, rows: Rows | None, steps: int = 2, targets: Any = None, in_sequence: bool = False
) -> list[torch.Tensor]:
    """Train a job's adapter for some steps, and return its gradients of each step and its weights.

    Its rows are padded, or follow one another in one sequence.
    """
    torch.manual_seed(number)
    settings = ADAPTERS[number] | ({"target_modules": targets} if targets else {})
    model = get_peft_model(base.copy(), LoraConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM")).train()
    if rows is None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, made = torch.optim.SGD(trained, lr=1e-2), []

    def learn() -> None:
        for step in range(steps + number):  # jobs end at different times
            turns.pass_on()
            ids = torch.randint(1, 64, ROWS[number], generator=torch.Generator().manual_seed(10 * number + step))
            mask = torch.ones_like(ids)
            mask[-1, -2:] = 0
            batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
            loss = model(**without_padding(batch) if in_sequence else batch).loss
            loss.backward()
            if rows is not None:
                rows.backward(number)
            made.extend(parameter.grad.clone() for parameter in trained if parameter.grad is not None)
            optimizer.step()
            optimizer.zero_grad()

    if rows is None:
        learn()
    else:
        with rows.joined(number, model):
            learn()
    return [*made, *trained]


def together(
    base: SharedBase, tmp_path, numbers=(0, 1, 2), sequences=(), **options: Any
) -> tuple[list[Any], list[Any]]:
    results: dict[int, Any] = {}

    def job(number: int):
        def call() -> None:
            rows = turns.current().keep("rows", lambda: Rows(turns.current(), base.copy(), recomputes=True))
            results[number] = train(base, number, rows, in_sequence=number in sequences, **options)

        return call

    errors = Turns([job(number) for number in numbers], [tmp_path / f"{number}.log" for number in numbers]).run()
    return [results.get(number) for number in numbers], errors


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_every_job_gets_the_gradients_and_weights_that_it_gets_alone(tmp_path):
    base = SharedBase(tiny())
    found, errors = together(base, tmp_path)
    assert errors == [None, None, None]
    for number, ours in enumerate(found):
        assert_close(ours, train(base, number, None))
    base.check()


@pytest.mark.parametrize("sequences", [(0, 1, 2), (0, 2)], ids=["all", "some"])
def test_rows_that_follow_one_another_in_sequences_go_together_too(tmp_path, monkeypatch, sequences: tuple[int, ...]):
    base, passes = SharedBase(tiny()), []
    through = Rows._through

    def counted(self: Rows, batches: Any) -> None:
        passes.append(tuple(sorted(batches)))
        through(self, batches)

    monkeypatch.setattr(Rows, "_through", counted)
    found, errors = together(base, tmp_path, sequences=sequences)
    assert errors == [None, None, None]
    # Job 0 has two steps, job 1 three, job 2 four. Jobs whose batches differ in kind are not starved by the others.
    assert passes == ([(0, 1, 2)] * 2 + [(1, 2), (2,)] if 1 in sequences else [(0, 2), (1,)] * 2 + [(2,), (1,), (2,)])
    for number, ours in enumerate(found):
        assert_close(ours, train(base, number, None, in_sequence=number in sequences))


@pytest.mark.thorough
@pytest.mark.parametrize("in_sequence", [False, True], ids=["padded", "in_sequence"])
@pytest.mark.parametrize("family", TINY)
def test_rows_of_every_family_go_together_or_by_turns(family: str, in_sequence: bool, tmp_path):
    config = compose([f"model.model_name_or_path=random:{family}", "method=lora", "device=cpu"])
    base = SharedBase(load_model(config.model, config.quantization, resolve(config, detect("cpu"))))
    if why := by_turns(base.copy(), in_sequence):
        assert ("router" in why) is (family in MIXTURES)
        return
    if in_sequence:
        try:
            if not isolates_packed_rows(base.copy()):
                return
        except ConfigError:
            return
    targets = ["in_proj"] if "mamba" in family or family == "falcon_h1" else "all-linear"
    sequences = (0, 1) if in_sequence else ()
    found, errors = together(base, tmp_path, numbers=(0, 1), sequences=sequences, targets=targets)
    for error in errors:
        if error is not None:
            raise error
    for number, ours in enumerate(found):
        theirs = train(base, number, None, targets=targets, in_sequence=in_sequence)
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_a_job_that_fails_does_not_change_the_others(tmp_path, monkeypatch):
    base = SharedBase(tiny())
    passed = Rows.backward

    def backward(self: Rows, number: int) -> None:
        if number == 1:
            raise ValueError("its own")
        passed(self, number)

    monkeypatch.setattr(Rows, "backward", backward)
    found, errors = together(base, tmp_path)
    assert [str(error) for error in errors] == ["None", "its own", "None"]
    for number in (0, 2):
        assert_close(found[number], train(base, number, None))


@pytest.mark.parametrize("where", ["_through", "_one_back"])
def test_when_memory_runs_out_fewer_jobs_go_together(tmp_path, monkeypatch, where: str):
    base, sizes = SharedBase(tiny()), []
    passed = getattr(Rows, where)

    def limited(self: Rows, batches: Any) -> None:
        sizes.append(len(batches))
        passed(self, batches)
        if len(batches) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Rows, where, limited)
    found, errors = together(base, tmp_path)
    assert errors == [None, None, None]
    assert sizes[0] == 3
    assert {*sizes[-4:]} == {1}
    for number, ours in enumerate(found):
        assert_close(ours, train(base, number, None))


def test_batches_that_jobs_evaluate_go_together_and_give_the_losses_that_they_give_alone(tmp_path, monkeypatch):
    base, passes, losses = SharedBase(tiny()), [], {}
    through = Rows._through

    def counted(self: Rows, batches: Any) -> None:
        passes.append(sorted(batches))
        through(self, batches)

    monkeypatch.setattr(Rows, "_through", counted)

    def job(number: int) -> Any:
        def call() -> None:
            rows = turns.current().keep("rows", lambda: Rows(turns.current(), base.copy(), recomputes=True))
            torch.manual_seed(number)
            config = LoraConfig(**ADAPTERS[number], init_lora_weights=False, task_type="CAUSAL_LM")
            model, found = get_peft_model(base.copy(), config), []
            batches = [torch.randint(1, 64, (rows_, tokens)) for rows_, tokens in ROWS[: 1 + number]]
            state = torch.get_rng_state()
            for inside in (rows.joined(number, model), nullcontext()):
                with inside, torch.no_grad():
                    turns.pass_on()
                    model.train()
                    model.eval()
                    found.append([model(ids, labels=ids).loss for ids in batches])
                    found[-1].append(model.generate(input_ids=batches[0], max_new_tokens=3))
            assert torch.equal(torch.get_rng_state(), state)
            losses[number] = found

        return call

    jobs = Turns([job(number) for number in range(3)], [tmp_path / f"{number}.log" for number in range(3)])
    assert jobs.run() == [None] * 3
    assert passes == [[0, 1, 2], [1, 2]]  # then job 2 has a batch of its own
    for ours, theirs in losses.values():
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_jobs_that_train_wait_for_one_that_evaluates(tmp_path):
    base = SharedBase(tiny())

    def job(number: int, results: dict[int, Any]) -> Any:
        def call() -> None:
            rows = turns.current().keep("rows", lambda: Rows(turns.current(), base.copy(), recomputes=False))
            results[number] = train(base, number, rows)
            if number == 0:
                config = LoraConfig(**ADAPTERS[1], init_lora_weights=False, task_type="CAUSAL_LM")
                model = get_peft_model(base.copy(), config).eval()
                with rows.joined(number, model), torch.no_grad():
                    ids = torch.arange(1, 9)[None]
                    for _ in range(3):
                        model(ids)
                        turns.pass_on()

        return call

    results: dict[int, Any] = {}
    jobs = [job(number, results) for number in (0, 1, 2)]
    assert Turns(jobs, [tmp_path / f"{number}.log" for number in (0, 1, 2)]).run() == [None] * 3
    for number in (0, 1, 2):
        assert_close(results[number], train(base, number, None))


def test_a_job_by_itself_evaluates_bit_for_bit_what_it_evaluates_alone(tmp_path):
    base = SharedBase(tiny())
    model = get_peft_model(base.copy(), LoraConfig(**ADAPTERS[1], init_lora_weights=False, task_type="CAUSAL_LM"))
    ids = torch.arange(1, 9)[None]
    alone = model.eval()(ids).logits

    def job() -> None:
        rows = Rows(turns.current(), base.copy(), recomputes=False)
        with rows.joined(0, model), torch.no_grad():
            assert torch.equal(model(ids).logits, alone)

    assert Turns([job], [tmp_path / "0.log"]).run() == [None]
    assert torch.equal(model(ids).logits, alone)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": "llama", "attention_dropout": 0.1}, "attention_dropout"),
        ({"model_type": "gpt2"}, "pdrop"),
        ({"model_type": "opt"}, "dropout"),
        ({"model_type": "mixtral"}, "router"),
    ],
)
def test_a_base_whose_rows_depend_on_one_another_takes_turns(fields: dict[str, Any], why: str | None):
    config = AutoConfig.for_model(**fields)
    found = by_turns(type("Model", (), {"config": config}))
    assert found is None if why is None else why in (found or "")


def test_layers_of_linear_attention_take_turns_where_rows_follow_one_another():
    model = type("Model", (), {"config": AutoConfig.for_model("qwen3_5_text")})
    assert by_turns(model) is None
    assert "linear attention" in (by_turns(model, in_sequences=True) or "")
