"""`doctor`: check what a run needs of this machine."""

import argparse

from qlora_exp.cli.parents import URI, Commands, add_command
from qlora_exp.utils.display import say
from qlora_exp.utils.errors import UserError
from qlora_exp.utils.secrets import redact


def add_parsers(commands: Commands) -> None:
    """Add `doctor`."""
    parser = add_command(commands, "doctor", doctor, parents=[URI])
    parser.add_argument("--json", action="store_true", help="print JSON, for a bug report")


def doctor(options: argparse.Namespace) -> None:
    """Check this machine: packages, GPUs, 4-bit products, memory, disks, hub, MLflow.

    Each line says ok, note (something optional is missing), warning or problem,
    and what to do. Exit status: 1 if there is a problem.

    examples:
      qlora-exp doctor
      qlora-exp doctor --json > doctor.json   attach it to a bug report
    """
    from qlora_exp.studies import doctor as checks

    found = []
    for finding in checks.findings(options.uri):
        found.append(finding)
        if not options.json:
            say(f"{finding.state:<8} {finding.name}: {finding.what}")
            if finding.remedy:
                say(f"{'':<8} -> {finding.remedy}")
    if options.json:
        print(redact(checks.as_json(found)))
    counts = {state: sum(finding.state == state for finding in found) for state in ("problem", "warning")}
    if counts["problem"]:
        raise UserError(f"problems: {counts['problem']}, warnings: {counts['warning']}")
    if not options.json:
        say(f"no problems, warnings: {counts['warning']}")
