"""Wrap MLflow's private parts. Checked on MLflow 3.17.2."""

from mlflow import MlflowClient
from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry


def create_tables(database: str) -> None:
    """Create MLflow's tables in an empty database (`mlflow.store.db.utils._initialize_tables`).

    MLflow creates them itself when it opens a store, but this takes seconds, and MLflow cannot use a store whose
    creation was interrupted. `mlflow db upgrade` refuses an empty database.

    Args:
        database: an SQLAlchemy URL.
    """
    engine = create_sqlalchemy_engine_with_retry(database)
    try:
        _initialize_tables(engine)
    finally:
        engine.dispose()


def reopen(mlflow: MlflowClient) -> None:
    """Let a client of an SQLite store use a new file at the same path (`SqlAlchemyStore._dispose_engine` and others).

    MLflow keeps its connections to a file that was deleted, for as long as the process runs.
    """
    store = mlflow._tracking_client.store
    store._dispose_engine()
    store._initialize_store_state()
