import os
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url
from support import QUICK, exit_code

from qlora_exp.config.hydra_compose import compose
from qlora_exp.recipe.inputs import check_config
from qlora_exp.tracking.stores import uris
from qlora_exp.tracking.stores.sqlite_store import sqlite_file
from qlora_exp.utils.errors import ConfigError, TrackingError


@pytest.mark.parametrize("name", ["a b", "My%20Project", "100%", "a?b", "a#b", "a@b:c;d", "it's", "ü+&=", "%3F"])
def test_default_store_is_in_any_working_folder(name: str, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    uri = uris.store_uri(None)
    assert sqlite_file(uri) == tmp_path / name / "mlruns" / "mlflow.db"
    assert make_url(uri).database == str(tmp_path / name / "mlruns" / "mlflow.db")
    assert uris.store_uri(uri) == uri
    relative = uris.store_uri("sqlite:///sub/my.db")
    assert sqlite_file(relative) == tmp_path / name / "sub" / "my.db"


def test_relative_sqlite_uri_belongs_to_the_working_folder(tmp_path):
    assert uris.store_uri("sqlite:///sub/my.db") == f"sqlite:///{tmp_path}/sub/my.db"
    assert uris.store_uri("sqlite+pysqlite:///my.db?timeout=5") == f"sqlite+pysqlite:///{tmp_path}/my.db?timeout=5"
    assert uris.store_uri("sqlite:////abs/my.db") == "sqlite:////abs/my.db"
    assert uris.store_uri("http://host:5000/x") == "http://host:5000/x"
    assert sqlite_file("postgresql://u@h/db") is None
    assert sqlite_file("sqlite-is-a-folder") is None


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///file:x.db?uri=true"])
def test_sqlite_uri_without_a_file_is_rejected(uri: str):
    with pytest.raises(ConfigError, match="names no file"):
        uris.store_uri(uri)


def test_key_comes_before_mlflows_variables_and_these_before_the_defaults(tmp_path, monkeypatch):
    default = compose([])
    assert uris.resolved(default).tracking.uri is None
    assert uris.resolved(default).tracking.experiment_name == "qlora_exp"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///theirs.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    assert uris.resolved(default).tracking.uri == f"sqlite:///{tmp_path}/theirs.db"
    assert uris.resolved(default).tracking.experiment_name == "theirs"
    own = uris.resolved(compose(["tracking.uri=http://mine", "tracking.experiment_name=qlora_exp"])).tracking
    assert (own.uri, own.experiment_name) == ("http://mine", "qlora_exp")
    assert compose(["tracking=server"]).tracking.uri == "sqlite:///theirs.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    with pytest.raises(ConfigError, match=r"tracking.uri: must be given"):
        compose(["tracking=server"])


def test_secrets_in_uri_and_experiment_are_rejected(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "my-token-1")
    with pytest.raises(ConfigError, match=r"^tracking.uri: 'token' in it .* files; .*MLFLOW_TRACKING_TOKEN"):
        uris.store_uri("https://host?token=x")
    with pytest.raises(ConfigError, match=r"tracking.experiment_name: contains a secret"):
        uris.experiment_name("of my-token-1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/db")
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI: a password in it .*PGPASSWORD") as refused:
        uris.store_uri(None)
    assert "me:secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "package"),
    [
        ("postgresql://host/db", "'qlora-exp[postgres]'"),
        ("postgresql+psycopg2://host/db", "psycopg2-binary"),
        ("mysql://host/db", "mysqlclient"),
        ("mysql+pymysql://host/db", "pymysql"),
    ],
)
def test_missing_database_driver_is_named(uri: str, package: str, monkeypatch):
    for module in ("psycopg", "psycopg2", "MySQLdb", "pymysql"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"tracking.uri: .* needs the database driver ") as refused:
        uris.check_driver(uri)
    assert str(refused.value).endswith(f": pip install {package}")
    for other in ("sqlite:///x.db", "http://host", "databricks", "file:///x", "foo://bar"):
        uris.check_driver(other)


def test_missing_driver_is_found_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    uri = "tracking.uri=postgresql://host/db"
    for words in (
        ["train", *QUICK, uri],
        ["train", "-m", *QUICK, uri, "seed=1,2"],
        ["compare", "--uri", "postgresql://host/db"],
        ["ui", "--uri", "postgresql://host/db", "--port", "5999"],
        ["sync", "--uri", "postgresql://host/db", "."],
    ):
        code = exit_code(*words)
        error = capsys.readouterr().err
        if words[0] == "sync":  # there is nothing to send
            assert code == 0
            continue
        assert (code, error.count("\n")) == (1, 1), error
        assert "pip install 'qlora-exp[postgres]'" in error
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("{0}/folder", "is a folder, in which MLflow keeps no runs any more: use sqlite:///{0}/folder/mlflow.db"),
        ("file://{0}/folder", "use sqlite:///{0}/folder/mlflow.db .*MLFLOW_ALLOW_FILE_STORE=true still allows"),
        ("{0}/not_there", "is a folder, in which"),
        ("sqlite:///{0}/folder", "is a folder; name the database's file, such as sqlite:///{0}/folder/mlflow.db"),
        ("sqlite:///{0}/folder/text", "is no SQLite database"),
    ],
)
def test_store_that_cannot_be_one_is_refused_before_rows_are_read(uri: str, message: str, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "text").write_text("no database")
    monkeypatch.setattr("qlora_exp.data.rows.load_rows", None)
    config = compose([f"tracking.uri={uri.format(tmp_path)}"])
    with pytest.raises(ConfigError, match=rf"^tracking\.uri: .*{message.format(tmp_path)}"):
        check_config(config)
    if "sqlite" not in uri:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        check_config(config)


@pytest.mark.parametrize("uri", ["http://h", "databricks", "databricks://me", "sqlite:///new.db", "sqlite:///empty.db"])
def test_stores_that_only_mlflow_can_judge_are_left_to_it(uri: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.db").touch()  # another process is making it
    uris.check_files(uris.store_uri(uri))


def test_variable_in_use_is_named(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///none.db")
    assert exit_code("compare") == 1
    said, error = capsys.readouterr().err.splitlines()
    assert said == "MLflow: sqlite:///none.db (MLFLOW_TRACKING_URI)"
    assert error.startswith(f"error: no runs yet: {Path.cwd()}/none.db does not exist")
    assert exit_code("compare", "--uri", "sqlite:///other.db") == 1
    assert capsys.readouterr().err.startswith(f"error: no runs yet: {Path.cwd()}/other.db")


@pytest.mark.slow
def test_store_and_experiment_of_mlflows_variables_reach_runs_and_jobs(tmp_path, monkeypatch, make_store, capfd):
    """In a folder whose name has a meaning in URIs, and with `hydra.job.chdir`, which changes the working folder."""
    folder = tmp_path / "My%20 a?b#c"
    folder.mkdir()
    monkeypatch.chdir(folder)
    quick = [*QUICK, "method=lora", "evaluation=loss_only", "tracking.log_adapter=false", "hydra.job.chdir=true"]
    assert exit_code("train", *quick) == 0
    assert (folder / "mlruns" / "mlflow.db").is_file()
    assert exit_code("compare", "--experiment", "qlora_exp") == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub/my.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    capfd.readouterr()
    assert exit_code("train", "-m", *quick, "seed=1") == 0
    assert "MLflow: sqlite:///" in capfd.readouterr().out
    assert exit_code("compare", "--experiment", "theirs") == 0
    assert sorted(file.name for file in folder.iterdir()) == ["mlruns", "multirun", "outputs", "sub"]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert exit_code("compare", "--experiment", "theirs") == 1
    (config,) = folder.rglob("multirun/*/*/qlora_exp.yaml")
    assert "experiment_name: theirs" in config.read_text()
    assert not {"mlruns", "sub"} & {*os.listdir(config.parent)}


@pytest.fixture
def answers(request):
    """Start a server on this machine that answers every connection with these bytes; its address."""

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                connection.recv(1000)
                connection.sendall(request.param)
                connection.close()

    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    listening.close()


@pytest.mark.parametrize(
    "answers",
    [b"HTTP/1.0 200 OK\r\n\r\nOK", b"HTTP/1.0 404 Not Found\r\n\r\n", b"SSH-2.0-other\r\n", b""],
    indirect=True,
    ids=["mlflow", "proxy", "other", "nothing"],
)
def test_whatever_answers_is_left_to_mlflow(answers: str):
    uris.check_answers(answers)


@pytest.mark.parametrize(("in_environment", "named"), [(True, "MLFLOW_TRACKING_URI"), (False, "tracking.uri")])
def test_a_server_that_is_away_is_refused_with_a_way_on(in_environment: bool, named: str, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address if in_environment else "http://other.example")
    says = f"^{named}: nothing answers at .* tracking=local, and later .*--uri {address}"
    with pytest.raises(TrackingError, match=says):
        uris.check_answers(None if in_environment else address)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:port", "http://localhost:80a/x"])
def test_an_address_without_a_number_as_its_port_is_refused(uri: str):
    with pytest.raises(ConfigError, match="tracking.uri: .* is no address"):
        uris.store_uri(uri)


@pytest.mark.parametrize("uri", ["sqlite:///a.db", "http://a b"])
def test_what_is_no_address_of_a_server_is_not_asked(uri: str):
    uris.check_answers(uri)
