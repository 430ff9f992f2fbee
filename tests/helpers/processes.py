"""Processes that tests kill. They are forked from one that has the libraries already: loading them takes seconds."""

import gc
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def start(call: Callable[..., None], *arguments: Any) -> Any:
    """Start `call`, a function of this module, in a process of its own."""
    from qlora_exp.sweeps.launchers.local import warm

    process = warm(1).Process(target=call, args=(*arguments,))
    process.start()
    return process


def command(words: Sequence[str], folder: Path | None = None) -> None:
    """Run the command line; with a folder, there, and write what it prints to `FOLDER.stdout` and `FOLDER.stderr`."""
    from qlora_exp.cli.main import main

    gc.enable()
    if folder is not None:
        os.chdir(folder)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    main(words)


def finished_command(words: Sequence[str], folder: Path) -> tuple[int, str, str]:
    """Run the command line in a folder; give its exit code and what it wrote to stdout and stderr."""
    process = start(command, words, folder)
    process.join()
    return process.exitcode, *(Path(f"{folder}.{name}").read_text() for name in ("stdout", "stderr"))


def killed_after_its_start(words: Sequence[str], folder: Path) -> None:
    """Open a run, write its id to `FOLDER.id`, and die."""
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.tracking import lifecycle

    with lifecycle.start(compose(words), folder) as tracker:
        folder.with_suffix(".id").write_text(tracker.run_id)
        os.kill(os.getpid(), signal.SIGKILL)


def killed_at_step(step: int, words: Sequence[str], folder: Path) -> None:
    """Train through the Python interface, and die at the end of a step."""
    import qlora_exp
    from qlora_exp.training.trainer import Watcher

    watch = Watcher.on_step_end

    def on_step_end(self: Watcher, args: Any, state: Any, control: Any, **more: Any) -> None:
        watch(self, args, state, control, **more)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Watcher.on_step_end = on_step_end  # type: ignore[method-assign]
    qlora_exp.train(qlora_exp.compose(words), folder)
