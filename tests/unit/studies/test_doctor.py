import builtins
import json
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from qlora_exp.environment import provenance
from qlora_exp.studies import doctor, torch_checks
from qlora_exp.utils.errors import TrackingError

ROOT = Path(__file__).parents[3]


def states(found) -> dict[str, str]:
    return {finding.name: finding.state for finding in found}


@pytest.fixture
def _no_torch(monkeypatch):
    monkeypatch.setattr(doctor, "_torch", lambda: iter(()))
    monkeypatch.setattr(doctor.hub, "unreachable", lambda: "no network")


def test_every_extra_has_a_purpose():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert {*declared} == {*doctor.EXTRAS}


@pytest.mark.usefixtures("_no_torch")
def test_a_check_that_fails_is_a_problem_and_the_others_go_on(monkeypatch):
    def broken():
        raise RuntimeError("no such thing")
        yield

    monkeypatch.setattr(doctor, "_packages", broken)
    monkeypatch.setattr(doctor, "_mlflow", lambda uri: (_ for _ in ()).throw(TrackingError(f"locked: {uri}")))
    found = {finding.name: finding for finding in doctor.findings("sqlite:///x.db")}
    assert found["packages"].state == "problem"
    assert "no such thing" in found["packages"].what
    assert found["MLflow"].what == "locked: sqlite:///x.db"
    assert {"Python", "CPU", "memory", "cache", "hub"} <= {*found}


@pytest.mark.usefixtures("_no_torch")
def test_nothing_is_written_into_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = {finding.name: finding for finding in doctor.findings(None)}
    assert "the first run makes this store" in found["MLflow"].what
    assert [*tmp_path.iterdir()] == []


def test_packages_of_other_versions_are_named(monkeypatch):
    installed = provenance.environment() | {"trl": "1.2.0"}
    installed.pop("peft")
    monkeypatch.setattr(provenance, "environment", lambda: installed)
    problem = next(finding for finding in doctor._packages() if finding.state == "problem")
    assert "trl 1.2.0 (needs" in problem.what
    assert "peft is missing" in problem.what


def test_installed_packages_fit():
    assert [finding.state for finding in doctor._packages()] == ["ok"]


def test_extras_that_are_not_complete_are_listed(monkeypatch):
    installed = provenance.environment()
    installed.pop("optuna", None)
    monkeypatch.setattr(provenance, "environment", lambda: installed)
    there, missing = doctor._extras()
    assert "optuna" not in there.what
    assert "optuna (hydra/sweeper=optuna and tuned comparisons)" in missing.what
    assert missing.state == "note"


@pytest.mark.parametrize(("threads", "state"), [("1", "ok"), ("100000", "warning"), ("many", "warning")])
def test_number_of_threads_is_checked(threads, state, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert [*doctor._cpu()][-1].state == state


def test_little_memory_is_a_warning(monkeypatch):
    memory = psutil.virtual_memory()._replace(available=2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    (found,) = doctor._memory()
    assert (found.state, found.what.split()[0]) == ("warning", "1.0")
    assert "qlora-exp plan" in found.remedy


def test_folder_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path / "cache"))
    real = doctor.tempfile.TemporaryFile

    def refusing(*words, dir=None, **named):
        if Path(dir) == tmp_path:
            raise OSError(30, "Read-only file system")
        return real(*words, dir=dir, **named)

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refusing)
    cache = next(finding for finding in doctor._disks() if finding.name == "cache")
    assert cache.state == "problem"
    assert cache.what.endswith("cannot be written: Read-only file system")
    assert "QLORA_EXP_CACHE" in cache.remedy


def test_full_disk_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    assert {*states(doctor._disks()).values()} == {"warning"}


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os; os.kill(os.getpid(), 11)", "was ended by signal 11"),
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
    ],
)
def test_process_that_dies_while_importing_torch_is_a_problem(code, says, monkeypatch):
    real = doctor.subprocess.Popen
    first = json.dumps({"name": "NVIDIA driver", "state": "ok", "what": "580.1"})
    program = f"print('{first}', flush=True); {code}"
    monkeypatch.setattr(doctor.subprocess, "Popen", lambda command, **named: real([command[0], "-c", program], **named))
    driver, problem = doctor._torch()
    assert driver.name == "NVIDIA driver"
    assert problem.state == "problem"
    assert "after 'NVIDIA driver'" in problem.what
    assert says in problem.what


def test_offline_hub_is_not_asked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (found,) = doctor._hub()
    assert found.state == "note"


def test_token_is_never_shown(monkeypatch):
    import huggingface_hub

    token = "hf_" + "a1B2c3D4" * 5
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(doctor.hub, "unreachable", lambda: "")
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self, token: {"name": "ada"})
    assert [*doctor._hub()][-1].what == "logged in as ada"

    def refused(self, token):
        raise OSError(f"401 for Bearer {token}")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", refused)
    login = [*doctor._hub()][-1]
    assert login.state == "warning"
    assert token not in login.what + login.remedy


def fake_torch(available: bool, cuda: str | None = "13.0", capability=(8, 0), free=20, total=24):
    gpu = SimpleNamespace(
        is_available=lambda: available,
        device_count=lambda: 1 if available else 0,
        mem_get_info=lambda index: (free * 2**30, total * 2**30),
        get_device_capability=lambda index: capability,
        get_device_name=lambda index: "GPU X",
    )
    mps = SimpleNamespace(is_available=lambda: False)
    return SimpleNamespace(cuda=gpu, version=SimpleNamespace(cuda=cuda), backends=SimpleNamespace(mps=mps))


@pytest.mark.parametrize(
    ("torch", "by_driver", "state", "says"),
    [
        (fake_torch(available=False), 0, "note", "runs take the CPU"),
        (fake_torch(available=False, cuda=None), 2, "problem", "2 NVIDIA GPUs, but torch is built for CPUs only"),
        (fake_torch(available=False), 2, "problem", "torch cannot use the 2 NVIDIA GPUs"),
        (fake_torch(available=True), 1, "ok", "20.0 of 24.0 GiB free, compute capability 8.0, bfloat16"),
        (fake_torch(available=True, capability=(7, 5)), 1, "ok", "runs compute in float16"),
        (fake_torch(available=True, free=2), 1, "warning", "2.0 of 24.0 GiB free"),
    ],
)
def test_gpus_are_described(torch, by_driver, state, says, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (found,) = torch_checks._gpus(torch, by_driver)
    assert found.state == state
    assert says in found.what


def test_hidden_gpus_are_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (found,) = torch_checks._gpus(fake_torch(available=False), 1)
    assert found.what == "CUDA_VISIBLE_DEVICES hides all GPUs"


def test_product_with_4_bits_is_checked(monkeypatch):
    import bitsandbytes
    import torch

    assert [finding.state for finding in torch_checks._four_bits(torch)] == ["ok"]
    real = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *words: real(*words) * 1.01)
    (found,) = torch_checks._four_bits(torch)
    assert found.state == "problem"
    assert "WRONG" in found.what


def test_bitsandbytes_that_cannot_be_imported_is_a_problem(monkeypatch):
    real = builtins.__import__

    def broken(name, *words):
        if name == "bitsandbytes":
            raise OSError("libcudart.so: version mismatch")
        return real(name, *words)

    monkeypatch.setattr(builtins, "__import__", broken)
    (found,) = torch_checks._four_bits(fake_torch(available=False))
    assert found.state == "problem"
    assert "version mismatch" in found.what


def test_findings_of_torch_come_from_its_process():
    found = [*doctor._torch()]
    assert states(found)["torch"] == "ok"
    assert states(found)["bitsandbytes on cpu"] == "ok"
    assert metadata.version("torch").split("+")[0] in next(each.what for each in found if each.name == "torch")
