"""Say for `team.py` what runs must consist of, by their journals, and what PostgreSQL and the artifact folder have."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from team_servers import Postgres

from qlora_exp.tracking.journal import FILE, PARENT_TAG, read
from qlora_exp.tracking.limits import fit_message
from qlora_exp.tracking.tracker import LOG_FILE

KINDS = ("status", "params", "tags", "points", "datasets", "artifacts", "models")
"""Of what a run consists."""
Facts = dict[str, set[tuple[str, ...]]]
"""What a run consists of, by kind."""


def expected(folder: Path) -> Facts:
    """Return what a store must have of the run in `folder`, from its journal and its files."""
    facts, tags = defaultdict[str, set[tuple[str, ...]]](set), dict[str, str]()
    for message in (fit_message(message) for message, _ in read(folder / FILE)):
        match message:
            case {"op": "start" | "resume", "tags": values} | {"op": "tags", "values": values}:
                tags |= values
            case {"op": "params", "values": values}:
                facts["params"] |= set(values.items())
            case {"op": "metrics", "values": values, "step": step, "timestamp": when}:
                facts["points"] |= {(key, str(step), str(when), repr(float(each))) for key, each in values.items()}
            case {"op": "dataset", "name": name, "digest": digest}:
                facts["datasets"].add((name, digest))
            case {"op": "file", "path": path}:
                facts["artifacts"].add((path, fingerprint(folder / path)))
            case {"op": "model", "name": name, "folder": place, "files": files}:
                facts["models"] |= {(name, file, fingerprint(folder / place / file)) for file in files}
            case {"op": "end", "status": status}:
                facts["status"] = {(status,)}
    facts["tags"] = {(key, value) for key, value in tags.items() if key != PARENT_TAG}
    return facts


def fingerprint(file: Path) -> str:
    """Return a digest of a file; of a log, which grows after it was sent, whether it has anything."""
    if file.name == LOG_FILE:
        return str(file.stat().st_size > 0)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def stored(postgres: Postgres, database: str, artifacts: Path) -> list[tuple[str, Facts]]:
    """Read all active runs from MLflow's tables and its artifacts from the disk: the tag `attempt`, and the facts."""
    runs = postgres.sql(database, "SELECT run_uuid, status, artifact_uri FROM runs WHERE lifecycle_stage = 'active'")
    facts: dict[str, Facts] = {run: defaultdict(set) for run, *_ in runs}

    def add(kind: str, statement: str) -> None:
        for run, *values in postgres.sql(database, statement):
            if run in facts:
                facts[run][kind].add(tuple(map(str, values)))

    def add_files(kind: str, run: str, place: str, *names: str) -> None:
        root = artifacts / place.removeprefix("mlflow-artifacts:/").removeprefix("file://")
        for file in root.rglob("*"):
            if file.is_file():
                facts[run][kind].add((*names, str(file.relative_to(root)), fingerprint(file)))

    for run, status, place in runs:
        facts[run]["status"].add((status,))
        add_files("artifacts", run, place)
    add("params", "SELECT run_uuid, key, value FROM params")
    add("tags", "SELECT run_uuid, key, value FROM tags")
    add("points", "SELECT run_uuid, key, step, timestamp, value FROM metrics")
    add("datasets", "SELECT destination_id, name, digest FROM inputs JOIN datasets ON dataset_uuid = source_id")
    models = "SELECT source_run_id, name, artifact_location FROM logged_models JOIN inputs ON destination_id = model_id"
    for run, name, place in postgres.sql(database, f"{models} WHERE destination_type = 'MODEL_OUTPUT' AND status = 2"):
        add_files("models", run, place, name)
    return [(attempt(each), each) for each in facts.values()]


def attempt(facts: Facts) -> str:
    """Return the tag with which every run begins, and which no other run has."""
    return next((value for key, value in facts["tags"] if key == "attempt"), "")


def compare(journals: Sequence[tuple[str, Facts]], runs: Sequence[tuple[str, Facts]]) -> dict[str, int]:
    """Count what runs of a store lack of journals, and what they have more; each is an `attempt` with its facts."""
    by_attempt, wanted = dict(runs), dict(journals)
    counts = Counter[str]({"journals": len(journals), "runs": len(runs)})
    counts["runs doubled"] = len(runs) - len(by_attempt)
    counts["runs of nobody"] = len(by_attempt.keys() - wanted.keys())
    counts["runs missing"] = len(wanted.keys() - by_attempt.keys())
    for name, facts in journals:
        of_store = by_attempt.get(name, {})
        counts["runs not FINISHED"] += of_store.get("status") != {("FINISHED",)}
        for kind in KINDS:
            counts[kind] += len(facts.get(kind, ()))
            counts[f"{kind} missing"] += len(facts.get(kind, set()) - of_store.get(kind, set()))
        counts["points too many"] += len(of_store.get("points", set()) - facts.get("points", set()))
    return dict(counts)
