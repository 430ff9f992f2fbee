"""An SQLite file is read without being changed, and anything but a store is named."""

import os
import shutil
import signal
import sqlite3
import tempfile
from pathlib import Path

import pytest

from qlora_exp.libraries.mlflow import create_tables
from qlora_exp.tracking.mlflow_store import client, finished_runs, reader
from qlora_exp.tracking.stores.sqlite_store import read_only_uri, sqlite_file
from qlora_exp.tracking.stores.uris import store_uri
from qlora_exp.utils.errors import TrackingError


def tree(folder: Path) -> dict[str, bytes]:
    """Give every file of a folder with its content."""
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////a/b.db", "/a/b.db"),
        ("sqlite:////a/b%20c.db?timeout=5", "/a/b c.db"),
        ("sqlite+pysqlite:////a/b.db", "/a/b.db"),
        (read_only_uri(Path("/a%20b/ü ?#;.db")), "/a%20b/ü ?#;.db"),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("http://host/sqlite:///x", None),
        ("postgresql://host/db", None),
        ("mlruns", None),
    ],
)
def test_file_of_a_store_is_read_from_its_uri(uri, path):
    assert sqlite_file(uri) == (path and Path(path))


@pytest.mark.parametrize("folder", ["plain", "a b", "My%20Project", "ü#;", "100%", "what?"])
def test_store_of_the_working_directory_is_next_to_it(folder, tmp_path, monkeypatch):
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    assert sqlite_file(store_uri(None)) == Path.cwd() / "mlruns" / "mlflow.db"
    assert sqlite_file(store_uri("sqlite:///sub/my.db")) == Path.cwd() / "sub" / "my.db"
    assert store_uri("sqlite:////a/b.db") == "sqlite:////a/b.db"
    if folder == "plain":
        assert store_uri(None) == f"sqlite:///{Path.cwd()}/mlruns/mlflow.db"


def test_reading_changes_nothing(make_store, tmp_path):
    uri = make_store("mlflow.db")
    client(uri).create_experiment("some")
    (tmp_path / "mlflow.db.lock").unlink()
    before = tree(tmp_path)
    assert [each.name for each in reader(uri).search_experiments()] == ["some", "Default"]
    assert finished_runs(uri, "some", ["0123456789abcdef"]) == {}
    assert tree(tmp_path) == before
    assert sorted(os.listdir()) == ["mlflow.db"]  # MLflow would make a folder of the part after sqlite:///


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_store_of_another_user_can_be_read(make_store):
    uri = make_store("mlflow.db")
    client(uri)
    reader(uri)  # imports what the other user may not
    with tempfile.TemporaryDirectory() as folder:
        file = Path(shutil.copy(sqlite_file(uri), folder))
        Path(folder).chmod(0o555)
        file.chmod(0o444)
        os.seteuid(65534)
        try:
            assert len(reader(f"sqlite:///{file}").search_experiments()) == 1
        finally:
            os.seteuid(0)


def foreign(file):
    with sqlite3.connect(file) as store:
        store.execute("CREATE TABLE customers (name)")


def with_tags(file):
    with sqlite3.connect(file) as store:
        store.execute("CREATE TABLE tags (name)")


def unfinished(file):
    create_tables(f"sqlite:///{file}")


def older(file):
    with sqlite3.connect(file) as store:
        store.execute("CREATE TABLE experiments (name)")
        store.execute("CREATE TABLE alembic_version (version_num)")
        store.execute("INSERT INTO alembic_version VALUES ('1a2b')")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (foreign, "is not an MLflow store: this database has tables of something else"),
        (with_tags, "is not an MLflow store: this database has tables of something else"),
        (Path.touch, "is not an MLflow store: this database is empty"),
        (lambda file: file.write_bytes(b"text " * 1000), "is not an MLflow store: file is not a database"),
        (Path.mkdir, "does not exist"),
        (unfinished, "has no experiment 0"),
        (older, "made by another version of MLflow .* is 1a2b.*mlflow db upgrade"),
    ],
)
def test_other_files_are_named_and_not_changed(make, problem, tmp_path):
    make(tmp_path / "app.db")
    before = tree(tmp_path)
    with pytest.raises(TrackingError, match=problem):
        reader(f"sqlite:///{tmp_path / 'app.db'}")
    assert tree(tmp_path) == before
    if make not in (Path.mkdir, older, unfinished):
        with pytest.raises(TrackingError, match=problem):
            client(f"sqlite:///{tmp_path / 'app.db'}")
        assert {file: text for file, text in tree(tmp_path).items() if not file.endswith(".lock")} == before


def test_store_of_a_killed_writer_can_be_read(make_store, tmp_path):
    uri = make_store("mlflow.db")
    client(uri)
    if not (child := os.fork()):
        store = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
        store.execute("PRAGMA cache_size=5")
        store.execute("BEGIN")
        store.execute("CREATE TABLE big (x)")
        store.executemany("INSERT INTO big VALUES (?)", [("x" * 1000,)] * 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "mlflow.db-journal").stat().st_size > 0
    assert len(reader(uri).search_experiments()) == 1
