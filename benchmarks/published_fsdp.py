"""Compare predicted with published GPU memory of sharded runs: Answer.AI's fsdp_qlora and torchtune, in GiB.

    nox -s memory -- published_fsdp   # a minute; needs no GPU

Answer.AI (github.com/AnswerDotAI/fsdp_qlora, benchmarks_03_2024.md): Llama 2 on two GPUs of 24 GB, FSDP of the first
version, all in bfloat16, r=64 on all linear layers but o_proj, gradient checkpointing; peaks of memory reserved, and
for one run also allocated. Their loss kept all logits. torchtune (README of 0.4): Llama 3.1 70B on eight A100 of 80 GB,
FSDP2, compiled, embeddings and output layer sharded for themselves; peak of memory reserved. What is predicted is a run
of this package with its own loss, by `plan` with the words below. Nothing is fitted.
"""

import argparse

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import Device
from qlora_exp.planning.planner import planner
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.units import GIB

ANSWER_AI = [
    "method.r=64", "method.target_modules=[k_proj,q_proj,v_proj,up_proj,down_proj,gate_proj]", "model.dtype=bfloat16",
    "method.adapter_dtype=bfloat16", "training.bf16=false", "distributed.num_processes=2",
]  # fmt: skip
LORA = ["model=llama2_7b", "method=lora", *ANSWER_AI]
QLORA = ["model=llama2_7b", "method=qlora", *ANSWER_AI]
LARGE = ["method=qlora", *ANSWER_AI, "model=hub", "model.model_name_or_path=llama2_70b", "distributed.cpu_offload=true"]
LARGE += [
    "model.architecture={_name_or_path: llama2_70b, model_type: llama, vocab_size: 32000, hidden_size: 8192, "
    "intermediate_size: 28672, num_hidden_layers: 80, num_attention_heads: 64, num_key_value_heads: 8}"
]
TORCHTUNE = ["model=llama31_70b_instruct", "method=lora", "method.r=16", "method.target_modules=[q_proj,v_proj,o_proj]"]
TORCHTUNE += ["model.dtype=bfloat16", "method.adapter_dtype=bfloat16", "training.bf16=false"]
TORCHTUNE += ["distributed.num_processes=8"]
PUBLISHED: list[tuple[str, list[str], int, int, float]] = [
    ("Llama 2 7B LoRA", LORA, 1, 512, 10.24),
    ("Llama 2 7B LoRA", LORA, 1, 2048, 10.22),
    ("Llama 2 7B LoRA", LORA, 6, 2048, 21.35),
    ("Llama 2 7B QLoRA", QLORA, 1, 512, 4.98),
    ("Llama 2 7B QLoRA", QLORA, 1, 2048, 5.21),
    ("Llama 2 7B QLoRA", QLORA, 10, 2048, 20.97),
    ("Llama 2 70B QLoRA, offloaded", LARGE, 2, 2048, 14.92),
    ("Llama 3.1 70B LoRA", TORCHTUNE, 2, 2048, 27.6),
]
"""Run, words of its plan, rows of each GPU, tokens of a row, published GiB."""
GPU = Device("cuda", "GPU", bf16=True, paging=True)


def main() -> None:
    """Predict the memory of each run and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(PUBLISHED), help="use only the first N runs")
    quiet()
    for name, words, rows, length, published in PUBLISHED[: parser.parse_args().runs]:
        config = compose(["distributed=fsdp", *words, f"training.max_length={length}"])
        phases = planner(config, GPU).predict(rows=rows, evaluated=0).phases.values()
        reserved, allocated = (max(getattr(phase, what) for phase in phases) for what in ("reserved", "allocated"))
        print(
            f"{name:28} {rows:2} x {length:4}  {reserved / GIB:6.2f} GiB reserved ({allocated / GIB:.2f} allocated), "
            f"published {published:6.2f}  {reserved / GIB / published - 1:+.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
