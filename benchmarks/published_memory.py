"""Compare predicted with published GPU memory: PEFT's comparison of methods on Llama-3.2-3B (one NVIDIA L40S).

    nox -s memory -- published_memory FILE.csv [RECORD ...]     # FILE.csv is PEFT's table; needs no GPU

The prediction records PEFT's training loop, not this project's: bfloat16 base, adapters as PEFT creates them, all
logits, torch's AdamW, gradients kept until the next step, the cache emptied every ten steps (PEFT,
method_comparison/MetaMathQA/run.py). The length of the longest batch is not published. It is fitted to the row of LoRA
with r=32, and all other rows are predicted with it.
"""

import argparse
import csv
import json
from statistics import median
from typing import Any

import torch
from peft import PeftType, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_exp.planning import planner
from qlora_exp.planning import step as steps
from qlora_exp.planning.replay import Memory
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.units import GIB

BATCH, USUAL = 4, 230
"""Rows of a batch, and tokens of the longest row in a typical batch: 4,198,051 tokens in 20,000 rows, plus padding."""
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}
FITTED = "lora--llama-3.2-3B-rank32"


def build(row: dict[str, str], layers: int) -> Any:
    """Build the model of a row of PEFT's table on the meta device."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            LlamaConfig(num_hidden_layers=layers, **ARCHITECTURE), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        if row["peft_type"] == "FULL":
            return base
        settings = json.loads(row["settings"])
        if row["peft_type"] == "ADALORA":
            settings["total_step"] = 5000
        if row["peft_type"] == "OFT":
            settings["oft_block_size"] = 0  # the default at the time of the measurement
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(row["peft_type"])]
        return get_peft_model(base, kind(task_type=TaskType.CAUSAL_LM, **settings))


def loss(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Compute the loss of transformers, and keep the other outputs alive, as PEFT's loop does."""
    outputs = model(input_ids=ids, attention_mask=mask, labels=ids)
    outputs.loss.outputs = outputs
    value: torch.Tensor = outputs.loss
    return value


def both(row: dict[str, str], length: int) -> tuple[steps.Step, steps.Step]:
    """Record a step with a typical batch and one with the longest batch."""
    usual, longest = (
        steps.record(
            lambda layers: build(row, layers),
            28,
            steps.Batch(BATCH, tokens, masked=True),
            loss=loss,
        )
        for tokens in (USUAL, length)
    )
    return usual, longest


def reserved(row: dict[str, str], length: int) -> tuple[float, float]:
    """Return peak reserved and peak allocated memory, in GiB."""
    model = steps.weigh(build(row, 28), lambda model: steps.optimizer("adamw_torch", True, model))
    with planner.as_it_runs(on_cuda=True):
        usual, longest = both(row, length)
    memory = Memory(on_cuda=True)
    for kind, nbytes in model.static:
        memory.take(kind, nbytes)
    left = ("activations", "loss")  # kept alive by `outputs` until the next step replaces it
    for step, update in ((usual, model.updates[0]), (longest, model.updates[1])):
        memory.phase()
        memory.forget("gradients")
        memory.run([event for event in step.passes if event.group[0] != "end"], keep=["gradients", *left])
        memory.run(update, keep=["optimizer"])
        for kind in left:
            memory.forget(kind)
    phase = memory.phase()
    return phase.reserved / GIB, phase.allocated / GIB


def fitted(row: dict[str, str]) -> int:
    """Find the length whose prediction is closest to the published memory of `row`."""
    wanted = float(row["reserved_p99_gib"])
    tried = {length: reserved(row, length)[0] for length in range(540, 640, 4)}
    return min(tried, key=lambda tokens: abs(tried[tokens] - wanted))


def main() -> None:
    """Fit the length, predict the memory of each row and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="PEFT's table: the results of method_comparison/MetaMathQA as CSV")
    parser.add_argument("records", nargs="*", metavar="RECORD", help="rows of the table to predict; default: all")
    parser.add_argument("--length", type=int, help="tokens of the longest row; default: fitted")
    options = parser.parse_args()
    quiet()
    with open(options.file, encoding="utf-8") as file:
        rows = {row["record"]: row for row in csv.DictReader(file)}
    length = options.length or fitted(rows[FITTED])
    print(f"{length} tokens")
    print(f"{'record':42} {'allocated':>9} {'reserved':>9} {'published':>9} {'error':>7}")
    errors = []
    for name, row in rows.items():
        if options.records and name not in options.records:
            continue
        predicted, allocated = reserved(row, length)
        published = float(row["reserved_p99_gib"])
        if name != FITTED:
            errors.append(abs(predicted / published - 1))
        print(
            f"{name:42} {allocated:9.2f} {predicted:9.2f} {published:9.2f} {predicted / published - 1:+7.1%}",
            flush=True,
        )
    if errors:
        print(f"{len(errors)} rows without the fitted one: median error {median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    main()
