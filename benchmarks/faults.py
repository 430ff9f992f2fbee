"""Inject faults of every kind into every command, at random, many times; then count what was lost.

    nox -s faults                               # about half an hour on 2 cores
    nox -s faults -- --faults 20 --kinds disk   # twenty full disks

Kinds: `kill` kills a command (-9) at a random time or just before one of its file operations; `disk` lets its disk run
full (needs root, for `mount`); `damage` truncates or changes a file that it reads; `lie` puts a gateway before the
MLflow server, which answers with errors, cut answers or nothing. After each fault the same command runs again.
Expected: it ends well, with the same result as without the fault, bit for bit; each command ends in time and without
a traceback; each step's metrics are in MLflow exactly once, and each run once.

`--kills` kills jobs of sweeps with all learning rate schedules, and the sweeps; `--outages` kills the MLflow server
under them. A sweep is started again until all its jobs are done. Expected: no finished job runs twice.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from campaign.kinds import Campaign, Fault
from campaign.sweeps import Size, kills_and_outages
from campaign.world import World

KINDS = ("kill", "disk", "damage", "lie")


def inject(scratch: Path, count: int, minutes: float, kinds: list[str], seed: int) -> list[Fault]:
    """Inject this many faults, or as many as fit into this time, the kinds in turn, and print each."""
    campaign = Campaign(World(scratch), random.Random(seed))
    faults: list[Fault] = []
    tried, begin = 0, time.monotonic()
    try:
        campaign.prepare()
        while len(faults) < count and time.monotonic() - begin < 60 * minutes:
            kind = kinds[tried % len(kinds)]
            tried += 1
            if (fault := getattr(campaign, kind)()) is not None:
                faults.append(fault)
                verdict = f"NOT SURVIVED: {fault.problem}" if fault.problem else "survived"
                print(f"{len(faults)} {fault.kind}, {fault.command}: {fault.detail}\n    {verdict}", flush=True)
    finally:
        campaign.close()
    return faults


def table(faults: list[Fault]) -> str:
    """Return the table of the faults, in Markdown."""
    tries = Counter((fault.kind, fault.command) for fault in faults)
    survived = Counter((fault.kind, fault.command) for fault in faults if not fault.problem)
    lines = [f"| {kind} | {command} | {count} | {survived[kind, command]} |"
             for (kind, command), count in sorted(tries.items())]  # fmt: skip
    total = f"| all | | {len(faults)} | {survived.total()} |"
    return "\n".join(["| fault | command | tries | survived |", "|---|---|---|---|", *lines, total])


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="number of faults of commands; 0: skip them")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further fault after this time")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"their kinds; default: {','.join(KINDS)}")
    parser.add_argument("--kills", type=int, default=0, help="number of kills of sweeps and jobs")
    parser.add_argument("--outages", type=int, default=0, help="number of server outages")
    parser.add_argument("--seed", type=int, default=0, help="random seed of kinds, times and targets")
    parser.add_argument("--jobs", type=int, default=6, help="jobs of each sweep, for --kills and --outages")
    parser.add_argument("--steps", type=int, default=60, help="steps of each of these jobs")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds: unknown: {', '.join(sorted(unknown))}")
    faults: list[Fault] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        os.environ |= {
            "QLORA_EXP_CACHE": str(scratch / "cache"), "XDG_STATE_HOME": str(scratch / "state"),
            "HF_HUB_OFFLINE": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
        }  # fmt: skip
        if options.faults:
            faults = inject(scratch, options.faults, options.minutes, kinds, options.seed)
        lost = kills_and_outages(
            scratch, options.kills, options.outages, options.seed, Size(options.jobs, options.steps)
        )
    if faults:
        libraries = ", ".join(f"{name} {version(name)}" for name in ("qlora-exp", "torch", "transformers", "mlflow"))
        print(f"\n{time.strftime('%Y-%m-%d')}, seed {options.seed}; {libraries}\n{table(faults)}")
    if lost or any(fault.problem for fault in faults):
        sys.exit("something was lost, doubled or stuck: see above")


if __name__ == "__main__":
    main()
