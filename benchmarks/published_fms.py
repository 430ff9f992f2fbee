"""Compare predicted with published GPU memory: fms-acceleration's benchmarks (one and two A100 80 GB).

    nox -s memory -- published_fms   # a minute; needs no GPU

The published runs (foundation-model-stack/fms-acceleration, scripts/benchmarks/refs*.csv; torch 2.4.1, transformers
4.48.1) trained in pure bfloat16 with gradient checkpointing, FlashAttention-2 and torch's AdamW, LoRA with r=16 on the
attention and dropout 0.1. The published figure is torch's peak of allocated memory in GB. The prediction has no fitted
parameter. It computes the loss as transformers did then: SantaCoder's in bfloat16, the others' from a copy of the
logits in float32.

Two GPUs shared the model with FSDP of the first version (FULL_SHARD, BACKWARD_PRE, no mixed precision), rows are those
of each. What is predicted is FSDP2.
"""

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from published_table import print_errors
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import Device, resolve
from qlora_exp.planning import planner, sharding
from qlora_exp.planning import step as steps
from qlora_exp.planning.packed_weights import quantize_meta
from qlora_exp.planning.recording.fake_tensors import Work
from qlora_exp.planning.replay import play

SANTACODER: dict[str, Any] = {
    "model_type": "gpt_bigcode",
    "vocab_size": 49280,
    "n_positions": 2048,
    "n_embd": 2048,
    "n_layer": 24,
    "n_head": 16,
    "n_inner": 8192,
    "attn_pdrop": 0.1,
}
MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
MODELS = {"SantaCoder": SANTACODER, "Mistral-7B": MISTRAL, "Llama-2-70B": LLAMA}
TWO = ", 2 GPUs"
PUBLISHED = {
    ("SantaCoder", "full", 4): 11.27,
    ("SantaCoder", "full", 8): 15.19,
    ("Mistral-7B", "full", 4): 72.43,
    ("Mistral-7B", "full", 8): 72.44,
    ("Mistral-7B", "lora", 4): 26.70,
    ("Mistral-7B", "lora", 8): 38.74,
    ("SantaCoder", "full" + TWO, 2): 5.72,
    ("SantaCoder", "full" + TWO, 4): 7.82,
    ("Mistral-7B", "full" + TWO, 2): 36.23,
    ("Mistral-7B", "full" + TWO, 4): 36.23,
    ("Mistral-7B", "lora" + TWO, 2): 15.14,
    ("Mistral-7B", "lora" + TWO, 4): 21.96,
    ("Llama-2-70B", "qlora", 4): 68.13,
    ("Llama-2-70B", "qlora" + TWO, 2): 46.69,
}
"""Published peak in GB, by model, method and batch size."""


def loss(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, in_float32: bool) -> torch.Tensor:
    """Compute the loss from all logits, as transformers 4.48 does."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    shifted = (logits.float() if in_float32 else logits)[:, :-1].contiguous()
    kept: Any = torch.nn.functional.cross_entropy(shifted.flatten(0, 1), ids[:, 1:].flatten())
    kept.logits = logits  # the trainer's outputs keep them until the backward pass has ended
    value: torch.Tensor = kept
    return value


def allocated(name: str, method: str, rows: int) -> float:
    """Return the predicted peak of allocated bytes."""
    return planned(name, method, rows)[0]


def planned(name: str, method: str, rows: int) -> tuple[float, list[Work]]:
    """Return the predicted peak of allocated bytes, and the operations of a step."""
    architecture = AutoConfig.for_model(**MODELS[name])
    method, several, _ = method.partition(TWO)
    quantized = compose(["model=llama2_7b", "method=qlora"])
    resolved = resolve(quantized, Device("cuda", "GPU", bf16=True, paging=True))

    def build(layers: int) -> Any:
        values = architecture.to_dict() | {"num_hidden_layers": layers}
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(
                type(architecture)(**values), dtype=torch.bfloat16, attn_implementation="sdpa"
            )
            model: Any = base
            if method == "qlora":
                quantize_meta(base, quantized.quantization, resolved)
            if "lora" in method:
                settings = LoraConfig(r=16, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
                base.enable_input_require_grads()
                model = get_peft_model(base, settings)
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.data.to(torch.bfloat16)
        base.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    depth = architecture.num_hidden_layers
    whole = build(depth)
    divided = sharding.units(whole, 2)
    if several:
        sharding.keep_shares(whole, 2)
    model = steps.weigh(whole, lambda model: steps.optimizer("adamw_torch", True, model))
    batch = steps.Batch(rows, 2048 if name == "SantaCoder" else 4096, masked=False)
    with planner.as_it_runs(on_cuda=True, flash=True):
        step = steps.record(build, depth, batch, loss=partial(loss, in_float32=name != "SantaCoder"))
    if several:
        step, _ = sharding.shard(step, divided, 1)
    return max(phase.allocated for phase in play(model, step, True, False).values()), step.work


def main() -> None:
    """Predict the memory of each run and print the errors."""
    print_errors(__doc__, PUBLISHED, allocated)


if __name__ == "__main__":
    main()
