"""Compare predicted with published GPU memory: LitGPT's resource tables for LoRA on Llama 2 (one A100 40 GB).

    nox -s memory -- published_litgpt   # a few minutes; needs no GPU

The published runs (LitGPT, tutorials/resource-tables.md and `finetune/lora.py` of that time) used bfloat16 weights
without autocast, LoRA with r=8 on queries and values, dropout 0.05, no checkpointing, torch's AdamW, and a longest row
of 1,304 tokens. The published figure is torch's `max_memory_allocated` in GB. The prediction has no fitted parameter,
and uses transformers' Llama in place of LitGPT's. For 4-bit weights the runs used bitsandbytes 0.41, which kept the
input of each layer for the backward pass without needing it; the prediction adds these bytes.
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from published_table import print_errors
from transformers import AutoModelForCausalLM

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import Device, resolve
from qlora_exp.models.base import model_config
from qlora_exp.planning import planner
from qlora_exp.planning import step as steps
from qlora_exp.planning.packed_weights import quantize_meta
from qlora_exp.planning.replay import play

TOKENS = 1304
PUBLISHED = {
    ("llama2_7b", "none", 1): 21.30,
    ("llama2_7b", "nf4", 1): 14.14,
    ("llama2_7b", "nf4_double", 1): 13.84,
    ("llama2_7b", "none", 2): 29.07,
    ("llama2_13b", "none", 1): 38.12,
    ("llama2_13b", "nf4", 1): 23.14,
    ("llama2_13b", "nf4_double", 1): 22.55,
}
"""Published peak in GB, by model, quantization and batch size."""


def loss(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Compute the loss in bfloat16 from all logits, as LitGPT does."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def allocated(name: str, stored: str, rows: int) -> float:
    """Return the predicted peak of allocated bytes."""
    words = [f"model={name}", "model.dtype=bfloat16", f"quantization={stored}"]
    config = compose([*words, "method=lora" if stored == "none" else "method=qlora"])
    resolved = resolve(config, Device("cuda", "GPU", bf16=True, paging=True))
    architecture = model_config(config.model)

    def build(layers: int) -> Any:
        values = architecture.to_dict() | {"num_hidden_layers": layers}
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(
                type(architecture)(**values), dtype=torch.bfloat16, attn_implementation="sdpa"
            )
            quantize_meta(base, config.quantization, resolved)
            model = get_peft_model(base, LoraConfig(r=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        return model

    depth = architecture.num_hidden_layers
    model = steps.weigh(build(depth), lambda model: steps.optimizer("adamw_torch", True, model))
    with planner.as_it_runs(on_cuda=True):
        step = steps.record(build, depth, steps.Batch(rows, TOKENS, masked=False), loss=loss)
    nbytes = max(phase.allocated for phase in play(model, step, True, True).values())
    if stored != "none":  # bfloat16 inputs of attention, its output layer, the MLP and the MLP's last layer
        nbytes += 2 * rows * TOKENS * depth * (3 * architecture.hidden_size + architecture.intermediate_size)
    return nbytes


def main() -> None:
    """Predict the memory of each run and print the errors."""
    print_errors(__doc__, PUBLISHED, allocated)


if __name__ == "__main__":
    main()
