"""Describe where a result comes from: code version, library versions, hardware, process. Imports nothing slow."""

import functools
import getpass
import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import psutil

from qlora_exp.utils.secrets import redact
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
    """Return the installed version of each library that can change a result; leave out libraries not installed.

    Args:
        quant_method: the quantization method of the base; libraries of other methods cannot change the result.
    """
    versions = {"python": platform.python_version(), "qlora_exp": version("qlora-exp")}
    for name in filter(None, (*LIBRARIES, _QUANTIZERS.get(quant_method))):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def environment() -> dict[str, str]:
    """Return every installed package with its version; of a package installed twice, the version that Python imports.

    setuptools' own copies of packages are left out: whether Python sees them depends on earlier imports.
    """
    return dict(_installed(tuple(folder for folder in sys.path if Path(folder).name != "_vendor")))


@functools.cache
def _installed(folders: tuple[str, ...]) -> dict[str, str]:
    """Return each package in `folders` with its version, sorted; reading them takes a tenth of a second or more."""
    versions: dict[str, str] = {}
    for distribution in distributions(path=[*folders]):
        try:
            metadata: Any = distribution.metadata
        except OSError:  # an interrupted pip leaves folders without metadata
            continue
        if metadata and (name := metadata.get("Name")):
            versions.setdefault(str(name), str(metadata["Version"]))
    return dict(sorted(versions.items(), key=lambda pair: pair[0].lower()))


def git() -> dict[str, str]:
    """Return `sha` and `dirty` of the git checkout of this package; empty for an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return {}

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package.parent), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"sha": ask("rev-parse", "HEAD"), "dirty": str(bool(ask("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):  # git is not installed, or there is no commit yet
        return {}


def hardware() -> dict[str, Any]:
    """Return the machine's host name, platform, cores, torch threads, memory in MiB, and torch's CUDA version."""
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
    """Return the command line of this process, without secrets, as it can be typed again."""
    first, *words = sys.argv
    program = Path(first)
    if first.startswith("qlora-exp "):  # `train` passes the rest to Hydra
        words = [*first.split()[1:], *words]
    elif program.stem not in ("qlora-exp", "qlora_exp") and program.parts[-2:] != ("qlora_exp", "__main__.py"):
        return shlex.join(["python", redact(first), *map(redact, words)])
    return shlex.join(["qlora-exp", *map(redact, words)])


def user() -> str:
    """Return the name of the user who runs this process; empty if the system has no name for this user."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # in a container, a user number without a name; KeyError before Python 3.13
        return ""


def process() -> dict[str, str]:
    """Return what `is_dead` needs to identify this process: host, boot and pid namespace (Linux), pid, start time."""
    me = psutil.Process()
    where = {"host": socket.gethostname(), "boot": _boot(), "namespace": _namespace()}
    return where | {"pid": str(me.pid), "started": str(me.create_time())}


def _boot() -> str:
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text("ascii").strip() if file.is_file() else ""


def _namespace() -> str:
    link = Path("/proc/self/ns/pid")
    return os.readlink(link) if link.is_symlink() else ""


def is_of_this_boot(recorded: dict[str, str]) -> bool:
    """Return whether a recorded `process()` surely ran on this machine, since it was started.

    A host name is no proof: machines made of one image have the same.
    """
    return bool(_boot()) and recorded.get("boot") == _boot()


def is_dead(recorded: dict[str, str]) -> bool:
    """Return whether a recorded `process()` of this host has ended.

    Returns:
        False also for a process of another host or container, because nothing can be determined about it. True also for
        a process of another boot, which may be one of another machine with the same name: see `is_of_this_boot`.

    Raises:
        ValueError: the recorded pid or start time is not a number.
    """
    if recorded.get("host") != socket.gethostname() or not recorded.get("pid"):
        return False
    if recorded.get("boot") != _boot():
        return True
    if recorded.get("namespace") != _namespace():
        return False
    try:
        its = psutil.Process(int(recorded["pid"]))
        started, status = its.create_time(), its.status()
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:  # a process of another user, which this system hides
        return False
    if status == psutil.STATUS_ZOMBIE:  # nobody has waited for it yet; in containers often nobody ever does
        return True
    return not abs(started - float(recorded["started"])) <= 60  # the system clock may change; or NaN
