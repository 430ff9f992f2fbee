"""A run ends in MLflow although its main process died."""

import pytest
from helpers.tracking import leave_stale_run

from qlora_exp.config.hydra_compose import compose
from qlora_exp.distributed import watch
from qlora_exp.recipe.context import _ended_for_main
from qlora_exp.utils.errors import RankError


@pytest.mark.parametrize(("rank", "status"), [(0, "FAILED"), (2, "RUNNING")])
def test_process_ends_the_run_of_a_main_process_that_died(
    rank, status, mlflow_uri, mlflow_client, tmp_path, monkeypatch
):
    run_id = leave_stale_run(mlflow_uri, mlflow_client, tmp_path / "run")
    monkeypatch.setattr(watch, "cause", lambda _: RankError(rank, "it died", "error"))
    config = compose([f"tracking.uri={mlflow_uri}"])
    with pytest.raises(RuntimeError, match="closed"), _ended_for_main(config, tmp_path / "run", {}):
        raise RuntimeError("Connection closed by peer")
    assert mlflow_client.get_run(run_id).info.status == status
