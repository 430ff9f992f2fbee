"""What tests and fixtures share: the overrides of a quick run, and the command line."""

import logging
import signal
import subprocess
import sys
from typing import Any

import pytest

QUICK = [
    "device=cpu",
    "model=tiny_llama",
    "dataset.max_train_rows=16",
    "dataset.max_eval_rows=4",
    "training.max_steps=3",
    "training.per_device_train_batch_size=2",
    "training.eval_strategy=no",
    "unrelated=none",
    "evaluation.generate_rows=2",
    "evaluation.max_new_tokens=4",
    "tracking.plan=false",
]
"""A run of a few seconds."""


def exit_code(*words: str) -> int:
    """Call the command line in this process and give its exit code."""
    from qlora_exp.cli.main import main

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    if absl := sys.modules.get("absl.logging"):
        # Hydra closes all handlers when it configures logging, and absl's closes its stream: pytest's captured one.
        absl.get_absl_handler().python_handler.stream = sys.__stderr__
    try:
        with pytest.raises(SystemExit) as end:
            main(list(words))
    finally:  # Hydra configures logging for its process
        root.handlers[:] = handlers
        root.setLevel(level)
    return int(end.value.code or 0)


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Start the command line in a process of its own, and wait for it."""
    words = (sys.executable, "-m", "qlora_exp", *words)
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


def take_interrupts() -> None:
    """Let a child process take SIGINT, which a shell's background job ignores and its children with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
