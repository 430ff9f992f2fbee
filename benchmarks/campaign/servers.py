"""A gateway in front of a real MLflow server that lies: it answers in its place, cuts answers, hangs, or answers with
an error after the work was done."""

import http.client
import json
import socket
import sqlite3
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

_STATUS = (400, 401, 403, 404, 429, 500, 502, 503)
LIES = (*map(str, _STATUS), "{}", "HTML", "cut", "no answer", "hang", "done, then 500", "done, then cut")
"""What the gateway does instead of passing on a request and its answer."""
_CODES = {400: "INVALID_PARAMETER_VALUE", 403: "PERMISSION_DENIED", 404: "RESOURCE_DOES_NOT_EXIST"}
_HTML = b"<html><body><h1>Down for maintenance</h1></body></html>"
HANG_SECONDS = 4.0


def answers(uri: str) -> bool:
    """Wait for a minute until an MLflow server answers; return whether it does."""
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=2).close()
        except OSError:
            time.sleep(0.2)
        else:
            return True
    return False


class Server:
    """An MLflow server that can be killed and started again.

    Attributes:
        store: its SQLite file.
        uri: its address.
    """

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port = free.getsockname()[1]
        self.store = folder / "server.db"
        self.uri = f"http://127.0.0.1:{port}"
        self._words = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.store}",
            "--artifacts-destination", str(folder / "artifacts"), "--workers", "1", "--port", str(port),
        ]  # fmt: skip

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._process = psutil.Popen(
            self._words, env={**psutil.Process().environ(), **environment}, stdout=-3, stderr=-3
        )
        if not answers(self.uri):
            raise TimeoutError("the MLflow server does not start")

    def kill(self) -> None:
        """Kill the server and its workers (-9)."""
        for process in [*self._process.children(recursive=True), self._process]:
            process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Delete all runs, experiments and models; much quicker than another server."""
        with closing(sqlite3.connect(self.store, timeout=60)) as store, store:
            tables = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for table in tables:
                if table not in ("alembic_version", "experiments", "workspaces") and not table.startswith("sqlite_"):
                    store.execute(f'DELETE FROM "{table}"')
            store.execute("DELETE FROM experiments WHERE experiment_id != 0")


class Gateway:
    """Passes requests on to a server, apart from those for which `lie` names one of `LIES`.

    Attributes:
        requests: number of requests so far.
        uri: its address.
    """

    def __init__(self, server: Server) -> None:
        self.lie: Callable[[int], str] = lambda _: ""
        self.requests = 0
        self.lies = 0
        self._server = server
        self._lock = threading.Lock()
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                gateway.answer(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_any  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def honest(self) -> None:
        """Pass on everything from now on, and count requests from 0."""
        self.lie, self.requests, self.lies = (lambda _: ""), 0, 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        with self._lock:
            self.requests += 1
            lie = self.lie(self.requests)
            self.lies += bool(lie)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if lie == "hang":
            time.sleep(HANG_SECONDS)
        if lie in ("hang", "no answer"):
            request.close_connection = True
        elif lie in ("{}", "HTML") or lie.isdigit():
            status = int(lie) if lie.isdigit() else 200
            code = _CODES.get(status, "INTERNAL_ERROR")
            text = json.dumps({"error_code": code, "message": "no"}).encode() if lie.isdigit() else b"{}"
            self._reply(request, status, "text/html" if lie == "HTML" else "application/json",
                        _HTML if lie == "HTML" else text)  # fmt: skip
        else:
            status, kind, text = self._forward(request, body)
            if lie == "done, then 500":
                status, kind, text = 500, "application/json", b'{"error_code": "INTERNAL_ERROR", "message": "no"}'
            elif lie == "done, then cut":
                request.close_connection = True
                return
            self._reply(request, status, kind, text, len(text) // 2 if lie == "cut" else None)

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, str, bytes]:
        headers = {key: value for key, value in request.headers.items() if key.lower() not in ("host", "connection")}
        headers["Accept-Encoding"] = "identity"
        with closing(http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=60)) as connection:
            connection.request(request.command, request.path, body, headers)
            response = connection.getresponse()
            return response.status, response.getheader("Content-Type", "application/json"), response.read()

    @staticmethod
    def _reply(request: BaseHTTPRequestHandler, status: int, kind: str, text: bytes, part: int | None = None) -> None:
        try:
            request.send_response(status)
            request.send_header("Content-Type", kind)
            request.send_header("Content-Length", str(len(text) + (part is not None and not text)))
            request.end_headers()
            request.wfile.write(text[:part])
            request.close_connection = part is not None
        except OSError:  # the client did not wait
            request.close_connection = True
