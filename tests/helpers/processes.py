"""Processes that tests kill. They are forked from one that has the libraries already: loading them takes seconds."""

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


def command(words: Sequence[str]) -> None:
    """Run the command line."""
    from qlora_exp.cli.main import main

    main(words)


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
