"""Run llama.cpp in this process, if its package is installed: answer prompts with a GGUF file and time the answers.

Does not write such files. Checked with xllamacpp 2026.10.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_exp.training.evaluation import Answers, Generate


def installed() -> bool:
    """Return whether the package of llama.cpp is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


def load(file: Path, context: int, threads: int) -> Any:
    """Start llama.cpp's server with the model in `file`, on the CPU and without log output.

    Args:
        file: the GGUF file.
        context: largest number of tokens of prompt and answer together.
        threads: number of threads to compute with.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_gpu_layers = str(file), context, 0
    settings.cpuparams.n_threads, settings.n_parallel = threads, 1
    settings.warmup, settings.verbosity = False, 0
    server = xllamacpp.Server(settings)
    complete(server, [0], 1)  # a server released before its thread has started waits for it forever
    return server


def complete(server: Any, prompt: list[int] | str, max_new_tokens: int, stops: Sequence[str] = ()) -> dict[str, Any]:
    """Return the most likely continuation, with its `timings`, as llama.cpp's server returns it.

    Args:
        server: a server of `load`.
        prompt: token ids, or text.
        max_new_tokens: greatest number of new tokens.
        stops: texts that end the continuation, besides the tokens that a GGUF file names; they are left out of it.
    """
    request = {"prompt": prompt, "n_predict": max_new_tokens, "temperature": 0, "cache_prompt": False, "stop": [*stops]}
    response: dict[str, Any] = server.handle_completions(request)
    return response


def generator(server: Any, max_new_tokens: int, stops: Sequence[str] = ()) -> Generate:
    """Return a function that answers prompts greedily, one after the other.

    llama.cpp reports only the mean time per token of an answer, so all steps of an answer get this time.
    """

    def generate(prompts: list[list[int]]) -> Answers:
        responses = [complete(server, prompt, max_new_tokens, stops) for prompt in prompts]
        timings = [response["timings"] for response in responses]
        steps = [
            timing["predicted_per_token_ms"] / 1000 for timing in timings for _ in range(timing["predicted_n"] - 1)
        ]
        return Answers(
            [response["choices"][0]["text"] for response in responses],
            sum(timing["predicted_n"] for timing in timings),
            sum(timing["prompt_ms"] + timing["predicted_ms"] for timing in timings) / 1000,
            timings[0]["prompt_ms"] / 1000,
            steps,
        )

    return generate
