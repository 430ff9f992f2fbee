from mlflow import MlflowClient
from sqlalchemy import create_engine, inspect

from qlora_exp.libraries.mlflow import create_tables


def test_a_store_with_these_tables_is_opened_as_it_is(tmp_path):
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    create_tables(address)
    engine = create_engine(address)
    tables = inspect(engine).get_table_names()
    assert {"runs", "experiments", "alembic_version"} <= {*tables}
    assert MlflowClient(address, registry_uri=address).create_experiment("new")
    assert inspect(engine).get_table_names() == tables
    engine.dispose()
