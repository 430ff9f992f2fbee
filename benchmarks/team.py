"""Share an MLflow server in a team: two users on two machines, outages of every part; then read what the store has.

    nox -s team      # about five minutes on 2 cores; needs PostgreSQL's own programs (Debian: postgresql)

The server is MLflow's own with basic auth. PostgreSQL has its runs and its users, and artifacts go through it. The
machines are folders with a home and a host name of their own. Sweeps run while PostgreSQL or the server is away, while
a password is wrong, and while runs are deleted; a sweep is killed. Then every journal is compared with the tables of
PostgreSQL, the files of the server, and with what MLflow's client returns. Expected: nothing is missing, nothing is
there twice, and no user has ended a run of the other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run
from team_facts import KINDS, attempt, compare, expected, stored
from team_servers import PASSWORD, Postgres, Server

from qlora_exp.tracking.journal import CONFIG_FILE, FILE, PARENT_TAG

EXPERIMENT = "team"
NAMES = ("ann", "bob", "rita", "nick")
STEPS = 40
SECONDS_AWAY = 6.0
JOB = (
    "device=cpu", "model=tiny_llama", "method=lora", "dataset.max_train_rows=16", "dataset.max_eval_rows=4",
    f"training.max_steps={STEPS}", "training.per_device_train_batch_size=2", "training.eval_strategy=no",
    "training.save_strategy=steps", "training.save_steps=10", "unrelated=none", "evaluation.before=false",
    "evaluation.generate_rows=2", "evaluation.max_new_tokens=4", "tracking.plan=false",
)  # fmt: skip


@dataclass
class User:
    """A user at a machine of their own: a home, a working folder, a host name, and a password."""

    name: str
    host: str
    folder: Path
    environment: dict[str, str]

    def __post_init__(self) -> None:
        """Make the folders, and let Python say that the machine has this name."""
        self.work = self.folder / "work"
        for folder in (self.work, self.folder / "home", self.folder / "host"):
            folder.mkdir(parents=True)
        patch = f"import socket\nsocket.gethostname = lambda: {self.host!r}\n"
        (self.folder / "host" / "sitecustomize.py").write_text(patch, "utf-8")
        path = [str(self.folder / "host"), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        own = {"HOME": str(self.folder / "home"), "PYTHONPATH": os.pathsep.join(filter(None, path))}
        own |= {"XDG_STATE_HOME": "", "OMP_NUM_THREADS": "1", "LOGNAME": self.name}
        own |= {"MLFLOW_EXPERIMENT_NAME": EXPERIMENT}
        self.environment = os.environ | own | self.environment

    def start(self, *words: str, **changed: str) -> "Command":
        """Start `qlora-exp` with these arguments, in the working folder, with the environment changed."""
        return Command([sys.executable, "-m", "qlora_exp", *words], self.work, self.environment | changed)

    def sweep(self, name: str, *words: str, of: str | None = None) -> "Command":
        """Start a sweep over two seeds, one job after the other; the seeds are those of this user, or of another."""
        seed = zlib.crc32(f"{of or self.name} {name}".encode()) % 10**6
        return self.start(
            "train", "-m", *JOB, "sweep.rerun=failed", f"sweep.name={name}", f"seed={seed},{seed + 1}", *words
        )

    def journals(self, name: str = "*") -> list[Path]:
        """List the folders of all runs of the sweep `name`, or of all sweeps and of single runs too."""
        files = [*self.work.glob(f"multirun/{name}/**/{FILE}"), *self.work.glob(f"outputs/{name}/**/{FILE}")]
        return sorted(file.parent for file in files)

    def wait_for_points(self, name: str, command: "Command", count: int = 5) -> Path:
        """Wait until a job of the sweep has logged metrics `count` times; return the job's folder.

        Raises:
            SystemExit: the sweep ends before.
        """
        while command.process.poll() is None:
            for folder in self.journals(name):
                if (folder / FILE).read_text("utf-8").count('"op": "metrics"') >= count:
                    return folder
            time.sleep(0.05)
        sys.exit(f"{self.name}'s sweep {name} ended before anything could be taken away: {command.wait()}")


class Command:
    """A command that was started; what it prints is kept in a file."""

    def __init__(self, words: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115
        both = {"stdout": self._printed, "stderr": subprocess.STDOUT}
        self.process = psutil.Popen(words, cwd=folder, env=environment, **both)

    def wait(self) -> tuple[int, str]:
        """Wait for the end; return the exit status and what was printed."""
        code = self.process.wait()
        self._printed.seek(0)
        return code, self._printed.read().decode("utf-8", "replace")

    def kill(self) -> None:
        """Kill the process and all that it started (-9)."""
        for process in [*self.process.children(recursive=True), self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


class Table:
    """The table that is printed: a line for each fact, with what it should be if it is not that."""

    def __init__(self) -> None:
        self.wrong = 0
        self._begin = time.monotonic()

    def add(self, step: str, is_as_expected: bool, shown: object) -> None:
        """Print a line of the table."""
        self.wrong += not is_as_expected
        seconds = time.monotonic() - self._begin
        print(f"{'ok' if is_as_expected else 'WRONG':<6}{seconds:4.0f} s  {step:<52} {shown}", flush=True)

    def ends(self, step: str, command: Command, code: int = 0, says: str = "") -> str:
        """Add how a command ended: exit status, and for a failure its one line; return what it printed."""
        found, text = command.wait()
        lines = [line for line in text.splitlines() if line.startswith("error:")]
        is_clear = "Traceback" not in text and says in text and len(lines) == (code != 0)
        shown = " ".join(lines)[:300] if code and lines else f"exit {found}"
        self.add(
            step, found == code and is_clear, shown if found == code and is_clear else f"exit {found}: {text[-1500:]}"
        )
        return text


class Team:
    """Both servers, and users with their rights: ann and bob may write, rita may read, nick may nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.postgres = Postgres(folder / "postgres")
        self.server = Server(folder / "server", self.postgres)
        os.environ |= {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD % "admin"}
        os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
        from mlflow.server.auth.client import AuthServiceClient

        self.rights, self.admin = AuthServiceClient(self.server.uri), MlflowClient(self.server.uri)
        self.ann, self.bob, self.rita, self.nick = (self._user(name, f"machine-of-{name}") for name in NAMES)
        plain = {"MLFLOW_TRACKING_URI": self.postgres.uri("plain"), "PGPASSWORD": self.postgres.password}
        self.plain = User("ann", "machine-of-ann", folder / "plain", plain)

    def _user(self, name: str, host: str) -> User:
        self.rights.create_user(name, PASSWORD % name)
        login = {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": PASSWORD % name}
        return User(name, host, self._folder / name, login | {"MLFLOW_TRACKING_URI": self.server.uri})

    def runs(self) -> list[Run]:
        """List the runs of the experiment."""
        experiment = self.admin.get_experiment_by_name(EXPERIMENT)
        return list(self.admin.search_runs([experiment.experiment_id])) if experiment else []

    def stop(self) -> None:
        """Stop both servers."""
        self.server.kill()
        self.postgres.stop()

    def grant(self) -> None:
        """Give bob, rita and nick their rights to the experiment that ann's first sweep made."""
        experiment = self.admin.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        for name, right in (("bob", "EDIT"), ("rita", "READ"), ("nick", "DENY")):
            self.rights.grant_user_permission(name, "experiment", experiment.experiment_id, right)


def first(team: Team, table: Table) -> None:
    """Refuse a wrong password, then make the experiment with ann's sweep, while others may not yet write."""
    wrong = team.bob.start("train", *JOB, MLFLOW_TRACKING_PASSWORD="wrong")
    calm = team.ann.sweep("calm")
    table.ends("a wrong password: no run, one line", wrong, 1, "401")
    table.add("... and no folder is left", not list(team.bob.work.iterdir()), list(team.bob.work.rglob("*"))[:5])
    table.ends("ann's sweep makes the experiment", calm)
    table.ends("bob may only read it yet: his sweep is refused", team.bob.sweep("early"), 1, "403")
    table.add("... and no folder is left", not list(team.bob.work.iterdir()), list(team.bob.work.rglob("*"))[:5])
    team.grant()


def outage(team: Team, table: Table, what: str, begin: Callable[[], object], end: Callable[[], object]) -> None:
    """Run a sweep of each user, and take something away from both for a while; then let `sync` send what is missing."""
    sweeps = [(user, user.sweep(what)) for user in (team.ann, team.bob)]
    for user, command in sweeps:
        user.wait_for_points(what, command)
    begin()
    time.sleep(SECONDS_AWAY)
    end()
    for user, command in sweeps:
        text = table.ends(f"{user.name}'s sweep, {what} for {SECONDS_AWAY:.0f} s", command)
        table.add("... it was noticed", "MLflow did not accept" in text or "MLflow did not receive" in text, "")
    syncs = [(user, user.start("sync")) for user, _ in sweeps]
    for user, command in syncs:
        table.ends(f"{user.name}: sync", command)


def deleted(team: Team, table: Table) -> None:
    """Delete a run of ann's while it is trained, and give bob a wrong password; then restore both."""
    sweeps = team.ann.sweep("deleted"), team.bob.sweep("password")
    folder = team.ann.wait_for_points("deleted", sweeps[0])
    run_id = json.loads((folder / "delivered.json").read_text("utf-8"))[team.server.uri]["run_id"]
    team.admin.delete_run(run_id)
    team.bob.wait_for_points("password", sweeps[1])
    team.rights.update_user_password("bob", "another-password-42")
    table.ends("ann's sweep, of which a run is deleted meanwhile", sweeps[0])
    table.ends("ann: sync names the run to restore", team.ann.start("sync"), 1, f"restore --run-id {run_id}")
    table.ends("bob's sweep, while his password is another", sweeps[1])
    table.ends("bob: sync is refused", team.bob.start("sync"), 1, "401")
    team.rights.update_user_password("bob", PASSWORD % "bob")
    team.admin.restore_run(run_id)
    for command in [team.ann.start("sync"), team.bob.start("sync")]:
        table.ends("sync, when run and password are back", command)


def killed(team: Team, table: Table) -> None:
    """Kill ann's sweep; bob's run, with a model of more than 16 MB, must leave ann's runs alone; then resume it."""
    sweep = team.ann.sweep("killed")
    team.ann.wait_for_points("killed", sweep)
    sweep.kill()
    big = "model.random_config={hidden_size: 512, num_hidden_layers: 8}"
    words = [
        *JOB,
        "method=full",
        "tracking.log_full_model=true",
        big,
        "training.max_steps=3",
    ]
    table.ends("bob's run, with a model of more than 16 MB", team.bob.start("train", *words))
    states = Counter(run.info.status for run in team.runs())
    table.add("ann's sweep and job, killed (-9), are left alone", states["RUNNING"] == 2, dict(states))
    table.ends("ann: the same command resumes them", team.ann.sweep("killed"))


def used(team: Team, table: Table) -> None:
    """Use ann's runs: bob and rita compare, bob checks and registers; who may not gets one line."""
    record = next(run for run in team.runs() if run.data.tags.get("sweep") == "calm" and "run_key" in run.data.tags)
    run_id = record.info.run_id
    commands = {
        "bob: ann's calm sweep is done already, by her runs": (
            team.bob.sweep("calm", of="ann"),
            0,
            "done as MLflow run",
        ),
        "bob: compare ann's sweep": (team.bob.start("compare", "calm"), 0, "2 runs"),
        "rita, who may read: compare": (team.rita.start("compare", "calm"), 0, "2 runs"),
        "bob: reproduce --check-only": (
            team.bob.start("reproduce", run_id, "--check-only"),
            0,
            "nothing that was recorded differs",
        ),
        "bob: register ann's model": (team.bob.start("register", run_id, "--name", "shared"), 0, "shared"),
        "rita: register": (team.rita.start("register", run_id, "--name", "other"), 1, "403"),
        "rita: train": (team.rita.start("train", *JOB), 1, "403"),
        "nick: train": (team.nick.start("train", *JOB), 1, "403"),
        "nick, who may nothing: compare": (team.nick.start("compare", "calm"), 1, "calm"),
        "nick: compare --experiment": (team.nick.start("compare", "--experiment", EXPERIMENT), 1, ""),
    }
    for step, (command, code, says) in commands.items():
        table.ends(step, command, code, says)
    for user in (team.rita, team.nick):
        table.add(
            f"... and no folder of {user.name} is left", not list(user.work.iterdir()), list(user.work.rglob("*"))[:5]
        )


def plain(team: Team, table: Table) -> None:
    """Use PostgreSQL without a server: names that are too long for it, an outage, and another store's sweep."""
    name = "long" * 50
    words = [f"tracking.run_name={'name' * 150}", f"tracking.tags={{note: {'text' * 3000}}}"]
    sweep = team.plain.sweep(name, *words)
    team.plain.wait_for_points(name, sweep)
    team.postgres.stop()
    time.sleep(SECONDS_AWAY)
    team.postgres.start()
    table.ends("PostgreSQL alone: a sweep with long names, an outage", sweep)
    table.ends("... sync", team.plain.start("sync"))
    uri = team.plain.environment["MLFLOW_TRACKING_URI"]
    calm = team.ann.start("sync", "multirun/calm", "--uri", uri, PGPASSWORD=team.postgres.password)
    table.ends("... ann sends her sweep from the server there", calm)
    table.ends("... compare", team.plain.start("compare", "calm"), says="2 runs")


def check(team: Team, table: Table, database: str, artifacts: Path, folders: Sequence[Path]) -> None:
    """Compare all journals with the tables and files of a store; children must have their sweep as a parent."""
    journals = [(attempt(facts), facts) for facts in map(expected, folders)]
    counts = compare(journals, stored(team.postgres, database, artifacts))
    parents = f"SELECT count(*) FROM tags WHERE key = '{PARENT_TAG}' AND value NOT IN (SELECT run_uuid FROM runs)"
    counts["jobs outside of their sweep"] = team.postgres.sql(database, parents)[0][0]
    table.add(f"{database}: journals, and runs of the store", counts["journals"] == counts["runs"] > 0,
              f"{counts.pop('journals')}, {counts.pop('runs')}")  # fmt: skip
    for kind in KINDS:
        table.add(f"{database}: {kind} missing", not counts.pop(f"{kind} missing"), f"of {counts.pop(kind)}")
    for what, count in counts.items():
        table.add(f"{database}: {what}", not count, count)


def check_by_client(team: Team, table: Table) -> None:
    """Read every run as bob: points of a curve, and the config through the server's proxy."""
    runs = team.runs()
    user = team.bob.environment
    os.environ |= {name: user[name] for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")}
    jobs = [run for run in runs if "run_key" in run.data.tags]
    points = sum(len(team.admin.get_metric_history(run.info.run_id, "train/loss")) for run in jobs)
    wanted = sum(int(run.data.params["training.max_steps"]) for run in jobs)
    table.add("bob's client: points of train/loss", points == wanted, f"{points} of {wanted}")
    with tempfile.TemporaryDirectory() as folder:
        files = [team.admin.download_artifacts(run.info.run_id, CONFIG_FILE, folder) for run in jobs]
    table.add("bob's client: configs fetched through the server", len(files) == len(jobs), len(files))


def main() -> None:
    """Start the servers, take the steps, and read the store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    table = Table()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        folder.chmod(0o711)  # PostgreSQL runs as another user
        team = Team(folder)
        stack.callback(team.stop)
        described = team.postgres.sql("mlflow", "SHOW server_version")[0][0]
        print(f"PostgreSQL {described}, MLflow {version('mlflow')} with basic auth, psycopg {version('psycopg')}")
        first(team, table)
        outage(team, table, "postgresql-away", team.postgres.stop, team.postgres.start)
        outage(team, table, "server-away", team.server.kill, team.server.start)
        deleted(team, table)
        killed(team, table)
        used(team, table)
        plain(team, table)
        of_server = [folder for user in (team.ann, team.bob) for folder in user.journals()]
        check(team, table, "mlflow", team.server.artifacts, of_server)
        check(team, table, "plain", Path("/"), [*team.plain.journals(), *team.ann.journals("calm")])
        check_by_client(team, table)
    if table.wrong:
        sys.exit(f"{table.wrong} lines are wrong: see above")


if __name__ == "__main__":
    main()
