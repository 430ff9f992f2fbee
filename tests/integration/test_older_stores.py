"""What the last version before the rooms wrote is still read: MLflow store, output folders, bundle."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import older_store
from helpers.older_store import KILLED_RUN, LORA_RUN, QLORA_RUN
from mlflow import MlflowClient
from support import exit_code

import qlora_exp
from qlora_exp.config.validate import from_dict


@pytest.fixture
def older_uri(tmp_path: Path) -> str:
    """Unpack the older store where the test works."""
    return older_store.unpack(tmp_path)


def test_older_sweep_is_compared(older_uri, tmp_path):
    assert exit_code("compare", "ranks", "--out", str(tmp_path / "table")) == 0
    (file,) = (tmp_path / "table").glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["label"] for row in rows] == [{"method.r": "2"}, {"method.r": "4"}]
    assert rows[1]["against_baseline"]["low"] > 0  # from the losses of every held-out row


@pytest.mark.parametrize("run", [LORA_RUN, "lora.zip"])
def test_only_the_code_differs_from_an_older_run(run: str, older_uri, capsys):
    assert exit_code("reproduce", run, "--check-only") == 0
    differences = [line for line in capsys.readouterr().out.splitlines() if line.startswith("differs")]
    causes = {line.split()[1].rstrip(":") for line in differences}
    assert "code" in causes
    why = "a new key changes run keys of older runs: see _EMPTY_IN_OLDER_RECORDS in config/values.py"
    assert not causes & {"config", "data", "model"}, f"{why} (docs/how_to/add_a_key.md)"


@pytest.mark.parametrize("source", ["outputs/lora", "outputs/qlora", LORA_RUN, QLORA_RUN])
def test_older_model_is_loaded(source: str, older_uri):
    model, tokenizer = qlora_exp.load(source, device="cpu")
    ids = tokenizer("3 + 1 =", return_tensors="pt")
    assert model(**ids).logits.isfinite().all()


def test_older_journals_are_synced_to_another_store(older_uri, mlflow_uri, capsys):
    assert exit_code("sync", "--uri", mlflow_uri) == 0
    assert "7 runs sent" in capsys.readouterr().out
    sent = MlflowClient(mlflow_uri).search_runs(
        [one.experiment_id for one in MlflowClient(mlflow_uri).search_experiments()], max_results=1000
    )
    losses = [
        run.data.metrics.get("after/loss") for run in sent if run.info.run_name == "llama-own-qlora-nf4_double-r2-s42"
    ]
    recorded = MlflowClient(older_uri).get_run(QLORA_RUN).data.metrics["after/loss"]
    assert losses == [recorded]


def test_older_interrupted_run_is_resumed(older_uri, tmp_path):
    folder = tmp_path / "outputs" / "killed"
    config = from_dict(yaml.safe_load((folder / "qlora_exp.yaml").read_text()))
    result = qlora_exp.train(config, folder)
    assert result.run_id == KILLED_RUN
    assert result.metrics["steps"] == 6
    assert MlflowClient(older_uri).get_run(KILLED_RUN).info.status == "FINISHED"
