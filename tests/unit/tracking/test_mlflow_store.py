"""A store is whole or not there."""

import pytest

from qlora_exp.tracking import mlflow_store
from qlora_exp.utils.errors import TrackingError


def test_a_store_whose_making_was_cut_off_is_made_anew(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    made = mlflow_store.create_tables

    def cut_off(database):
        made(database)
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow_store, "create_tables", cut_off)
    with pytest.raises(KeyboardInterrupt):
        mlflow_store.client(uri)
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.undo()
    assert [one.name for one in mlflow_store.client(uri).search_experiments()] == ["Default"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def test_a_file_that_is_no_store_is_told(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    with pytest.raises(TrackingError, match="does not answer or cannot be written"):
        mlflow_store.client(f"sqlite:///{tmp_path / 'mlflow.db'}")
