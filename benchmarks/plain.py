"""Run the default job as a plain script with transformers, peft and TRL, for comparison with `qlora-exp train`.

Does not import qlora_exp. With `--trl-defaults`, TRL chooses precision, checkpointing and sampling.
Prints one JSON line: step times, time when the first step ended, peak RSS, held-out losses.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, help="folder with train.jsonl and heldout.jsonl of prompt and completion")
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--eval-steps", type=int, default=0)
parser.add_argument("--trl-defaults", action="store_true")
parser.add_argument("--out", required=True)
options = parser.parse_args()

set_seed(42)
data = load_dataset("json", data_files={part: f"{options.data}/{part}.jsonl" for part in ("train", "heldout")})
tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(
    options.model,
    dtype=torch.float32,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    device_map={"": "cpu"},
)
chosen: dict[str, Any] = {} if options.trl_defaults else {"bf16": False, "gradient_checkpointing": False}


class Clock(TrainerCallback):
    """Callback that measures step times (with data loading, without evaluation) and collects held-out losses."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.losses: list[tuple[float, float]] = []
        self.first = 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.mark = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.steps.append(time.perf_counter() - self.mark)
        self.first = self.first or time.time()
        self.mark = time.perf_counter()

    def on_evaluate(self, *_: object, **arguments: Any) -> None:
        self.losses.append((sum(self.steps), arguments["metrics"]["eval_loss"]))
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
        use_cpu=True,
        seed=42,
        **chosen,
    ),
    train_dataset=data["train"],
    eval_dataset=data["heldout"],
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[clock],
)
adapted = trainer.model
assert adapted is not None
if not options.trl_defaults:  # as in qlora-exp: TRL would round the adapters of a quantized base to bfloat16
    for parameter in adapted.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
for module in adapted.modules():  # otherwise bitsandbytes' gradients are wrong after an evaluation on some CPUs
    if isinstance(module, Linear4bit):
        module.support_avx512bf16_for_cpu = False
trainer.train()
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps({"steps": clock.steps, "first_step": clock.first, "peak_mib": peak, "losses": clock.losses}))
