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


def load(file: Path, context: int, threads: int, exact: bool = False) -> Any:
    """Start llama.cpp's server with the model in `file`, on the CPU and without log output.

    Args:
        file: the GGUF file.
        context: largest number of tokens of prompt and answer together.
        threads: number of threads to compute with.
        exact: keep keys and values in 32 bits, in which its outputs can be compared with those of transformers.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_gpu_layers = str(file), context, 0
    settings.cpuparams.n_threads, settings.n_parallel = threads, 1
    settings.warmup, settings.verbosity = False, 0
    if exact:
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
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


def log_probabilities(server: Any, prompt: list[int], tokens: int) -> dict[int, float]:
    """Return the log probability of each token after a prompt; empty if an end of text is the most likely one.

    Args:
        server: a server of `load`.
        prompt: token ids.
        tokens: number of tokens of the model.
    """
    request = {"prompt": prompt, "n_predict": 1, "n_probs": tokens, "temperature": 0, "cache_prompt": False}
    content = (server.handle_completions(request)["choices"][0].get("logprobs") or {}).get("content")
    return {one["id"]: one["logprob"] for one in content[0]["top_logprobs"]} if content else {}


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
