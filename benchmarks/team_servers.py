"""Start and stop the two servers of `team.py`: PostgreSQL, and MLflow's with basic auth."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from glob import glob
from pathlib import Path
from typing import Any

import psutil
from campaign.servers import answers

PASSWORD = "Pass-of-the-team-%s-7319"
"""Password of each user, of the server's administrator, and of PostgreSQL's user."""


def free_port() -> int:
    """Return a port of this machine that nobody uses now."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        return int(listening.getsockname()[1])


def programs(folders: Sequence[str] = ("/usr/lib/postgresql/*/bin",)) -> Path:
    """Return the folder of PostgreSQL's programs, on PATH or where Debian puts them.

    Raises:
        SystemExit: there are none.
    """
    on_path = shutil.which("pg_ctl")
    places = [Path(os.path.realpath(on_path)).parent] if on_path else []
    places += [Path(path) for folder in folders for path in sorted(glob(folder), reverse=True)]
    for place in places:
        if all((place / name).is_file() for name in ("initdb", "pg_ctl", "postgres")):
            return place
    sys.exit("no PostgreSQL: neither PATH nor /usr/lib/postgresql has its initdb and pg_ctl; apt install postgresql")


class Postgres:
    """A PostgreSQL server in a folder, which runs as another user if this process is root's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._port, self._bin = folder, free_port(), programs()
        self._as: dict[str, Any] = (
            {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}
        )
        self.password = PASSWORD % "postgres"
        folder.mkdir()
        (folder / "password").write_text(self.password, "utf-8")
        if self._as:
            shutil.chown(folder, "nobody")
            shutil.chown(folder / "password", "nobody")
        self._call("initdb", "--auth=scram-sha-256", "--username=team", f"--pwfile={folder / 'password'}", "-D", "data")
        self.start()
        for name in ("mlflow", "auth", "plain"):
            self.sql("postgres", f"CREATE DATABASE {name}")

    def _call(self, program: str, *words: str) -> None:
        done = subprocess.run(
            [self._bin / program, *words], cwd=self.folder, capture_output=True, text=True, check=False, **self._as
        )
        if done.returncode:
            sys.exit(f"{program} failed: {done.stdout[-500:]} {done.stderr[-500:]}")

    def uri(self, database: str) -> str:
        """Return the URI of a database, without the password."""
        return f"postgresql://team@127.0.0.1:{self._port}/{database}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        options = f"-p {self._port} -k {self.folder} -c listen_addresses=127.0.0.1"
        self._call("pg_ctl", "start", "-w", "-D", "data", "-l", "log", "-o", options)

    def stop(self) -> None:
        """Stop as in a crash: no session is ended, nothing is written."""
        self._call("pg_ctl", "stop", "-w", "-m", "immediate", "-D", "data")

    def sql(self, database: str, statement: str) -> list[tuple[Any, ...]]:
        """Execute a statement; return its rows."""
        import psycopg

        address = self.uri(database)
        with closing(psycopg.connect(address, password=self.password, autocommit=True)) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


class Server:
    """MLflow's server with basic auth, which can be killed and started again."""

    def __init__(self, folder: Path, postgres: Postgres) -> None:
        port = free_port()
        self.uri, self.artifacts, self._folder = f"http://127.0.0.1:{port}", folder / "artifacts", folder
        folder.mkdir()
        config = {"default_permission": "READ", "database_uri": postgres.uri("auth"), "admin_username": "admin"}
        config |= {"authorization_function": "mlflow.server.auth:authenticate_request_basic_auth"}
        config["auth_cache_ttl_seconds"] = "60"  # else checking the password is most of each request's time
        lines = "".join(f"{key} = {value}\n" for key, value in config.items())
        (folder / "auth.ini").write_text(f"[mlflow]\n{lines}", "utf-8")
        self._environment = os.environ | {
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD % "admin",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "team", "PGPASSWORD": postgres.password,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true",
        }  # fmt: skip
        self._words = [
            sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--port", str(port), "--workers", "1",
            "--backend-store-uri", postgres.uri("mlflow"), "--serve-artifacts",
            "--artifacts-destination", str(self.artifacts),
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        with (self._folder / "log").open("ab") as log:
            self._process = psutil.Popen(self._words, cwd=self._folder, env=self._environment, stdout=log, stderr=log)
        if not answers(self.uri):
            sys.exit(f"the MLflow server does not start: {(self._folder / 'log').read_text('utf-8')[-2000:]}")

    def kill(self) -> None:
        """Kill the server and its workers (-9)."""
        for process in [*self._process.children(recursive=True), self._process]:
            process.kill()
        self._process.wait()
