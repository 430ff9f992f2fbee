from mlflow import MlflowClient
from sqlalchemy import create_engine, inspect

from qlora_exp.libraries.mlflow import create_tables, reopen


def test_a_store_with_these_tables_is_opened_as_it_is(tmp_path):
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    create_tables(address)
    engine = create_engine(address)
    tables = inspect(engine).get_table_names()
    assert {"runs", "experiments", "alembic_version"} <= {*tables}
    assert MlflowClient(address, registry_uri=address).create_experiment("new")
    assert inspect(engine).get_table_names() == tables
    engine.dispose()


def test_a_client_uses_a_store_that_was_created_again(tmp_path, make_store):
    mlflow = MlflowClient(make_store("store.db"))
    mlflow.create_experiment("old")
    (tmp_path / "store.db").unlink()
    make_store("store.db")
    reopen(mlflow)
    assert mlflow.create_experiment("new")
    assert sorted(one.name for one in mlflow.search_experiments()) == ["Default", "new"]
