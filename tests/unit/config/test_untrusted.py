"""A recorded config may neither run code nor read this machine's files unless the user allows it."""

import sys
import time

import pytest
import yaml
from helpers import plugins as packages
from hypothesis import given
from hypothesis import strategies as st

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
        ({"dataset": {"sources": {"a": {"path": "/etc/passwd"}}}}, "dataset.sources.a.path=PATH"),
        ({"dataset": {"sources": {"a": {}, "b": {"eval_path": "../x.jsonl"}}}}, "dataset.sources.b.eval_path=PATH"),
        ({"dataset": {"sources": {"a": {"path": "s3://a/b.jsonl"}}}}, "fetches s3://.* dataset.sources.a.path=s3://"),
        ({"dataset": {"sources": {"a": {"path": "reasoning_gym:n_queens"}}}}, "dataset.sources.a.path=reasoning_gym"),
        ({"dataset": {"sources": {"a": {"drop_matching": "(a+)+$"}}}}, "add dataset.sources.a.drop_matching=VALUE"),
        ({"dataset": {"sources": {"a": {"path": "file://a/b.jsonl"}}}}, "dataset.sources.a.path: begins with file://"),
        ({"dataset": {"sources": {"a": {"_target_": "os.system"}}}}, "a source has no such key"),
        ({"dataset": {"sources": {"../a": {}}}}, "cannot be a name"),
        ({"dataset": {"path": "../rows.jsonl"}}, "outside of this folder"),
        ({"dataset": {"eval_path": "~/.ssh/id_rsa"}}, "outside of this folder"),
        ({"model": {"model_name_or_path": "/srv/model"}}, "model.model_name_or_path=PATH"),
        ({"model": {"adapter": "/srv/adapter"}}, "model.adapter=PATH"),
        ({"training": {"sft_config": {"output_dir": "/srv"}}}, "training.sft_config.output_dir: set hydra.run.dir"),
        ({"training": {"sft_config": {"deepspeed": "ds.json"}}}, "training.sft_config.deepspeed: not an argument"),
        ({"training": {"sft_config": {"hub_token": "a"}}}, "training.sft_config.hub_token: not an argument"),
        ({"training": {"sft_config": {"_target_": "os.system"}}}, "training.sft_config._target_: .* no such argument"),
        ({"method": {"_target_": "os.system"}}, "_target_"),
        ({"_target_": "os.system"}, "_target_"),
        ({"model": {"model_name_or_path": {"a": 1}}}, "model.model_name_or_path"),
        ({"dataset": {"path": "s3://a/b.jsonl"}}, "fetches s3://a/b.jsonl; if you trust it, add dataset.path=s3://a"),
        ({"unrelated": {"eval_path": "hf://datasets/a/b"}}, "fetches hf://.* add unrelated.eval_path=hf://"),
        ({"dataset": {"path": "file://a/b.jsonl"}}, "dataset.path: begins with file://"),
        ({"model": {"model_name_or_path": "http://host/x"}}, "model.model_name_or_path: is a URL"),
        ({"dataset": {"path": "x" * 5000}}, "dataset.path: can be neither a path nor a name on the hub"),
        ({"unrelated": {"eval_path": "a/" * 600}}, "unrelated.eval_path: can be neither"),
        ({"dataset": {"eval_path": "a\0b"}}, "dataset.eval_path: can be neither"),
        ({"dataset": {"path": "~nobody-here/x"}}, "dataset.path: begins with the home folder of a user"),
        (
            {"training": {"dataloader_num_workers": 5000}},
            "reads rows in 5000 processes.* add training.dataloader_num",
        ),
        ({"dataset": {"path": "${oc.env:HOME}"}}, "records have no references: add dataset.path=VALUE"),
        ({"model": {"adapter": "${oc.env:HOME}/x"}}, "records have no references: add model.adapter=VALUE"),
        ({"dataset": {"drop_matching": "(a+)+$"}}, "which may run for ever; .* add dataset.drop_matching=VALUE"),
        ({"unrelated": {"drop_matching": "(a|a)*b"}}, "unrelated.drop_matching=VALUE"),
        ({"method": {"target_modules": "(([a-z._0-9])+)+Q"}}, "method.target_modules=VALUE"),
        ({"method": {"rank_pattern": {"(a+)+Q": 4}}}, "method.rank_pattern=VALUE"),
    ],
)
def test_recorded_config_may_not_run_code_or_read_files(changes: dict, message: str):
    values = compose(["method=lora"]).model_dump(mode="json")
    for section, new in changes.items():
        values[section] = values[section] | new if isinstance(new, dict) else new
    with pytest.raises(ConfigError, match=message):
        untrusted.changed(values, {}, "run x")


@pytest.mark.parametrize("key", ["method.unfrozen_parameters", "optimizer.optim_target_modules"])
def test_recorded_names_of_parameters_may_not_run_for_ever(key: str):
    values = compose(["method=full", "optimizer=galore_adamw"]).model_dump(mode="json")
    section, _, name = key.partition(".")
    values[section][name] = ["norm", "(a+)+Q"]
    with pytest.raises(ConfigError, match=f"which may run for ever; .* add {key}=VALUE"):
        untrusted.changed(values, {}, "run x")
    untrusted.changed(values, {key: ["norm"]}, "run x")


@pytest.mark.parametrize("path", ["l*nk/secret.jsonl", "rows", "link"])
def test_recorded_path_does_not_lead_out_of_the_folder_by_links(path: str, tmp_path, monkeypatch):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret.jsonl").touch()
    work = tmp_path / "work"
    (work / "rows").mkdir(parents=True)
    (work / "link").symlink_to(tmp_path / "private")
    (work / "rows" / "x.jsonl").symlink_to(tmp_path / "private" / "secret.jsonl")
    monkeypatch.chdir(work)
    values = compose(["method=lora"]).model_dump(mode="json")
    values["dataset"]["path"] = path
    with pytest.raises(ConfigError, match=r"outside of this folder .*ask whoever .* add dataset.path=PATH"):
        untrusted.changed(values, {}, "run x")


def test_user_allows_the_path_of_a_source():
    values = compose(["dataset=own", "dataset.sources.a.path=/rows.jsonl"]).model_dump(mode="json")
    told = untrusted.changed(values, {"dataset.sources.a.path": "/here/rows.jsonl"}, "run x")
    assert told.dataset.paths == ["/here/rows.jsonl"]
    told = untrusted.changed(
        values, {"dataset.sources.a.prompt_template": r"{q}\n", "dataset.sources.a.path": "r.csv"}, ""
    )
    assert told.dataset.parts["a"].prompt_template == "{q}\n"


def test_changes_of_templates_are_read_as_in_other_commands(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    values = compose(["dataset=own", "dataset.path=rows.jsonl"]).model_dump(mode="json")
    told = untrusted.changed(values, {"dataset.prompt_template": r"Q: {q}\nA:"}, "run x")
    assert told.dataset.prompt_template == "Q: {q}\nA:"
    changes = {"dataset.prompt_template": None, "dataset.format": "chat"}
    told = untrusted.changed(values, changes | {"dataset.chat_template": f"{tmp_path}/mine.jinja"}, "run x")
    assert told.dataset.chat_template == "{{ messages }}"


def test_recorded_task_confirmed_by_the_user_is_allowed():
    changes = {"dataset.path": "reasoning_gym:string_insertion", "evaluation.lm_eval_tasks": ["one"]}
    words = ["method=lora", "dataset=reasoning_gym", *(f"{key}={value}" for key, value in changes.items())]
    values = compose(words).model_dump(mode="json")
    with pytest.raises(ConfigError, match="lm_eval_tasks"):
        untrusted.changed(values, {}, "run x")
    assert untrusted.changed(values, changes, "run x").dataset.path == changes["dataset.path"]


def test_metrics_and_losses_of_packages_are_run_only_if_the_user_names_them(monkeypatch, tmp_path):
    packages.install(monkeypatch, tmp_path / "a", "trap_of_records", "raise SystemError", "mine more", "mine")
    words = ["method=lora", "evaluation.metrics=[rouge,mine]", "training.loss_type=mine"]
    config = compose(words)
    both = r"add evaluation\.metrics=\[rouge,mine\] to run it, or evaluation\.metrics=\[rouge\] to"
    with pytest.raises(ConfigError, match=f"a metric of an installed package, mine, which only you may choose; {both}"):
        untrusted.refuse_plugins(config, {"training.loss_type": "mine"})
    with pytest.raises(ConfigError, match=r"add training\.loss_type=mine to run it, or training\.loss_type=nll to"):
        untrusted.refuse_plugins(config, {"evaluation.metrics": ["rouge", "mine"]})
    untrusted.refuse_plugins(config, {"evaluation.metrics": ["rouge", "mine"], "training.loss_type": "mine"})
    untrusted.refuse_plugins(compose(["method=lora"]), {})
    other = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"metrics": ["gone"]})})
    with pytest.raises(ConfigError, match="no metric 'gone'"):
        untrusted.refuse_plugins(other, {"evaluation.metrics": ["gone"]})
    assert "trap_of_records" not in sys.modules


def test_word_without_equals_sign_is_rejected():
    with pytest.raises(ConfigError, match="'seed' is not KEY=VALUE"):
        untrusted.given(["seed"])


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['x']",
        "[1, 2",
        "a: &x [1]\nb: [*x]",
        "a: 2020-99-99",
        "[" * 5000,
        "{a: " * 100_000,
        "a: 0x" + "f" * 500_000,
        "a: " + "9" * 5000,
        "a: [" + "1," * 60_000 + "]",
        "- " * 60,
        "x" * (1 << 20) + "x",
        "---\n" * 1000,
        'a: "\\ud800"',
        "{1: 2}",
        "{[1]: 2}",
        "{null: 2}",
        "? {a: b}\n: c",
        "{" + ",".join(f"{key * (2**61 - 1)}: 1" for key in range(1, 20_000)) + "}",
        "a: \x00",
    ],
    ids=lambda text: text[:20].encode("ascii", "backslashreplace").decode().replace("\n", " "),
)
def test_yaml_that_is_more_than_plain_data_is_rejected(text: str):
    begin = time.process_time()
    with pytest.raises(ConfigError, match="it is not plain YAML"):
        untrusted.plain_yaml(text, "it")
    assert time.process_time() - begin < 3


def test_users_changes_reach_keys_at_any_depth_but_no_options():
    values = compose(["method=lora"]).model_dump(mode="json")
    config = untrusted.changed(values, {"tracking.tags.owner": "me", "seed": 3}, "run x")
    assert config.tracking.tags == {"owner": "me"}
    config = untrusted.changed(values, {"training.sft_config.label_smoothing_factor": 0.1}, "run x")
    assert config.training.sft_config == {"label_smoothing_factor": 0.1}
    with pytest.raises(ConfigError, match=r"method=ia3: only keys of run x can be changed, such as method\.KEY=VALUE"):
        untrusted.changed(values, {"method": "ia3"}, "run x")


def test_numbers_to_base_60_are_text():
    text = "a: " + ":".join(["1"] * 60_000) + "\nb: 1:30\nc: 190:20:30.15\nd: 12\ne: -1.5e-3"
    values = untrusted.plain_yaml(text, "it")
    assert values.pop("a").startswith("1:1:1")
    assert values == {"b": "1:30", "c": "190:20:30.15", "d": 12, "e": -1.5e-3}


TEXT = st.text(st.characters(exclude_characters="\x85", codec="utf-8"))  # PyYAML writes \x85 wrongly


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False) | TEXT,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)))  # fmt: skip
def test_what_yaml_writes_is_read_back(values: object):
    text = yaml.safe_dump({"a": values}, allow_unicode=True)
    assert untrusted.plain_yaml(text, "it") == {"a": values}
