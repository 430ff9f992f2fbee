"""Run on a GPU what only a GPU can show, each case in processes of its own, and write a JSON line for each at once.

    nox -s gpu-bench                                     # every case: half an hour
    nox -s gpu-bench -- 8b_qlora_r16 sharded --seconds 480 --out gpu.jsonl
    python benchmarks/gpu.py --list

A case is a list of commands of `qlora-exp`. It ended well if every command did, as it should have. The line has the
seconds of each command and what the last run measured: rates, memory by phase, what was planned. The model of 8B
parameters has Llama 3's shape and random weights, made on the device. `--small` takes a tiny model in its place, and
`--device cpu` shows that a case runs at all. A case that the time left (`--seconds`) cannot hold is not begun.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEASURED = (
    "after/loss", "tokens_per_second", "samples_per_second", "mfu", "step_seconds_p50", "energy_joules", "train/loss",
    "plan/peak_mib", "plan/memory_ratio", "memory/load/allocated_peak_mib", "memory/first_step/allocated_peak_mib",
    "memory/steady/allocated_peak_mib", "memory/steady/reserved_peak_mib", "memory/allocated_peak_mib",
    "memory/reserved_peak_mib",
)  # fmt: skip
SHAPES: dict[bool, dict[str, Any]] = {
    False: {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "rope_theta": 500000.0},
    True: {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2},
}  # fmt: skip
"""Sizes of the model with random weights, by `--small`."""
SHORT = ["evaluation=loss_only", "unrelated=none", "training.eval_strategy=no", "dataset.max_eval_rows=8"]
SHORT += ["training.max_steps=8", "tracking.log_adapter=false"]
BIG = ["train", "model=hub", "model.model_name_or_path={base}", *SHORT]
RANKS = [(f"8b_{method}_r{r}", [f"method={method}", f"method.r={r}"]) for method in ("qlora", "lora") for r in (16, 32)]
PACKED = ["training.packing=true", "training.max_length=2048", "training.per_device_train_batch_size=1"]
LONG = ["method=qlora", "method.r=32", "dataset=own", "dataset.path={rows}", "dataset.eval_size=1"]
LONG += [
    "training=long_rows",
    "training.max_steps=2",
    "training.per_device_eval_batch_size=1",
    "training.eval_strategy=no",
]
LENGTHS = {24: (16_384, 78_475), 78: (131_072, 262_144)}
"""Tokens of one row, by GiB (docs/how_to/long_rows.md). The longest takes 70 GiB of the machine's memory."""
RECOMPUTED = "training.gradient_checkpointing=true"
COMPUTED = {
    "by_length": ["training.padding=by_length"],
    "free": ["training.padding=free"],
    "free_flash": ["training.padding=free", "model.attn_implementation=flash_attention_2"],
    "recomputed_0": ["training.gradient_checkpointing=false"],
    "recomputed_8": [RECOMPUTED, "training.recomputed_layers=8"],
    "recomputed_16": [RECOMPUTED, "training.recomputed_layers=16"],
}
"""Ways to compute a step that do not change what it learns. `free_flash` needs the package flash-attn."""
STORED = ["torchao_int8", "torchao_float8", "quanto_int8", "quanto_int4", "int8", "fp4"]


@dataclass(frozen=True)
class Case:
    """Commands that show something."""

    commands: Sequence[Sequence[str]]
    seconds: int
    """Time that it may take."""
    gib: int | None = None
    """Memory of the device that it may use; None: all."""


def cases() -> dict[str, Case]:
    """Return every case by name, in the order of their worth."""
    made = {name: Case([[*BIG, *words]], 120) for name, words in RANKS}
    four = ["training.gradient_accumulation_steps=4"]
    for name, words in (pair for pair in RANKS if pair[0].endswith("r16")):
        made[f"{name}_x4"] = Case([[*BIG, *words, *four]], 150)
        made[f"{name}_x4_tuned"] = Case([[*BIG, *words, *four, "training.tune=auto"]], 180)
        made |= {  # what tuning chooses from, one by one
            f"{name}_x4_{what}": Case([[*BIG, *words, *four, *settings]], 150) for what, settings in COMPUTED.items()
        }
    made |= {f"{name}_packed": Case([[*BIG, *words, *PACKED]], 150) for name, words in RANKS if name.endswith("r16")}
    made |= {
        f"8b_qlora_{tokens}_tokens_{gib}_gib": Case(
            [[*BIG, *LONG, f"training.max_length={tokens}", *(["training.max_steps=1"] if gib > 24 else [])]],
            150 + tokens**2 // 200_000_000,
            gib,
        )
        for gib, lengths in LENGTHS.items()
        for tokens in lengths
    }
    swept = [*BIG, "-m", "method=qlora", "method.r=8,16,32,64", "training.per_device_train_batch_size=1"]
    made["8b_qlora_four_alone"] = Case([swept], 300)
    made["8b_qlora_four_by_turns"] = Case([[*swept, "sweep.fuse=4"]], 180)
    made["8b_qlora_four_rows_together"] = Case([[*swept, "sweep.fuse=4", "sweep.fused_rows=true"]], 180)
    run = ["train", "method=qlora", "training.max_steps=20", "hydra.run.dir={folder}/run", "evaluation.generate_rows=4"]
    taken = [
        ["export", "{folder}/run", "--to", kind, "--out", f"{{folder}}/{kind}"] for kind in ("gguf", "nf4", "int8")
    ]
    made["taken_away"] = Case([run, ["merge", "{folder}/run", "--out", "{folder}/merged"], *taken], 180)
    asked = ["generate", "{folder}/run", "--prompt", "How long does concrete need?", "--max-new-tokens", "16"]
    made["reproduced"] = Case([run, ["reproduce", "{folder}/run"], asked], 150)
    made["deployment_gap"] = Case([run, ["deployment-gap", "{folder}/run", "--forms", "trained,merged,nf4,int8"]], 240)
    made |= {f"stored_{name}": Case([["train", "method=qlora", f"quantization={name}", *SHORT]], 60) for name in STORED}
    made["fp16"] = Case([["train", "method=qlora", "training.fp16=true", "training.bf16=false", *SHORT]], 60)
    shared = ["train", "distributed.num_processes=1", *SHORT]
    fsdp, zero3 = [*shared, "distributed=fsdp"], [*shared, "distributed=deepspeed_zero3"]
    made["sharded"] = Case([[*fsdp, f"method={method}"] for method in ("full", "lora", "qlora")], 150)
    made["sharded_offload"] = Case([[*fsdp, "distributed.cpu_offload=true", "method=lora"]], 90)
    made["deepspeed"] = Case([[*zero3, f"method={method}"] for method in ("full", "lora")], 150)
    made["sweep_out_of_memory"] = Case([["!", *BIG, "-m", "method=lora", "training.gradient_checkpointing=false",
                                         "training.per_device_train_batch_size=1,256"]], 240)  # fmt: skip
    made["comparison"] = Case([["train", "-m", "sweep=cost_comparison", "seed=1,2,3"]], 420)
    return made


def make_base(folder: Path, small: bool, device: str) -> None:
    """Write a model with random weights in bfloat16, and the built-in model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.models.base import load_tokenizer

    tokenizer = load_tokenizer(compose([]).model)
    rows = 49152 if small else 128256
    sizes = {"vocab_size": rows, "max_position_embeddings": 2**19, "tie_word_embeddings": False, **SHAPES[small]}
    config = AutoConfig.for_model("llama", eos_token_id=tokenizer.eos_token_id, **sizes)
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_long_rows(file: Path) -> None:
    """Write rows that are longer than any case's."""
    text = "The quick brown fox jumps over the lazy dog. " * 40_000
    lines = [{"instruction": f"{number}", "input": "", "output": text} for number in range(3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


LIMITED = """import sys, torch
from qlora_exp.cli.main import main
torch.cuda.set_per_process_memory_fraction(int(sys.argv[1]) * 2**30 / torch.cuda.mem_get_info()[1])
main(sys.argv[2:])"""
"""Program that runs a command with at most so many GiB of the device's memory."""


def run(case: Case, folder: Path, places: Mapping[str, str], device: str) -> dict[str, Any]:
    """Run the commands of a case until one does not end as it should; return what happened and was measured."""
    seconds, error = [], ""
    begin = time.monotonic()
    for words in case.commands:
        fails, *command = [word.format(**places, folder=folder) for word in (*[""] * (words[0] != "!"), *words)]
        if command[0] == "train":
            command.append(f"device={device}")
        start = time.monotonic()
        left = case.seconds - (start - begin)
        program = ["-m", "qlora_exp"] if case.gib is None else ["-c", LIMITED, str(case.gib)]
        try:
            done = subprocess.run([sys.executable, *program, *command], cwd=folder, timeout=left, capture_output=True,
                                  text=True, check=False)  # fmt: skip
        except subprocess.TimeoutExpired:
            error = f"{command[0]}: not done after {case.seconds} s"
        else:
            if bool(done.returncode) != (fails == "!"):
                error = f"{command[0]}: rc {done.returncode}: {done.stderr[-600:] or done.stdout[-600:]}"
        seconds.append(round(time.monotonic() - start, 1))
        if error:
            break
    return {"ok": not error, "seconds": seconds, **({"error": error} if error else {}), **measured(folder)}


def measured(folder: Path) -> dict[str, Any]:
    """Return outcome and metrics of each run below a folder, oldest first."""
    from qlora_exp.tracking.journal import FILE, last_message, read

    runs = []
    for journal in sorted(folder.rglob(FILE), key=lambda file: file.stat().st_ctime):
        if any(message["op"] == "params" for message, _ in read(journal)):  # no sweep
            last = last_message(journal.parent) or {}
            values = {name: last["metrics"][name] for name in MEASURED if name in last.get("metrics", {})}
            runs.append({"outcome": last.get("outcome", "cut off"), **values})
    return {"runs": runs}


def versions(device: str) -> dict[str, Any]:
    """Return the device and the versions, which every figure depends on."""
    import torch
    import transformers

    import qlora_exp

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__,
            "qlora_exp": qlora_exp.__version__}  # fmt: skip


def main() -> None:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="default: all, in the order of --list")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case that may end after this time")
    parser.add_argument("--out", type=Path, help="file to append the lines to")
    parser.add_argument("--small", action="store_true", help="a tiny model in place of the one of 8B parameters")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    every = cases()
    if options.list:
        for name, case in every.items():
            print(f"{name:32} {case.seconds:4} s  {len(case.commands)} commands")
        return
    if unknown := {*options.cases} - {*every}:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; --list lists them")
    begin = time.monotonic()

    def tell(line: Mapping[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    with tempfile.TemporaryDirectory(prefix="qlora_exp_gpu_") as made:
        chosen = options.cases or list(every)
        places = {"base": f"{made}/base", "rows": f"{made}/rows.jsonl"}
        if any("{base}" in word for name in chosen for words in every[name].commands for word in words):
            make_base(Path(places["base"]), options.small, options.device)
            write_long_rows(Path(places["rows"]))
        tell({"case": "start", "seconds": round(time.monotonic() - begin, 1), **versions(options.device)})
        for name in chosen:
            if time.monotonic() - begin + every[name].seconds > options.seconds:
                tell({"case": name, "ok": False, "error": "not begun: too little time was left"})
                continue
            folder = Path(made, name)
            folder.mkdir()
            tell({"case": name, **run(every[name], folder, places, options.device)})


if __name__ == "__main__":
    main()
