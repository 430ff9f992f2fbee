"""A store, output folders and a bundle that commit 2f57657 wrote, the last one before the package was split into rooms.

`tests/data/store_2f57657.tar.xz` holds a LoRA run, a QLoRA run, a sweep of two jobs, a diverged run, a killed run and a
bundle, all of a model of a few kB. Absolute paths in it are rewritten for the place where it is unpacked.
"""

import json
import sqlite3
import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).parents[1] / "data" / "store_2f57657.tar.xz"
RECORDED_ROOT = "/home/user/runs"
LORA_RUN, QLORA_RUN, KILLED_RUN = (
    "07cb333b8603474997a324d964c42ffa",
    "7085dc47b5cf4dbd840a640e5b297c4c",
    "3e648593abbf49eb852344dc810ec7f4",
)


def unpack(folder: Path) -> str:
    """Unpack the store below `folder` and return its tracking URI."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    database = folder / "mlruns" / "mlflow.db"
    with sqlite3.connect(database) as connection:
        for (table,) in connection.execute("select name from sqlite_master where type = 'table'").fetchall():
            for _, column, kind, *_ in connection.execute(f'pragma table_info("{table}")').fetchall():
                if kind.upper().startswith(("VARCHAR", "TEXT")):
                    replace = f'update "{table}" set "{column}" = replace("{column}", ?, ?) where "{column}" like ?'
                    connection.execute(replace, (RECORDED_ROOT, str(folder), f"%{RECORDED_ROOT}%"))
    connection.close()
    for state in folder.rglob("delivered.json"):  # offsets into the journal, whose lines get longer
        journal = state.with_name("journal.jsonl").read_bytes()
        stores = json.loads(state.read_text("utf-8"))
        for delivered in stores.values():
            sent = journal[: delivered["offset"]]
            delivered["offset"] = len(sent.replace(RECORDED_ROOT.encode(), str(folder).encode()))
        state.write_text(json.dumps(stores), "utf-8")
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".jsonl", ".yaml", ".csv", ".md") and RECORDED_ROOT.encode() in file.read_bytes():
            file.write_bytes(file.read_bytes().replace(RECORDED_ROOT.encode(), str(folder).encode()))
    return f"sqlite:///{database}"
