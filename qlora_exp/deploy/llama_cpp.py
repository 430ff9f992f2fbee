"""llama.cpp itself, in this process, where its package is installed: answers of a GGUF file, and what they cost.

Knows nothing of how such files are made. Checked with xllamacpp 2026.10.
"""

import importlib.util
from pathlib import Path
from typing import Any

from qlora_exp.training.evaluation import Answers, Generate


def installed() -> bool:
    """Whether llama.cpp is here."""
    return importlib.util.find_spec("xllamacpp") is not None


def load(file: Path, context: int, threads: int) -> Any:
    """llama.cpp's server with the model in `file`, on the CPU; it says nothing.

    Args:
        file: the GGUF file.
        context: tokens of prompt and answer together.
        threads: to compute with.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_gpu_layers = str(file), context, 0
    settings.cpuparams.n_threads, settings.n_parallel = threads, 1
    settings.warmup, settings.verbosity = False, 0
    server = xllamacpp.Server(settings)
    complete(server, [0], 1)  # one that is let go before its thread is at work waits for it for ever
    return server


def complete(server: Any, prompt: list[int] | str, max_new_tokens: int) -> dict[str, Any]:
    """The likeliest continuation, with its `timings`, as llama.cpp's server answers."""
    asked = {"prompt": prompt, "n_predict": max_new_tokens, "temperature": 0, "cache_prompt": False}
    found: dict[str, Any] = server.handle_completions(asked)
    return found


def generator(server: Any, max_new_tokens: int) -> Generate:
    """What answers prompts with the model, greedily, one after the other; of the steps of one it tells the mean."""

    def generate(prompts: list[list[int]]) -> Answers:
        found = [complete(server, prompt, max_new_tokens) for prompt in prompts]
        timings = [one["timings"] for one in found]
        steps = [one["predicted_per_token_ms"] / 1000 for one in timings for _ in range(one["predicted_n"] - 1)]
        return Answers(
            [one["choices"][0]["text"] for one in found],
            sum(one["predicted_n"] for one in timings),
            sum(one["prompt_ms"] + one["predicted_ms"] for one in timings) / 1000,
            timings[0]["prompt_ms"] / 1000,
            steps,
        )

    return generate
