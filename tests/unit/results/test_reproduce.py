import pytest
import yaml
from support import exit_code

from qlora_exp.config.hydra_compose import compose
from qlora_exp.results.reproduce import find_run, recorded_config
from qlora_exp.tracking.mlflow_store import client
from qlora_exp.tracking.stores.sqlite_store import sqlite_file
from qlora_exp.utils.errors import DataError, TrackingError


def recorded(mlflow, text: str) -> str:
    """A run that somebody else wrote."""
    experiment = mlflow.get_experiment_by_name("others")
    location = (sqlite_file(mlflow.tracking_uri).parent / "artifacts").as_uri()
    experiment_id = experiment.experiment_id if experiment else mlflow.create_experiment("others", location)
    run_id = mlflow.create_run(experiment_id, tags={"run_key": "e" * 16, "outcome": "ok"}).info.run_id
    mlflow.log_metric(run_id, "after/loss", 4.0)
    if text:
        mlflow.log_text(run_id, text, "qlora_exp.yaml")
    return run_id


def test_users_path_replaces_the_recorded_one(mlflow_uri, tmp_path):
    rows = tmp_path / "other" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    values = compose(["method=lora", "dataset=own", "dataset.path=rows.jsonl"]).model_dump(mode="json")
    values["dataset"]["path"] = "/home/author/rows.jsonl"
    values["tracking"]["uri"] = "http://evil.example"
    record = find_run(mlflow_uri, recorded(client(mlflow_uri), yaml.safe_dump(values)))
    config = recorded_config(record, {"dataset.path": str(rows)}, mlflow_uri)
    assert config.dataset.path == str(rows)
    assert config.tracking.uri == mlflow_uri
    with pytest.raises(DataError, match=r"dataset\.path: no file missing\.jsonl"):
        recorded_config(record, {"dataset.path": "missing.jsonl"}, mlflow_uri)


@pytest.mark.parametrize(
    "text",
    ["", "just text", "!!python/object/apply:os.system ['touch pwned']", "[1, 2", "a: &x [*x]", "model: 3"],
)
def test_broken_recorded_config_is_rejected_with_a_message(text: str, mlflow_uri, tmp_path, capsys):
    run_id = recorded(client(mlflow_uri), text)
    assert exit_code("reproduce", run_id, "--uri", mlflow_uri, "--check-only") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    assert not (tmp_path / "pwned").exists()


def test_unknown_run_is_not_reproduced(run_quick, mlflow_uri):
    with pytest.raises(TrackingError, match="no runs of"):
        find_run(mlflow_uri, "0123456789abcdef")
