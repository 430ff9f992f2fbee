"""Run the default job as a plain script with transformers, peft and TRL, for comparison with `qlora-exp train`.

Does not import qlora_exp. Prints the loss of each step and at the end one JSON line: for each held-out loss the seconds
in training steps until then.
"""

import argparse
import json
import time
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, help="folder with train.jsonl and test.jsonl of prompt and completion")
parser.add_argument("--method", choices=["lora", "qlora"], default="qlora")
parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--eval-steps", type=int, default=0)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--gradient-checkpointing", action="store_true")
parser.add_argument("--sequential", action="store_true", help="train the rows in their order, not shuffled")
parser.add_argument("--out", required=True)
options = parser.parse_args()

set_seed(42)
data = load_dataset("json", data_files={part: f"{options.data}/{part}.jsonl" for part in ("train", "test")})
tokenizer = AutoTokenizer.from_pretrained(options.model)
on_gpu = options.device == "cuda"
dtype = torch.bfloat16 if on_gpu else torch.float32
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
model = AutoModelForCausalLM.from_pretrained(
    options.model,
    dtype=dtype,
    quantization_config=quantization if options.method == "qlora" else None,
    device_map={"": options.device},
)


class Clock(TrainerCallback):
    """Callback that measures step times (with data loading, without evaluation) and collects held-out losses."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.heldout: list[tuple[float, float]] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.mark = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds += time.perf_counter() - self.mark
        self.mark = time.perf_counter()

    def on_evaluate(self, *_: object, **arguments: Any) -> None:
        self.heldout.append((self.seconds, arguments["metrics"]["eval_loss"]))
        self.mark = time.perf_counter()


clock = Clock()
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        warmup_steps=0.1,
        max_grad_norm=0.3,
        max_length=512,
        optim="adamw_torch",
        logging_steps=1,
        eval_strategy="steps" if options.eval_steps else "no",
        eval_steps=options.eval_steps or None,
        save_strategy="no",
        report_to="none",
        use_cpu=not on_gpu,
        seed=42,
        bf16=options.bf16,
        gradient_checkpointing=options.gradient_checkpointing,
        train_sampling_strategy="sequential" if options.sequential else "random",
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[clock],
)
adapted = trainer.model
assert adapted is not None
for parameter in adapted.parameters():  # as in qlora-exp: TRL would round the adapters of a quantized base to bfloat16
    parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
for module in adapted.modules():  # otherwise bitsandbytes' gradients are wrong after an evaluation on some CPUs
    if isinstance(module, Linear4bit):
        module.support_avx512bf16_for_cpu = False
trainer.train()
print(json.dumps({"heldout": clock.heldout}))
