import pytest

from qlora_exp.config.sections.sweep import SweepConfig
from qlora_exp.sweeps.jobs import Job
from qlora_exp.sweeps.sweep import Sweep
from qlora_exp.utils.errors import TrackingError


def test_sweep_that_mlflow_refuses_leaves_no_folder(make_config, mlflow_uri, mlflow_client, tmp_path, monkeypatch):
    mlflow_client.delete_experiment(mlflow_client.create_experiment("deleted, for a sweep"))
    monkeypatch.chdir(tmp_path)
    words = [f"tracking.uri={mlflow_uri}", "tracking.experiment_name='deleted, for a sweep'"]
    folder = tmp_path / "multirun" / "refused"
    job = Job({}, [], make_config("method=lora", *words), {}, "key", folder / "job")
    with (
        pytest.raises(TrackingError, match="was deleted"),
        Sweep(folder, SweepConfig(), lambda waiting, more: []) as sweep,
    ):
        sweep.run([job])
    assert not list(tmp_path.iterdir())
