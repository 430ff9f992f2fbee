"""A card says what was recorded, and of what it does not know that it does not."""

import re
from dataclasses import dataclass, field

import pytest
import yaml

from qlora_exp.config.hydra_compose import compose, conf_dir
from qlora_exp.deploy import model_card


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
    return yaml.safe_load(text.split("---")[1])


def test_card_begins_with_hub_metadata():
    config = compose(["method=qlora", "method.r=8"])
    text = model_card.write(Recorded(), config, "models:/x@champion")
    assert head(text) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "peft",
        "license": "apache-2.0",
        "tags": ["qlora_exp", "qlora"],
    }
    assert "r=8" in text
    assert "| code | 0123456789ab |" in text
    assert 'qlora_exp.load("models:/x@champion")' in text
    assert "cc-by-4.0 (attribution: Zaragoza AB)" in text


def test_losses_have_intervals_over_rows():
    kept = {"evaluation/before_losses.jsonl": rows(3, 4, 5), "evaluation/after_losses.jsonl": rows(2, 3.1, 3.9)}
    text = model_card.write(Recorded(losses=kept), compose(["method=lora"]), "x")
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


def test_card_shows_names_as_they_are_and_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "s3cret-name")
    (tmp_path / "base`x").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    own = ["dataset=own", f"dataset.path={tmp_path}/rows.jsonl", "dataset.eval_size=4", "model=hub"]
    config = compose(["method=lora", *own, f"model.model_name_or_path='{tmp_path}/base`x'"])
    name = "a\n# b <script>alert(1)</script> [x](y)\x1b[2J s3cret-name"
    text = model_card.write(Recorded(name=name), config, 'models:/a"b/1')
    assert r"# a # b \<script\>alert(1)\</script\> \[x\](y)\\x1b\[2J \*\*\*" in text.splitlines()
    assert "lora fine-tune of `` ./base`x ``, made by qlora_exp." in text
    assert r"| base model | ./base\`x |" in text
    assert "| data | ./rows.jsonl, 16 rows" in text
    assert str(tmp_path) not in text
    assert "base_model" not in head(text)
    assert r'qlora_exp.load("models:/a\"b/1")' in text
    assert dict(model_card.tags(config))["dataset"] == "./rows.jsonl"
