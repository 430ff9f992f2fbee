"""The kinds of faults: each injects one into a command, runs the command again, and says what was not survived."""

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from campaign.commands import RUN, difference, half_made, others, training
from campaign.processes import Ended, Kill
from campaign.servers import LIES, Gateway, Server
from campaign.world import Command, Recorded, World, read_store, train
from qlora_exp.sweeps.jobs import state

_PAGE = 4096
_PLACES = {
    "train": ("outputs", "mlruns", "."),
    "sweep": ("multirun", "mlruns", "."),
    "sync": ("mlruns",),
    "compare --out": ("report",),
    "register": ("mlruns",),
    "reproduce": ("outputs", "mlruns"),
}
"""Folders that get a small disk of their own, by command; of other commands the whole working folder."""
_LONGEST = (1, 1, 2, 5, 1000)
"""Numbers of requests in a row that get a lie."""


@dataclass(frozen=True)
class Fault:
    """An injected fault, and what of it was not survived."""

    kind: str
    command: str
    detail: str
    problem: str
    """Empty if it was survived."""


@dataclass(frozen=True)
class Calm:
    """How a command ends without faults."""

    result: Any
    seconds: float
    operations: int
    growth: dict[str, int]
    """Bytes that it adds to each place, in whole pages."""


class Campaign:
    """Faults in a world, chosen by a random number generator."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self._world, self._chance = world, chance
        self._calm: dict[str, Calm] = {}
        self._others = others()
        self._schedule = 0
        self._server: Server | None = None

    def _calmly(self, command: Command) -> Calm:
        key = " ".join(command.words)
        if key not in self._calm:
            self._world.reset(command.template)
            before = {place: _pages(self._world.folder / place) for place in _places(command)}
            ended = self._world.run(command.words)
            if ended.code != 0:
                raise RuntimeError(f"{key} failed without a fault: {ended.output}")
            growth = {place: _pages(self._world.folder / place) - size for place, size in before.items()}
            if command.then:
                self._world.run([*command.then])
            result = command.result(self._world)
            self._calm[key] = Calm(result, ended.seconds, ended.operations, growth)
        return self._calm[key]

    def _command(self) -> Command:
        """Choose a command: a run once in four times, with the next learning rate schedule."""
        if self._chance.random() < 0.25:
            self._schedule += 1
            return training(self._schedule - 1)
        return self._chance.choices(self._others, [1, 6, 6, 6, 6, 6, 6, 3])[0]  # a sweep takes long

    def _again(self, command: Command, calm: Calm) -> str:
        """Run a command again after its fault; return what is wrong then."""
        made = command.made(self._world)
        ended = self._world.run(command.words)
        if "another process is running" in ended.output:  # the jobs of a killed sweep have ten seconds to end
            ended = self._world.run(command.words)
        if ended.problem or (ended.code and not made):
            return f"again: {ended.problem or ended.last_line}"
        if command.then and (ended := self._world.run([*command.then])).code != 0:
            return f"{' '.join(command.then)}: {ended.problem or ended.output.strip()[-400:]}"
        if problem := difference(command.result(self._world), calm.result):
            return problem
        left = [] if made else self._world.leftovers()  # the next one that is not refused removes them
        return f"leftovers: {left[:3]}" if left else ""

    def prepare(self) -> None:
        """Make the templates of the world."""
        self._world.prepare()

    def kill(self) -> Fault | None:
        """Kill a command: at a random time, or just before a file operation; None if it had ended before."""
        command = self._command()
        calm = self._calmly(command)
        self._world.reset(command.template)
        kill = Kill(seconds=self._chance.uniform(0.01, calm.seconds))
        if self._chance.random() < 0.5:
            kill = Kill(operation=self._chance.randint(1, calm.operations))
        ended = self._world.run(command.words, kill)
        if ended.code != -signal.SIGKILL:
            return None
        made = command.made(self._world) and not command.then
        problem = half_made(command.result(self._world), calm.result) if made else ""
        return Fault("kill -9", command.name, str(kill), problem or self._again(command, calm))

    def disk(self) -> Fault | None:
        """Run a command on a disk that is too small, then enlarge it; None if the command got by."""
        command = self._command()
        calm = self._calmly(command)
        self._world.reset(command.template)
        place = self._chance.choice(_places(command))
        free = self._chance.randint(0, max(calm.growth[place] // _PAGE, 1)) * _PAGE
        self._world.limit_space(place, free)
        ended = self._world.run(command.words)
        if ended.code == 0:
            self._world.give_space()
            return None
        self._world.enlarge()
        problem = ended.problem or (self._failed_run(command, calm) if _has_failed(self._world) else "")
        if not problem and not _has_failed(self._world):
            problem = self._again(command, calm)
        self._world.give_space()
        return Fault("full disk", command.name, f"{free} bytes free in {place}: {ended.last_line}", problem)

    def _failed_run(self, command: Command, calm: Calm) -> str:
        """Check a run that ended as failed: MLflow gets all of it, and a run in another folder is as without faults."""
        if (ended := self._world.run([*command.then])).code != 0:
            return f"sync: {ended.output.strip()[-400:]}"
        runs = self._world.recorded()
        failed = {name: run for name, run in runs.items() if run.status == "FAILED"}
        lines = [message for message, _ in _messages(self._world.folder / RUN)]
        logged = {(key, m["step"]) for m in lines if m["op"] == "metrics" for key in m["values"]}
        for run in failed.values():
            if lost := {f"{key} at {step}" for key, step in logged if key.startswith("train/loss")} - set(run.points):
                return f"lost of a failed run: {sorted(lost)[:3]}"
        if len(failed) != 1:
            return f"{len(failed)} failed runs in MLflow, not 1"
        words = [word.replace(RUN, f"{RUN}-again") for word in command.words]
        moved = replace(command, words=words, result=lambda world: _without_failed(world.recorded()))
        return self._again(moved, calm)

    def damage(self) -> Fault:
        """Damage a file, then run a command that reads it."""
        what, template, pattern, words, check = self._chance.choice(_targets(self))
        self._prepare_killed()
        self._world.reset(template)
        file = self._chance.choice(sorted(path for path in self._world.folder.glob(pattern) if path.is_file()))
        how = self._chance.choice([*DAMAGES])
        content = file.read_bytes()
        file.write_bytes(DAMAGES[how](content, self._chance))
        ended = self._world.run(words)
        detail = f"{how} of {file.relative_to(self._world.folder)}: exit status {ended.code}, {ended.last_line}"
        return Fault(f"damaged {what}", words[0], detail, ended.problem or check(ended, file))

    def _prepare_killed(self) -> None:
        """Make the template of a run that was killed after its checkpoints of steps 2, 4 and 6."""
        if not self._world.has("killed"):
            self._world.reset("empty")
            words = training(0).words
            calm = self._calmly(training(0))
            for operation in range(calm.operations, 0, -calm.operations // 12):
                self._world.reset("empty")
                self._world.run(words, Kill(operation=operation))
                folder = self._world.folder / RUN
                if (folder / "checkpoints" / "checkpoint-6").is_dir() and not (folder / "model").is_dir():
                    break
            self._world.save("killed")

    def resumed(self, ended: Ended, _file: Path) -> str:
        """Check that a killed run, resumed over a damaged checkpoint, is as without faults."""
        if ended.code != 0:
            return f"exit status {ended.code}: {ended.last_line}"
        self._world.run(["sync", "outputs"])
        return difference(self._world.recorded(), self._calmly(training(0)).result)

    def refused_or_complete(self, ended: Ended, file: Path) -> str:
        """Check that what was refused names the folder, and that what was not refused is as without faults."""
        right = self._calmly(training(0)).result
        if ended.code == 0:
            synced = self._world.run(["sync", "outputs"])
            return synced.problem or ("" if synced.code else difference(self._world.recorded(), right))
        known = self._world.recorded()
        name = next(name for name in right if name.startswith("other/"))
        return _unnamed(ended, file) or known[name].difference(right[name])

    def others_sent(self, ended: Ended, file: Path) -> str:
        """Check that `sync` sent all other runs, and that a damaged run is named or complete."""
        self._calmly(self._others[1])
        right: dict[str, Recorded] = self._calmly(self._others[1]).result
        mine = self._world.recorded()
        seed = file.relative_to(self._world.folder / "outputs").parts[0].removeprefix("seed")
        doubled = sorted(set(mine) - set(right))
        if doubled:
            return f"doubled: {doubled}"
        for name, run in right.items():
            if name.endswith(f"s{seed}") and ended.code:
                continue
            if name not in mine:
                return f"lost: {name}"
            if problem := mine[name].difference(run):
                return f"{name}: {problem}"
        return _unnamed(ended, file) if ended.code else ""

    def ends(self, _ended: Ended, _file: Path) -> str:
        """Accept every end in time and without a traceback."""
        return ""

    def lie(self) -> Fault | None:
        """Let the gateway lie to a command; None if it sent no request that got a lie."""
        server, gateway = self._servers()
        name = self._chance.choice(["train", "sync", "sync", "sync", "register", "reproduce", "compare"])
        lie = self._chance.choice(LIES)
        words, then = _through(name, gateway.uri)
        right, count = self._honestly(name, words, then)
        self._reset_server(name)
        first = self._chance.randint(1, count)
        most = self._chance.choice(_LONGEST[:3] if lie == "hang" else _LONGEST)
        gateway.lie = lambda number: lie if first <= number < first + most else ""
        ended = self._world.run(words)
        lies = gateway.lies
        gateway.honest()
        if not lies:
            return None
        problem = ended.problem
        if not problem and not (name in ("train", "reproduce") and state(self._world.folder / RUN)[0] == "ok"):
            again = self._world.run(words)
            problem = again.problem or (again.last_line if again.code else "")
        for command in then:
            if not problem and (synced := self._world.run(command)).code != 0:
                problem = f"{command[0]}: {synced.output.strip()[-400:]}"
        problem = problem or difference(_of_server(server, self._world), right)
        detail = f"{lie} for {lies} requests from request {first} of {count} on: {ended.last_line}"
        return Fault("server that lies", name, detail, problem)

    def _servers(self) -> tuple[Server, Gateway]:
        if self._server is None:
            folder = self._world.folder.with_name("server")
            folder.mkdir()
            self._server = Server(folder)
            self._server.start()
            self._gateway = Gateway(self._server)
            self._right: dict[str, tuple[Any, int]] = {}
        return self._server, self._gateway

    def _reset_server(self, name: str) -> None:
        server, gateway = self._servers()
        server.forget()
        gateway.honest()
        self._world.reset("empty" if name == "train" else "runs")
        if name not in ("train", "sync"):
            self._world.run(["sync", "outputs", "--uri", gateway.uri])
            gateway.honest()

    def _honestly(self, name: str, words: list[str], then: list[list[str]]) -> tuple[Any, int]:
        server, gateway = self._servers()
        key = " ".join(words)
        if key not in self._right:
            self._reset_server(name)
            ended = self._world.run(words)
            if ended.code != 0:
                raise RuntimeError(f"{key} failed without a fault: {ended.output}")
            count = gateway.requests
            for command in then:
                self._world.run(command)
            self._right[key] = _of_server(server, self._world), count
        return self._right[key]

    def close(self) -> None:
        """End the server and unmount the disk."""
        self._world.give_space()
        if self._server is not None:
            self._server.kill()


def _places(command: Command) -> tuple[str, ...]:
    return _PLACES.get(command.name, (".",))


def _pages(folder: Path) -> int:
    return sum(-(-file.stat().st_size // _PAGE) * _PAGE for file in folder.rglob("*") if file.is_file())


def _has_failed(world: World) -> bool:
    outcome, last = state(world.folder / RUN)
    return bool(last) and outcome != "ok" and last.get("op") == "end"


def _messages(folder: Path) -> Any:
    from qlora_exp.tracking.journal import FILE, read

    return read(folder / FILE)


def _without_failed(runs: dict[str, Recorded]) -> dict[str, Recorded]:
    return {name.partition("#")[0]: run for name, run in runs.items() if run.status != "FAILED"}


def _unnamed(ended: Ended, file: Path) -> str:
    named = any(name in ended.output for name in (file.name, file.parent.name))
    return "" if named else f"the message names neither the file nor its folder: {ended.output.strip()[-300:]}"


def _through(name: str, uri: str) -> tuple[list[str], list[list[str]]]:
    """Return a command that uses a server, and those that complete it."""
    sync = ["sync", "outputs", "--uri", uri]
    match name:
        case "train":
            return [*training(0).words, f"tracking.uri={uri}"], [sync]
        case "sync":
            return sync, []
        case "register":
            return ["register", "outputs/seed1", "--name", "concrete", "--alias", "champion", "--uri", uri], []
        case "reproduce":
            return ["reproduce", "outputs/seed1", "--out", RUN, "--uri", uri], [sync]
    return ["compare", "--experiment", "recorded", "--uri", uri], []


def _of_server(server: Server, world: World) -> Any:
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(server.store)) as store:
        versions = list(store.execute("SELECT name, version FROM model_versions"))
    return {"versions": versions, "runs": read_store(server.store, world.folder)}


def _truncate(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(max(len(content), 1))]


def _flip(content: bytes, chance: random.Random) -> bytes:
    position = chance.randrange(max(len(content), 1))
    changed = bytearray(content or b"\0")
    changed[position] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _overwrite(filler: Callable[[int, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    def damage(content: bytes, chance: random.Random) -> bytes:
        size = chance.randint(1, 64)
        position = chance.randrange(max(len(content), 1))
        return content[:position] + filler(size, chance) + content[position + size :]

    return damage


def _garbage_line(content: bytes, chance: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    lines.insert(chance.randint(0, len(lines)), b'{"op": "met garbage\n')
    return b"".join(lines)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncation": _truncate,
    "bit flip": _flip,
    "NUL bytes": _overwrite(lambda size, _: bytes(size)),
    "garbage": _overwrite(lambda size, chance: chance.randbytes(size)),
    "garbage line": _garbage_line,
    "emptiness": lambda *_: b"",
}


def _targets(campaign: Campaign) -> list[tuple[str, str, str, list[str], Callable[[Ended, Path], str]]]:
    """Return what can be damaged: name, template, files, the command that reads them, and the check after it."""
    again, model = training(0).words, "outputs/seed1/model"
    other = train("later", "later")
    return [
        *[("checkpoint", "killed", f"{RUN}/checkpoints/*/*", again, campaign.resumed)] * 3,
        ("journal", "killed", f"{RUN}/journal.jsonl", again, campaign.refused_or_complete),
        ("journal", "unsent", "outputs/seed*/journal.jsonl", ["sync", "outputs"], campaign.others_sent),
        ("delivered.json", "killed", f"{RUN}/delivered.json", again, campaign.refused_or_complete),
        ("delivered.json", "runs", "outputs/seed*/delivered.json", ["sync", "outputs"], campaign.others_sent),
        ("record", "killed", f"{RUN}/*.[yt][ax][mt]*", again, campaign.refused_or_complete),
        ("adapter", "runs", f"{model}/*", ["merge", model, "--out", "merged"], campaign.ends),
        ("adapter", "runs", f"{model}/*", ["generate", model, "--prompt", "a"], campaign.ends),
        ("bundle", "runs", "bundle.zip", ["reproduce", "bundle.zip", "--check-only"], campaign.ends),
        ("store", "runs", "mlruns/mlflow.db", ["compare", "--experiment", "recorded"], campaign.ends),
        ("store", "runs", "mlruns/mlflow.db", ["sync", "outputs"], campaign.ends),
        ("store", "runs", "mlruns/mlflow.db", other, campaign.ends),
    ]
