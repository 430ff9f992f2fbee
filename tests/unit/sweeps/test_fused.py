from pathlib import Path
from typing import Any

import pytest

from qlora_exp.config.sections.sweep import SweepConfig
from qlora_exp.sweeps import fused
from qlora_exp.sweeps.jobs import Job, jobs


@pytest.fixture
def make_jobs(make_config):
    def make(*choices: str) -> list[Job]:
        words = [choice.split() for choice in choices]
        return jobs([make_config(*each) for each in words], [{}] * len(words), words, Path("sweep"))

    return make


def sizes(found: list[fused.Group]) -> list[int]:
    return [len(group.jobs) for group in found]


def test_jobs_that_differ_in_what_is_trained_share_a_base(make_jobs):
    made = make_jobs(
        "method=lora method.r=4",
        "method=lora method.r=8 seed=2 training.learning_rate=1e-3 training.max_steps=9",
        "method=ia3 dataset.max_train_rows=8",
        "method=lora lora_variant=dora training.per_device_train_batch_size=1",
    )
    assert sizes(fused.groups(made, SweepConfig(fuse=8))) == [4]
    (group,) = fused.groups(made, SweepConfig(fuse=3))
    assert (len(group.jobs), group.place.at_once) == (4, 3)  # as one ends, the next begins
    halves = fused.groups(made, SweepConfig(fuse=2, n_jobs=3))
    assert [(len(group.jobs), group.place.at_once) for group in halves] == [(2, 2), (2, 2)]
    assert sizes(fused.groups(made, SweepConfig(fuse=3, n_jobs=2))) == [2, 2]
    assert sizes(fused.groups(made, SweepConfig())) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "other",
    [
        "model=tiny_opt",
        "quantization=nf4 method=qlora",
        "model.dtype=bfloat16",
        "training.bf16=true",
        "model.attn_implementation=eager",
        "training.gradient_checkpointing=true",
    ],
)
def test_jobs_with_another_base_or_precision_do_not(make_jobs, other: str):
    assert sizes(fused.groups(make_jobs("method=lora", f"method=lora {other}"), SweepConfig(fuse=8))) == [1, 1]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("method=full", "trains weights of the base"),
        ("method=freeze", "trains weights of the base"),
        ("method=lora method.bias=all", "trains weights of the base"),
        ("method=lora lora_variant=pissa", "changes weights of the base"),
        ("method=qlora lora_variant=loftq", "changes weights of the base"),
        ("method=qlora quantization=torchao_int8", "cannot be shared"),
        ("method=lora model.device_map=auto", "spreads its base"),
        ("method=lora training.torch_compile=true", "compiles"),
        ("method=lora training.tune=auto", "alone"),
        ("method=lora distributed=ddp distributed.num_processes=2", "processes of its own"),
    ],
)
def test_jobs_that_cannot_share_are_alone_and_say_why(make_jobs, words: str, why: str):
    made = make_jobs("method=lora", "method=lora seed=2", words)
    found = fused.groups(made, SweepConfig(fuse=8))
    assert sizes(found) == [2, 1]
    grouped = {job.key: group for group in found for job in group.jobs if len(group.jobs) > 1}
    assert why in fused.described(made[2], grouped)
    assert fused.described(made[0], grouped) == "group 1: 2 jobs, by turns"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("method=lora", None),
        ("method=qlora lora_variant=dora", None),
        ("method=lora lora_variant=rslora", None),
        ("method=ia3", "method=ia3"),
        ("method=lora lora_variant=kasa", "kasa"),
        ("method=lora training.packing=true", None),
        ("method=lora training.padding=free", None),
        ("method=lora training.tiled_mlp=true", "tiled_mlp"),
        ("method=lora training.neftune_noise_alpha=5", "neftune"),
        ("method=lora model.new_tokens=[new]", "new_tokens"),
        ("method=qlora quantization=int8", "llm_int8_threshold"),
        ("method=qlora quantization=int8 quantization.llm_int8_threshold=0", None),
    ],
)
def test_rows_go_together_only_where_that_is_right(make_config, words: str, why: str | None):
    found: Any = fused.why_by_turns(make_config(*words.split()))
    assert found is None if why is None else why in found


def test_rows_go_together_where_that_is_asked_for_and_right(make_jobs):
    made = make_jobs("method=lora", "method=lora seed=2")
    (group,) = fused.groups(made, SweepConfig(fuse=8))
    assert not group.place.rows_together
    (group,) = fused.groups(made, SweepConfig(fuse=8, fused_rows=True))
    assert fused.described(made[0], dict.fromkeys((made[0].key,), group)) == "group 1: 2 jobs, rows in one pass"
    other = make_jobs("method=lora", "method=ia3")
    (group,) = fused.groups(other, SweepConfig(fuse=8, fused_rows=True))
    assert not group.place.rows_together
    text = fused.described(other[0], dict.fromkeys((other[0].key,), group))
    assert text == "group 1: 2 jobs, by turns because of method=ia3"


def test_as_many_as_are_planned_to_fit_go_together(make_jobs, monkeypatch):
    from qlora_exp.planning import screening

    made = make_jobs(*(f"method=lora seed={seed}" for seed in range(7)))
    monkeypatch.setattr(screening, "most_together", lambda configs, vram, rows, most: 3)
    (group,) = fused.groups(made, SweepConfig(fuse="auto"))
    assert group.place.at_once == 3
    assert fused.described(made[0], {made[0].key: group}) == "group 1: 7 jobs, 3 at a time, by turns"
    monkeypatch.setattr(screening, "most_together", lambda configs, vram, rows, most: 1)
    assert sizes(fused.groups(made, SweepConfig(fuse="auto"))) == [1] * 7


@pytest.mark.parametrize(("settings", "count"), [({}, 1), ({"fuse": 3}, 3), ({"fuse": "auto", "n_jobs": 2}, 16)])
def test_a_search_proposes_as_many_trials_as_train_at_once(settings: dict[str, Any], count: int):
    assert fused.jobs_at_once(SweepConfig(**settings)) == count


@pytest.mark.parametrize(
    ("words", "joins"),
    [
        ("method=lora seed=9 method.r=64", True),
        ("method=ia3", False),
        ("method=qlora", False),
        ("method=full", False),
        ("method=lora training.bf16=true", False),
    ],
)
def test_a_further_job_joins_a_group_with_its_base_only(make_jobs, make_config, words: str, joins: bool):
    (group,) = fused.groups(make_jobs("method=lora", "method=lora seed=2"), SweepConfig(fuse=2, fused_rows=True))
    assert fused.joins(make_config(*words.split()), group) is joins
