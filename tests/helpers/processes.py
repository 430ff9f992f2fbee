"""Processes that tests kill. They are forked from one that has the libraries already: loading them takes seconds."""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from qlora_exp.sweeps.launchers.local import warm


def start(call: Callable[..., None], *arguments: Any) -> Any:
    """Start `call`, a function of this module, in a process of its own."""
    context = warm(1)
    process = context.Process(target=_called, args=(forkserver._forkserver._forkserver_address, call, arguments))
    process.start()
    return process


def _called(server: str, call: Callable[..., None], arguments: Sequence[Any]) -> None:
    """Call a function where processes are forked from the fork server that this one is from, not from a new one."""
    gc.enable()
    forkserver._forkserver._forkserver_address = server
    forkserver._forkserver.ensure_running = forkserver.ensure_running = lambda: None
    call(*arguments)


def take_from_main(rank: int, folder: Path) -> None:
    """Be one of two processes that exchange tensors; write what this one has then."""
    import torch

    from qlora_exp.distributed import group

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in place.items()})
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    tensors = [torch.full((2, 3), rank + 1.0), torch.nn.Parameter(torch.full((1,), rank + 5.0))]
    group.take_from_main(tensors)
    torch.distributed.barrier()
    (folder / f"{rank}.txt").write_text(" ".join(str(float(tensor.sum())) for tensor in tensors))


def command(words: Sequence[str]) -> None:
    """Run the command line."""
    from qlora_exp.cli.main import main

    main(words)


def write_modules(file: Path) -> None:
    """Write the names of the loaded modules, whether CUDA is initialized, and the name of Ctrl-C's handler."""
    import torch

    facts = torch.cuda.is_initialized(), getattr(signal.getsignal(signal.SIGINT), "__name__", "")
    file.write_text(" ".join([*sys.modules, *map(str, facts)]))


def interpreter(
    words: Sequence[str], stdout: Path | str, stderr: Path | str, variables: Mapping[str, str] = {}
) -> None:
    """Do what Python does with these words and variables, and write what it prints to two files."""
    os.environ.update(variables)
    for stream, name in ((1, stdout), (2, stderr)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    is_module = words[0] == "-m"
    sys.argv = [*words[is_module:]]
    (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")


def python_in_forks(patched: pytest.MonkeyPatch, folder: Path) -> None:
    """Let `subprocess.run`, `psutil.Popen` and `spawn` fork Python's processes from one that has the libraries.

    What `subprocess.run` collects is written to `folder`.
    """
    run, context = subprocess.run, warm(1)

    def forked(words: Sequence[str], check: bool = False, **options: Any) -> subprocess.CompletedProcess[Any]:
        if words[0] != sys.executable:
            return run(words, check=check, **options)
        process = start(interpreter, words[1:], f"{folder}.stdout", f"{folder}.stderr")
        process.join()
        printed = [Path(f"{folder}.{name}").read_text() for name in ("stdout", "stderr")]
        done = subprocess.CompletedProcess(words, process.exitcode, *printed)
        if check:
            done.check_returncode()
        return done

    patched.setattr(subprocess, "run", forked)
    patched.setattr(psutil, "Popen", _Popen)
    patched.setattr(multiprocessing, "get_context", lambda _: context)


class _Popen:
    def __init__(self, words: Sequence[str], stdout: Any, stderr: Any) -> None:
        self._process = start(interpreter, words[1:], stdout.name, stderr.name)

    def poll(self) -> int | None:
        self._process.join(0)
        return self.returncode

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def memory_info(self) -> Any:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).memory_info()
        return SimpleNamespace(rss=0)  # it has just ended


def killed_after_its_start(words: Sequence[str], folder: Path) -> None:
    """Open a run, write its id to `FOLDER.id`, and die."""
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.tracking import lifecycle

    with lifecycle.start(compose(words), folder) as tracker:
        folder.with_suffix(".id").write_text(tracker.run_id)
        os.kill(os.getpid(), signal.SIGKILL)


def train(words: Sequence[str], folder: Path) -> None:
    """Train through the Python interface."""
    import qlora_exp

    qlora_exp.train(qlora_exp.compose(words), folder)


def killed_at_step(step: int, words: Sequence[str], folder: Path) -> None:
    """Train through the Python interface, and die at the end of a step."""
    from qlora_exp.training.watcher import Watcher

    watch = Watcher.on_step_end

    def on_step_end(self: Watcher, args: Any, state: Any, control: Any, **more: Any) -> None:
        watch(self, args, state, control, **more)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Watcher.on_step_end = on_step_end  # type: ignore[method-assign]
    train(words, folder)
