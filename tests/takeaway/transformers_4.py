"""Make bases with transformers 4 and read folders with it. Runs in an environment of its own (`nox -s takeaway`).

Reads one request as JSON on each line of its input, and answers each with one line. Imports nothing of this project.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


def make(folder: str, kind: str, tokenizer: str, scale: float, named: dict[str, str], **fields: Any) -> None:
    """Save a model with random weights, so large that positions matter, and a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    for parameter in model.parameters():
        parameter.data = parameter.data * scale if parameter.ndim > 1 else parameter.data
    model.save_pretrained(folder)
    made = PreTrainedTokenizerFast(tokenizer_file=tokenizer, model_max_length=2048, **named)
    made.chat_template = Path(tokenizer).with_name("template").read_text("utf-8")
    made.save_pretrained(folder)


def read(folder: str, text: str, messages: list[dict[str, str]], logits: str | None) -> dict[str, Any]:
    """Return what the tokenizer makes of a text and of messages; write logits of the text to a file."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    answer = {"class": type(tokenizer).__name__, "ids": ids, "special": tokenizer.all_special_tokens}
    if tokenizer.chat_template:
        answer["prompt"] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    if logits:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        answer |= {name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys")}
        with torch.no_grad():
            np.save(logits, model.eval()(torch.tensor([ids])).logits[0].float().numpy())
    return answer


def main() -> None:
    """Answer requests until the input ends."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(json.dumps({"version": transformers.__version__}), flush=True)
    for line in sys.stdin:
        name, values = json.loads(line)
        try:
            answer = {"make": make, "read": read}[name](**values)
        except Exception as error:  # the test says which request failed
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
