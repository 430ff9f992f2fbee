import math
import sqlite3

from mlflow import MlflowClient
from sqlalchemy import create_engine, inspect

from qlora_exp.libraries.mlflow import create_tables, reopen, schema_version, stored_runs


def test_a_store_with_these_tables_is_opened_as_it_is(tmp_path):
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    create_tables(address)
    engine = create_engine(address)
    tables = inspect(engine).get_table_names()
    assert {"runs", "experiments", "alembic_version"} <= {*tables}
    assert MlflowClient(address, registry_uri=address).create_experiment("new")
    assert inspect(engine).get_table_names() == tables
    engine.dispose()


def test_schema_is_that_of_a_new_store(tmp_path):
    create_tables(f"sqlite:///{tmp_path / 'mlflow.db'}")
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        assert store.execute("SELECT version_num FROM alembic_version").fetchall() == [(schema_version(),)]


def test_stored_runs_are_those_that_the_client_gives(make_store, tmp_path):
    mlflow = MlflowClient(make_store("mlflow.db"))
    ids = [mlflow.create_experiment(name) for name in "ab"]
    for number, experiment in enumerate([*ids, *ids]):
        run = mlflow.create_run(
            experiment, number, {"key": f"value {number % 3}", "empty": ""}, f"run {number}"
        ).info.run_id
        mlflow.log_param(run, "param", "ü' \"")
        for step, value in enumerate((1.0, float("nan"), number / 3, -math.inf)[: number + 1]):
            mlflow.log_metric(run, "metric", value, step=step)
    mlflow.delete_run(run)
    for wanted, condition in (({}, ""), ({"key": None}, ""), ({"key": "value 1"}, "tags.key = 'value 1'")):
        for experiments in (ids, ids[:1], []):
            stored = {run.run_id: run for run in stored_runs(tmp_path / "mlflow.db", experiments, wanted)}
            runs = mlflow.search_runs(experiments, condition) if experiments else []
            assert stored.keys() == {run.info.run_id for run in runs}
            for run in runs:
                ours, info, data = stored[run.info.run_id], run.info, run.data
                assert (ours.name, ours.status, ours.start_time) == (info.run_name, info.status, info.start_time)
                assert (ours.experiment_id, ours.artifact_uri) == (info.experiment_id, info.artifact_uri)
                assert (ours.params, ours.tags, str(ours.metrics)) == (data.params, data.tags, str(data.metrics))


def test_a_client_uses_a_store_that_was_created_again(tmp_path, make_store):
    mlflow = MlflowClient(make_store("store.db"))
    mlflow.create_experiment("old")
    (tmp_path / "store.db").unlink()
    make_store("store.db")
    reopen(mlflow)
    assert mlflow.create_experiment("new")
    assert sorted(one.name for one in mlflow.search_experiments()) == ["Default", "new"]
