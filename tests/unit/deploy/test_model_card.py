"""A card says what was recorded, and of what it does not know that it does not."""

import re
from dataclasses import dataclass, field

import pytest
import yaml
from helpers.hub import hub_on_loopback
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import compose, conf_dir
from qlora_exp.deploy import model_card
from qlora_exp.utils.display import markdown, markdown_code, visible


@dataclass(frozen=True)
class Recorded:
    run_id: str = "0" * 32
    name: str = "a run"
    params: dict = field(default_factory=lambda: {"data.training_rows": "16", "resolved.dtype": "float32"})
    tags: dict = field(default_factory=lambda: {"git.sha": "0123456789ab"})
    metrics: dict = field(
        default_factory=lambda: {
            "trainable_parameters": 10, "total_parameters": 100, "trainable_share": 0.1, "model_bytes": 1e6,
            "before/rougeL": 0.1, "after/rougeL": 0.25, "steps": 3,
        }
    )  # fmt: skip
    losses: dict = field(default_factory=dict)

    def text(self, path: str) -> str:
        return self.losses.get(path, "")


def rows(*losses: float) -> str:
    return "".join(f'{{"nll": {10 * loss}, "tokens": 10}}\n' for loss in losses)


def head(text: str) -> dict:
    return ModelCard(text).data.to_dict()


def test_card_begins_with_hub_metadata():
    config = compose(["method=qlora", "method.r=8"])
    text = model_card.write(Recorded(), config, "models:/x@champion")
    assert head(text) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["qlora_exp", "qlora"],
        "model-index": [
            {
                "name": "a run",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"type": "other", "name": "embedded:construction_faq"},
                        "metrics": [{"type": "rougeL", "name": "ROUGE-L", "value": 0.25}],
                    }
                ],
            }
        ],
    }
    assert "r=8" in text
    assert "| code | 0123456789ab |" in text
    assert 'qlora_exp.load("models:/x@champion")' in text
    assert "cc-by-4.0 (attribution: Zaragoza AB)" in text


def test_losses_have_intervals_over_rows():
    kept = {"evaluation/before_losses.jsonl": rows(3, 4, 5), "evaluation/after_losses.jsonl": rows(2, 3.1, 3.9)}
    record = Recorded(losses=kept)
    record.metrics["after/metric/shared_words"] = 0.125
    text = model_card.write(record, compose(["method=lora"]), "x")
    assert "| - | 0.125 | - |" in next(line for line in text.splitlines() if line.startswith("| metric"))
    line = next(line for line in text.splitlines() if line.startswith("| loss"))
    values = [float(word) for word in re.findall(r"-?\d+\.\d+", line)]
    assert values[:2] == [4.0, 3.0]
    low, high = values[2:4]
    assert low < 3 < high
    assert values[4] == -1
    assert values[5] < -1 < values[6] < 0
    assert "| ROUGE-L | 0.1000 | 0.2500 | - |" in text


def test_unknown_licence_is_stated():
    config = compose(
        ["model=hub", "model.model_name_or_path=me/mine", "method=full", "dataset=own", "dataset.path=a.csv"]
    )
    text = model_card.write(Recorded(), config, "x")
    assert head(text)["license"] == "other"
    assert head(text)["library_name"] == "transformers"
    assert text.count(model_card.UNKNOWN) == 2


@pytest.mark.parametrize("folder", ["model", "dataset"])
def test_shipped_source_has_a_licence(folder):
    for file in (conf_dir() / folder).glob("*.yaml"):
        values = yaml.safe_load(file.read_text())
        name = values["model_name_or_path" if folder == "model" else "path"]
        assert name is None or model_card.license_of(name) != model_card.UNKNOWN, file.name


LOCAL = compose(["method=lora", "model=hub", "model.model_name_or_path=x/y", "dataset=own", "dataset.path=a.jsonl"])
COMMIT, FOLDER, FILE = "a" * 40, "b" * 16, "c" * 64


@pytest.mark.parametrize(
    ("model", "version", "named"),
    [
        ("org/base", COMMIT, {"base_model": "org/base", "datasets": ["org/rows"]}),
        ("gpt2", COMMIT, {"base_model": "gpt2", "datasets": ["org/rows"]}),
        ("org/base", "", {"base_model": "org/base", "datasets": ["org/rows"]}),
        ("org/base", FOLDER, {}),
        ("gpt2", "", {}),
        ("../base", "", {}),
        ("~/base", FOLDER, {}),
        ("C:\\models\\base", FOLDER, {}),
        ("models\\base", FOLDER, {}),
        ("//server/share/base", "missing", {}),
    ],
)
def test_only_what_is_on_the_hub_is_in_the_metadata(model, version, named, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data_version = FILE if version in (FOLDER, "missing") else version
    recorded = Recorded(tags={"identity.model": version, "identity.data": f"{data_version}+3.11"} if version else {})
    config = LOCAL.model_copy(update={"dataset": LOCAL.dataset.model_copy(update={"path": "org/rows"})})
    config = config.model_copy(update={"model": config.model.model_copy(update={"model_name_or_path": model})})
    text = model_card.write(recorded, config, "x")
    card = head(text)
    assert card.get("base_model") == named.get("base_model")
    if version:
        assert card.get("datasets") == named.get("datasets")
    if not named:
        name = re.split(r"[\\/]", model)[-1]
        assert f"| base model | {name}, a local folder |" in text
        assert f"put that folder, or a link to it, as `./{name}` into the folder" in text
        assert model not in text.replace(f"`./{name}`", "") or model == name
        assert dict(model_card.tags(config, recorded.tags))["base_model"] == f"./{name}"


ODD = st.text(st.characters(exclude_characters="/\0\\", codec="utf-8"), min_size=1, max_size=40) | st.sampled_from(
    [
        "---",
        "a\n---\nb: c",
        "# x",
        "a: [b",
        "*x",
        "&a",
        "!!str x",
        "'",
        '"',
        "\u2028",
        "🙂",
        "| x |",
        "``",
        "null",
    ]
)


@given(
    ODD, ODD, ODD, st.sampled_from(["/home/some body", "home/somebody", "~", "../somewhere", "file:///home/somebody"])
)
@settings(max_examples=40)  # each takes tens of milliseconds
def test_odd_names_give_a_valid_card_without_paths(run, base, rows, folder):
    config = LOCAL.model_copy(
        update={
            "model": LOCAL.model.model_copy(update={"model_name_or_path": f"{folder}/deeper/{base}"}),
            "dataset": LOCAL.dataset.model_copy(update={"path": f"{folder}/deeper/{rows}.jsonl"}),
        }
    )
    tags = {"identity.model": FOLDER, "identity.data": f"{FILE}+3.11"}
    text = model_card.write(Recorded(name=run, tags=tags), config, "models:/x/1")
    card = ModelCard(text)
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "license", "tags", "model-index"}
    assert card.data.model_name == visible(run)
    assert [result.metric_value for result in card.data.eval_results] == [0.25]
    assert str(card) == text
    assert card.text.splitlines()[1] == f"# {markdown(run)}"
    assert f"fine-tune of {markdown_code(base)}, a local folder" in card.text
    assert "deeper" not in text
    assert "somebody" not in text


def test_card_is_valid_by_the_hubs_own_check(monkeypatch):
    config = compose(["method=lora", "model=hub", "model.model_name_or_path=org/base"])
    with hub_on_loopback(monkeypatch) as hub:
        ModelCard(model_card.write(Recorded(), config, "x")).validate()
        with pytest.raises(ValueError, match="is not valid"):
            ModelCard("---\nbase_model: ./base\n---\n").validate()
    assert len(hub.requests) == 2


def test_card_shows_names_as_they_are_and_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "s3cret-name")
    (tmp_path / "base`x").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    own = ["dataset=own", f"dataset.path={tmp_path}/rows.jsonl", "dataset.eval_size=4", "model=hub"]
    config = compose(["method=lora", *own, f"model.model_name_or_path='{tmp_path}/base`x'"])
    name = "a\n# b <script>alert(1)</script> [x](y)\x1b[2J s3cret-name"
    text = model_card.write(Recorded(name=name), config, 'models:/a"b/1')
    assert r"# a # b \<script\>alert(1)\</script\> \[x\](y)\\x1b\[2J \*\*\*" in text.splitlines()
    assert "lora fine-tune of `` base`x ``, a local folder, made by qlora_exp." in text
    assert r"| base model | base\`x, a local folder |" in text
    assert "| data | rows.jsonl, a local file, 16 rows" in text
    assert str(tmp_path) not in text
    assert "base_model" not in head(text)
    assert r'qlora_exp.load("models:/a\"b/1")' in text
    assert dict(model_card.tags(config, {}))["dataset"] == "./rows.jsonl"


def test_card_names_all_sources_and_their_losses():
    sources = {"a": "databricks/databricks-dolly-15k", "b": "/home/me/rows.jsonl"}
    config = compose(["dataset=own", *(f"dataset.sources.{name}.path={path}" for name, path in sources.items())])
    recorded = Recorded()
    recorded.metrics.update({"before/source_loss/a": 2.0, "after/source_loss/a": 1.5})
    text = model_card.write(recorded, config, "runs:/x")
    assert head(text)["datasets"] == ["databricks/databricks-dolly-15k"]
    assert "| data | databricks/databricks-dolly-15k, rows.jsonl, a local file, 16 rows" in text
    assert "| loss, a | 2.0000 | 1.5000 |" in text
    assert "Data: databricks/databricks-dolly-15k: cc-by-sa-3.0; rows.jsonl:" in text
    assert "/home/me" not in text
    assert dict(model_card.tags(config, {}))["dataset"] == "databricks/databricks-dolly-15k, ./rows.jsonl"
