"""Check what a run needs of this machine: Python, packages, CPU, GPUs, memory, disks, the hub, the MLflow store.

What imports torch runs in a process of its own (`torch_checks`): a broken library can end a process without a message.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement

from qlora_exp.environment import hub, provenance
from qlora_exp.environment.device import cpu_name
from qlora_exp.environment.memory import limits
from qlora_exp.utils.cache import cache_dir
from qlora_exp.utils.errors import UserError, type_and_first_line
from qlora_exp.utils.secrets import redact
from qlora_exp.utils.units import GIB

State = Literal["ok", "note", "warning", "problem"]

EXTRAS = {
    "adam-mini": "optimizer=adam_mini",
    "apollo": "optimizer=apollo_adamw",
    "deepspeed": "distributed=deepspeed_zero3",
    "completion": "shell completion",
    "dev": "the tests",
    "docs": "the documentation's site",
    "embedded": "the built-in model and rows",
    "galore": "optimizer=galore_adamw",
    "gguf": "export --to gguf",
    "joblib": "hydra/launcher=joblib",
    "llama-cpp": "deployment-gap with llama.cpp",
    "lm-eval": "evaluation.lm_eval_tasks",
    "optimi": "optimizers with Kahan summation",
    "optuna": "hydra/sweeper=optuna and tuned comparisons",
    "postgres": "tracking.uri=postgresql://...",
    "quantizers": "quantization=quanto_* and torchao_*",
    "ray": "hydra/launcher=ray",
    "schedule-free": "optimizer=schedule_free_adamw",
    "slurm": "hydra/launcher=slurm",
    "tasks": "dataset=reasoning_gym",
    "browser": "the tests of pages",
}
"""What each extra of this package is for: `pip install 'qlora-exp[NAME]'`."""

_FREE_GIB = 5.0
"""Less free space than this is warned of: a model of a billion parameters and its checkpoints."""
_SECONDS = 300.0
"""Seconds that the process which imports torch gets."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    state: State
    """`problem`: a run fails. `warning`: a run may fail, or is slow. `note`: something optional is not there."""
    what: str
    remedy: str = ""
    """What to do; empty if nothing is."""


Check = Callable[[], Iterator[Finding]]


def findings(uri: str | None) -> Iterator[Finding]:
    """Yield what each check finds; a check that fails itself is a problem, and the others go on.

    Args:
        uri: MLflow tracking URI; None: as a run without one would take.
    """
    checks: list[tuple[str, Check]] = [
        ("Python", _python),
        ("packages", _packages),
        ("extras", _extras),
        ("CPU", _cpu),
        ("memory", _memory),
        ("disk", _disks),
        ("torch", _torch),
        ("hub", _hub),
        ("MLflow", lambda: _mlflow(uri)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except UserError as error:
            yield Finding(name, "problem", str(error))
        except Exception as error:
            yield Finding(name, "problem", f"the check failed: {type_and_first_line(error)}")


def _python() -> Iterator[Finding]:
    package = provenance.git().get("sha", "")[:8]
    own = f"qlora_exp {metadata.version('qlora-exp')}{f', commit {package}' if package else ''}"
    yield Finding("qlora_exp", "ok", f"{own}, in {Path(__file__).parents[1]}")
    yield Finding("Python", "ok", f"{platform.python_version()} ({sys.executable}) on {platform.platform()}")
    if sys.platform != "linux":
        remedy = "Linux is what is tested; memory peaks and task scores are measured there only"
        yield Finding("system", "warning", f"{platform.system()} is not tested", remedy)


def _packages() -> Iterator[Finding]:
    installed = {name.lower().replace("_", "-"): version for name, version in provenance.environment().items()}
    wrong = []
    for line in metadata.requires("qlora-exp") or []:
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        version = installed.get(needed.name.lower().replace("_", "-"))
        if version is None:
            wrong.append(f"{needed.name} is missing (needs {needed.specifier})")
        elif not needed.specifier.contains(version, prereleases=True):
            wrong.append(f"{needed.name} {version} (needs {needed.specifier})")
    used = ", ".join(f"{name} {version}" for name, version in provenance.libraries().items() if name in _NAMED)
    yield Finding("packages", "ok", used)
    if wrong:
        remedy = "pip install --upgrade qlora-exp, or from a checkout: nox -s train"
        yield Finding("packages", "problem", "; ".join(wrong), remedy)


_NAMED = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "mlflow")


def _extras() -> Iterator[Finding]:
    installed = {name.lower().replace("_", "-") for name in provenance.environment()}
    there: list[str] = []
    missing: list[str] = []
    for extra in metadata.metadata("qlora-exp").get_all("Provides-Extra") or []:
        lines = map(Requirement, metadata.requires("qlora-exp") or [])
        needed = [line.name for line in lines if line.marker and _is_of_extra(line, extra)]
        complete = all(name.lower().replace("_", "-") in installed for name in needed)
        (there if complete else missing).append(extra)
    yield Finding("extras", "ok", f"installed: {', '.join(there) or 'none'}")
    if missing:
        what = "not installed: " + ", ".join(f"{extra} ({EXTRAS.get(extra, '?')})" for extra in missing)
        yield Finding("extras", "note", what, "pip install 'qlora-exp[NAME]' for those that you need")


def _is_of_extra(needed: Requirement, extra: str) -> bool:
    assert needed.marker
    return needed.marker.evaluate({"extra": extra}) and not needed.marker.evaluate({"extra": ""})


def _cpu() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _flags()
    fast = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    yield Finding("CPU", "ok", f"{cpu_name()}: {usable} cores usable{'; ' * bool(fast)}{', '.join(fast)}")
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdecimal() and int(threads) > usable:
        what = f"OMP_NUM_THREADS={threads} is more than {usable} cores: steps are slow"
        yield Finding("CPU", "warning", what, f"unset it, or set it to {usable}")
    if threads is not None and not threads.replace(",", "").isdecimal():
        yield Finding("CPU", "warning", f"OMP_NUM_THREADS={threads!r:.40} is no number", "unset it")


def _flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:\s*(.*)$", info.read_text("utf-8"), re.MULTILINE) if info.is_file() else None
    return set(found[1].split()) if found else set()


_LIMITS = {
    "group": "limited to {:.1f} GiB by its control group",
    "address space": "address space limited to {:.1f} GiB (ulimit -v)",
}


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    limited = [_LIMITS[kind].format(limit / GIB) for kind, limit in limits().items()]
    what = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    small = memory.available < 4 * GIB
    remedy = "the built-in model takes 4 GiB on a CPU: `qlora-exp plan` says what a run needs" if small else ""
    if limited and not small:
        remedy = "runs are planned within that limit; raise it if they do not fit"
    yield Finding("memory", "warning" if small or limited else "ok", "; ".join([what, *limited]), remedy)


def _disks() -> Iterator[Finding]:
    folders = {
        "working folder": (Path.cwd(), "start runs in another folder"),
        "cache": (cache_dir(), "set QLORA_EXP_CACHE to another folder"),
        "hub cache": (Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser(), "set HF_HOME"),
        "temporary files": (Path(tempfile.gettempdir()), "set TMPDIR to another folder"),
    }
    for name, (folder, remedy) in folders.items():
        existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        free = shutil.disk_usage(existing).free / GIB
        what = f"{folder}: {free:.1f} GiB free"
        try:
            with tempfile.TemporaryFile(dir=existing) as file:
                file.write(bytes(4096))
                file.flush()
        except OSError as error:
            yield Finding(name, "problem", f"{folder} cannot be written: {error.strerror}", remedy)
        else:
            low = free < _FREE_GIB
            yield Finding(name, "warning" if low else "ok", what, f"free space, or {remedy}" if low else "")


def _torch() -> Iterator[Finding]:
    """Yield the findings of `torch_checks`, which a process of its own prints as they come."""
    command = [sys.executable, "-m", "qlora_exp.studies.torch_checks"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        last = "torch"
        timer = threading.Timer(_SECONDS, process.kill)  # a driver may hang
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    finding = Finding(**json.loads(line))
                    last = finding.name
                    yield finding
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.stdout.close()
            process.wait()
        if code:
            errors.seek(0)
            said = errors.read().strip().splitlines()
            how = f"was ended by signal {-code}" if code < 0 else f"failed: {said[-1] if said else f'status {code}'}"
            yield Finding("torch", "problem", redact(f"after '{last}' the check {how}"), _REINSTALL)


_REINSTALL = "install torch and bitsandbytes again (pip install --force-reinstall), with versions for this driver"


def _hub() -> Iterator[Finding]:
    endpoint = redact(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if hub.is_offline():
        offline = os.environ["HF_HUB_OFFLINE"]
        yield Finding("hub", "note", f"HF_HUB_OFFLINE={offline}: only cached models and datasets are found")
        return
    if why := hub.unreachable():
        remedy = "without it use the built-in model and rows, files of yours, or what is in the hub cache"
        yield Finding("hub", "warning", f"{endpoint} cannot be reached ({why})", remedy)
        return
    yield Finding("hub", "ok", f"{endpoint} can be reached")
    from huggingface_hub import HfApi, get_token

    if (token := get_token()) is None:
        yield Finding("hub login", "note", "no token", "gated models need one: HF_TOKEN, or `hf auth login`")
        return
    try:
        who: dict[str, Any] = HfApi().whoami(token)
        yield Finding("hub login", "ok", f"logged in as {who.get('name', 'unknown')}")
    except Exception as error:  # of the network, or of the hub
        remedy = "make another one at https://huggingface.co/settings/tokens"
        yield Finding("hub login", "warning", f"the token is refused: {redact(type_and_first_line(error))}", remedy)


def _mlflow(uri: str | None) -> Iterator[Finding]:
    from qlora_exp.tracking.stores import uris

    address = uris.store_uri(uri)
    shown = redact(address)
    if not uris.exists(uri):
        yield Finding("MLflow", "ok", f"{shown}: the first run makes this store")
        return
    from qlora_exp.tracking import mlflow_store

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    experiments = mlflow_store.reader(uri).search_experiments()
    yield Finding("MLflow", "ok", f"{shown}: {len(experiments)} experiments can be read")


def is_installed(module: str) -> bool:
    """Return whether a module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def as_json(found: list[Finding]) -> str:
    """Return the findings as JSON, for a bug report."""
    return json.dumps([asdict(finding) for finding in found], indent=1)
