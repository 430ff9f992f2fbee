"""Where a result comes from: code version, library versions, hardware. Imports nothing heavy."""

import functools
import getpass
import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import psutil

from qlora_exp.utils.units import MIB

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "trl",
    "datasets",
    "accelerate",
    "tokenizers",
    "mlflow",
    "hydra-core",
    "evaluate",
)
_QUANTIZERS = {"torchao": "torchao", "quanto": "optimum-quanto", "gptq": "GPTQModel", "awq": "GPTQModel"}


@functools.cache
def libraries(quant_method: str = "bitsandbytes") -> dict[str, str]:
    """The installed version of each library that can change a result; one that is missing is left out.

    Args:
        quant_method: what stores the base; other quantizers change nothing.
    """
    found = {"python": platform.python_version(), "qlora_exp": version("qlora-exp")}
    for name in filter(None, (*LIBRARIES, _QUANTIZERS.get(quant_method))):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """Every installed package with its version; of one that is found twice, the one that Python imports.

    Copies that setuptools carries for itself are none: whether they are seen depends on who imported it before.
    """
    found: dict[str, str] = {}
    installed = [folder for folder in sys.path if Path(folder).name != "_vendor"]
    for one in distributions(path=installed):
        try:
            metadata: Any = one.metadata
            if metadata and (name := metadata.get("Name")):
                found.setdefault(str(name), one.version)
        except OSError:  # an interrupted pip leaves folders without metadata
            continue
    return dict(sorted(found.items(), key=lambda pair: pair[0].lower()))


def git() -> dict[str, str]:
    """`sha` and `dirty` of the checkout the package runs from; empty if it runs from an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return {}

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package.parent), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"sha": ask("rev-parse", "HEAD"), "dirty": str(bool(ask("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):  # no git here, or no commit yet
        return {}


def hardware() -> dict[str, Any]:
    """The machine: threads that torch uses, cores, memory in MiB."""
    import torch

    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_mib": psutil.virtual_memory().total // MIB,
        "cuda": torch.version.cuda,
    }


def command() -> str:
    """The command line of this process."""
    return " ".join(["qlora-exp" if "qlora" in Path(sys.argv[0]).name else sys.argv[0], *sys.argv[1:]])


def user() -> str:
    """Who runs this process; empty where the system has no name for them."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's number without a name; KeyError before Python 3.13
        return ""


def process() -> dict[str, str]:
    """What tells whether this very process still lives: host, boot and pid namespace (Linux), pid and start time."""
    me = psutil.Process()
    where = {"host": socket.gethostname(), "boot": _boot(), "namespace": _namespace()}
    return where | {"pid": str(me.pid), "started": str(me.create_time())}


def _boot() -> str:
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text("ascii").strip() if file.is_file() else ""


def _namespace() -> str:
    link = Path("/proc/self/ns/pid")
    return os.readlink(link) if link.is_symlink() else ""


def is_dead(recorded: dict[str, str]) -> bool:
    """Whether a recorded `process()` of this host is gone; False for another host or container: that is not known.

    Raises:
        ValueError: its number or its start is no number.
    """
    if recorded.get("host") != socket.gethostname() or not recorded.get("pid"):
        return False
    if recorded.get("boot") != _boot():
        return True
    if recorded.get("namespace") != _namespace():
        return False
    try:
        found = psutil.Process(int(recorded["pid"])).create_time()
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:  # another user's, where the system hides those
        return False
    return not abs(found - float(recorded["started"])) <= 60  # derived from the system clock, which may be set; or NaN
