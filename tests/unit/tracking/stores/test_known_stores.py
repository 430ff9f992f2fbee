"""A journal cannot choose the server that gets the user's token."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from helpers.tracking import start_run
from support import exit_code

from qlora_exp.tracking import messages
from qlora_exp.tracking.journal import FILE
from qlora_exp.tracking.mlflow_store import client
from qlora_exp.tracking.stores import known_stores


@pytest.fixture
def server():
    """Give the address of a server that counts requests and answers none."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(self.headers["Authorization"])
            self.send_error(500)

        do_GET = do_POST  # noqa: N815 - the base class looks for these names

        def log_message(self, *_):
            """Say nothing."""

    requests = []
    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", requests
        listening.shutdown()


@pytest.fixture(autouse=True)
def _own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(known_stores, "_named", set())


def received(folder, uri: str, mlflow_uri: str):
    """Make an output folder as somebody else would send it."""
    folder.parent.mkdir()
    with start_run(mlflow_uri, folder):
        pass
    first, *lines = (folder / FILE).read_bytes().splitlines(keepends=True)
    (folder / FILE).write_bytes(b"".join([messages.line(messages.parsed(first) | {"uri": uri}), *lines]))
    (folder / "delivered.json").unlink()
    return folder


def test_journal_chooses_neither_server_nor_file(server, mlflow_uri, tmp_path, monkeypatch, capsys):
    uri, requests = server
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "SECRET-TOKEN")
    received(tmp_path / "theirs" / "run", uri, mlflow_uri)
    assert exit_code("sync", "theirs") == 1
    assert f"--uri {uri}" in capsys.readouterr().err
    received(tmp_path / "more" / "run", f"sqlite:///{tmp_path}/new/mlflow.db", mlflow_uri)
    assert exit_code("sync", "more") == 1
    assert "where you have not sent runs before" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert requests == []
    assert exit_code("sync", "theirs", "--uri", uri) == 1  # the user says it; the server answers nothing
    assert requests[0] == "Bearer SECRET-TOKEN"


@pytest.mark.parametrize("how", ["trained", "environment", "--uri"])
def test_store_that_the_user_chose_is_used(how, mlflow_uri, make_store, tmp_path, monkeypatch):
    uri = make_store("mine.db")
    client(uri)
    folder = received(tmp_path / "outputs" / "run", uri, mlflow_uri)
    if how == "trained":
        with start_run(uri, tmp_path / "other"):
            pass
        assert known_stores.is_known(uri)
    elif how == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert exit_code("sync", *(["--uri", uri] if how == "--uri" else [])) == 0
    assert uri in json.loads((folder / "delivered.json").read_text())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert known_stores.is_known(uri) == (how != "environment")


def test_store_of_the_working_directory_is_created_and_one_that_was_moved_is_not(tmp_path, mlflow_uri, capsys):
    known_stores.remember(f"sqlite:///{tmp_path}/gone/mlflow.db")
    received(tmp_path / "outputs" / "run", f"sqlite:///{tmp_path}/gone/mlflow.db", mlflow_uri)
    assert exit_code("sync") == 1
    assert "is not there; name another store: --uri" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists()


def test_damaged_list_is_an_empty_one(tmp_path):
    known_stores.remember("http://a")
    known_stores._named.clear()  # as in another process
    assert known_stores.is_known("http://a")
    (file,) = (tmp_path / "state").rglob("stores.json")
    for text in ("", "{", "3", "[1, null]"):
        file.write_text(text)
        known_stores._named.clear()
        assert not known_stores.is_known("http://a")
        known_stores.remember("http://a")
        assert known_stores.is_known("http://a")
    file.unlink()
    file.parent.chmod(0o500)
    known_stores.remember("http://b")  # cannot be written, unless by root: a run starts all the same
    assert known_stores.is_known("http://b")
    file.parent.chmod(0o700)
