"""A recorded config may neither run code nor read this machine's files unless the user allows it."""

import pytest

from qlora_exp.config import untrusted
from qlora_exp.config.hydra_compose import compose
from qlora_exp.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"trust_remote_code": True}}, "model.trust_remote_code=true"),
        ({"evaluation": {"lm_eval_include_path": "tasks"}}, "evaluation.lm_eval_include_path=tasks"),
        ({"evaluation": {"lm_eval_tasks": ["one", "two"]}}, r"evaluation.lm_eval_tasks=\[one,two\]"),
        (
            {"dataset": {"path": "reasoning_gym:string_insertion"}},
            "run code that a model generates; .* dataset.path=reasoning_gym:string_insertion",
        ),
        ({"dataset": {"eval_path": "reasoning_gym:n_queens"}}, "dataset.eval_path=reasoning_gym:n_queens"),
        ({"unrelated": {"path": "reasoning_gym:countdown"}}, "unrelated.path=reasoning_gym:countdown"),
        ({"unrelated": {"eval_path": "reasoning_gym:countdown"}}, "unrelated.eval_path=reasoning_gym:countdown"),
        ({"dataset": {"path": "/etc/passwd"}}, "dataset.path=PATH"),
        ({"dataset": {"path": "../rows.jsonl"}}, "outside of this folder"),
        ({"dataset": {"eval_path": "~/.ssh/id_rsa"}}, "outside of this folder"),
        ({"model": {"model_name_or_path": "/srv/model"}}, "model.model_name_or_path=PATH"),
        ({"method": {"_target_": "os.system"}}, "_target_"),
        ({"_target_": "os.system"}, "_target_"),
        ({"model": {"model_name_or_path": {"a": 1}}}, "model.model_name_or_path"),
    ],
)
def test_recorded_config_may_not_run_code_or_read_files(changes: dict, message: str):
    values = compose(["method=lora"]).model_dump(mode="json")
    for section, new in changes.items():
        values[section] = values[section] | new if isinstance(new, dict) else new
    with pytest.raises(ConfigError, match=message):
        untrusted.changed(values, {}, "run x")


def test_recorded_task_confirmed_by_the_user_is_allowed():
    changes = {"dataset.path": "reasoning_gym:string_insertion", "evaluation.lm_eval_tasks": ["one"]}
    words = ["method=lora", "dataset=reasoning_gym", *(f"{key}={value}" for key, value in changes.items())]
    values = compose(words).model_dump(mode="json")
    with pytest.raises(ConfigError, match="lm_eval_tasks"):
        untrusted.changed(values, {}, "run x")
    assert untrusted.changed(values, changes, "run x").dataset.path == changes["dataset.path"]


def test_word_without_equals_sign_is_rejected():
    with pytest.raises(ConfigError, match="'seed' is not KEY=VALUE"):
        untrusted.given(["seed"])


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['x']", "[1, 2", "a: &x [1]\nb: [*x]", "a: 2020-99-99", "[" * 5000],
    ids=["a call", "cut off", "an alias", "no date", "too deep"],
)
def test_yaml_that_is_more_than_plain_data_is_rejected(text: str):
    with pytest.raises(ConfigError, match="it is not plain YAML"):
        untrusted.plain_yaml(text, "it")


def test_users_changes_reach_keys_at_any_depth_but_no_options():
    values = compose(["method=lora"]).model_dump(mode="json")
    config = untrusted.changed(values, {"tracking.tags.owner": "me", "seed": 3}, "run x")
    assert config.tracking.tags == {"owner": "me"}
    with pytest.raises(ConfigError, match=r"method=ia3: only keys of run x can be changed, such as method\.KEY=VALUE"):
        untrusted.changed(values, {"method": "ia3"}, "run x")
