"""Compute what docs/explanation/source_documents.md corrects, where `qlora-exp plan` is not the command that does it.

    nox -s memory -- source_documents [CLAIM ...]       # numbers of that page; all take some 20 s; no GPU, no hub

Claims about code are run: with a Llama of two layers and random weights, and the library versions that are installed.
"""

import argparse
import inspect
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

from qlora_exp.utils.quiet import quiet

PROJECTIONS = 16 * (4096 + 14336)
"""Parameters of LoRA with r=16 on a layer of 4096 to 14336, such as Llama 3 8B's `up_proj`."""


def tiny(**settings: Any) -> Any:
    """Save and load a Llama of two layers, with `from_pretrained`'s settings."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder, **settings)


def in_4_bits() -> Any:
    """Load the tiny model with NF4 weights."""
    import torch
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return tiny(quantization_config=nf4, dtype=torch.bfloat16)


def adapted(base: Any) -> Any:
    """Give a model LoRA adapters that change its outputs."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, lora)


def scale(rank: int, **settings: Any) -> float:
    """Return the factor that PEFT's LoRA multiplies the update with, for alpha=32."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=rank, lora_alpha=32, **settings)
    layers = get_peft_model(tiny(), lora).modules()
    scales = (getattr(layer, "scaling", None) for layer in layers)  # attention has a number of that name
    return next(found["default"] for found in scales if isinstance(found, dict))


def error_of(call: Callable[[], object]) -> str:
    """Return the error that a call ends with."""
    try:
        call()
    except (TypeError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def smaller() -> None:
    """Claim 12: how many times less memory LoRA and QLoRA take in the comparison's own table."""
    print(f"2.1 / 1.1 GB = {2.1 / 1.1:.1f}x, 2.1 / 0.6 GB = {2.1 / 0.6:.1f}x")


def forgotten_config() -> None:
    """Claim 15: `get_peft_model` without the config, and `merge_and_unload()` whose result is dropped."""
    from peft import get_peft_model
    from safetensors import safe_open

    incomplete: Any = get_peft_model
    print("get_peft_model(model):", error_of(lambda: incomplete(tiny())))
    model = adapted(tiny())
    merged = model.merge_and_unload()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = sorted(path.name for path in Path(folder).iterdir())
        with safe_open(Path(folder, "adapter_model.safetensors"), "pt") as saved:
            print(f"model.save_pretrained() then writes {files} with {len(saved.keys())} tensors")
    print(f"merge_and_unload() returns the merged {type(merged).__name__}")


def own_calculator() -> None:
    """Claim 18: what the lesson's `memory_breakdown` gives for its own 70B."""
    billions = 70
    full = billions * (2 + 2 + 8 + 2)
    qlora = billions * (0.5 + 0.002 * 2 + 0.002 * 8 + 0.5)
    print(f"full fine-tuning {full:.0f} GB, QLoRA {qlora:.1f} GB")


def levels() -> None:
    """Claim 20: levels at (i + 0.5) / 16, and those of NF4 in bitsandbytes."""
    from bitsandbytes.functional import get_4bit_type

    quantiles = [NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)]
    print("lesson:", *(f"{value / max(quantiles):+.3f}" for value in quantiles))
    print("NF4:   ", *(f"{value:+.3f}" for value in get_4bit_type("nf4", device="cpu").tolist()))


def projection() -> None:
    """Claim 21: the parameters of an adapter on a layer of Llama 3 8B's MLP."""
    from qlora_exp.config.hydra_compose import compose
    from qlora_exp.models.base import model_config

    model = compose(["model=llama3_8b"]).model
    wide = model_config(model).intermediate_size
    print(f"{model.model_name_or_path}: intermediate_size {wide}")
    print(f"r=16: {16 * wide:,} + {16 * 4096:,} = {PROJECTIONS:,}, of {4096 * wide:,} weights")


def arguments_of_trl() -> None:
    """Claim 22: warm-up of a constant schedule, and arguments that do not go together."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, get_scheduler
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    for name in ("constant", "constant_with_warmup"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
        first = get_scheduler(name, optimizer, num_warmup_steps=30, num_training_steps=1000).get_last_lr()
        print(f"{name}: first learning rate {first[0]}")
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a", pad_token="a")
    with tempfile.TemporaryDirectory() as folder:
        plain = SFTConfig(folder, report_to="none", use_cpu=True, bf16=False)

        def train(model: Any, row: dict[str, str], **more: Any) -> str:
            data = Dataset.from_list([row])
            trainer: Any = SFTTrainer
            more = {"args": plain, **more}
            return error_of(lambda: trainer(model, train_dataset=data, processing_class=tokenizer, **more))

        alpaca = {"instruction": "a", "input": "", "output": "a"}
        print("columns of alpaca-cleaned:", train(tiny(), alpaca))
        print("dataset_text_field given to SFTTrainer:", train(tiny(), {"text": "a"}, dataset_text_field="text"))
        both = train(adapted(tiny()), {"text": "a"}, peft_config=LoraConfig(task_type="CAUSAL_LM"))
        print("a PeftModel and peft_config:", both)


def activations() -> None:
    """Claim 23: what a 4-bit layer returns, and what happens to its weights."""
    import torch

    layer = in_4_bits().model.layers[0].self_attn.q_proj
    before = layer.weight.clone()
    output = layer(torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True))
    output.sum().backward()
    same = torch.equal(before, layer.weight)
    print(f"weights {layer.weight.dtype}, unchanged: {same}; output {output.dtype}; gradient {layer.weight.grad}")


def renamed() -> None:
    """Claim 24: which names today's libraries still take."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    for name in ("max_seq_length", "evaluation_strategy", "warmup_ratio", "group_by_length"):
        print(f"SFTConfig takes {name}: {name in inspect.signature(SFTConfig).parameters}")
    print(f"SFTTrainer takes tokenizer: {'tokenizer' in inspect.signature(SFTTrainer).parameters}")
    print("from_pretrained(use_auth_token=True):", error_of(lambda: tiny(use_auth_token=True)))


def speeds() -> None:
    """Claim 25: the tutorial's tokens per second."""
    print(f"QLoRA / LoRA = 1,200 / 2,100 = {1200 / 2100:.2f}; QLoRA / full = 1,200 / 1,850 = {1200 / 1850:.2f}")


def counts_and_merge() -> None:
    """Claim 26: 4-bit weights counted with `numel`, scales of rsLoRA, and the model after a merge in 4 bits."""
    model = in_4_bits()
    counted = sum(parameter.numel() for parameter in model.parameters())
    print(f"numel() counts {counted:,} of {model.num_parameters():,} parameters")
    for rank in (4, 8, 16, 32, 64, 128):
        plain, stabilized = (scale(rank, use_rslora=rslora) for rslora in (False, True))
        print(f"alpha 32, r={rank}: {plain:.2f}, with rsLoRA {stabilized:.2f}, {stabilized / plain:.1f} times as much")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        layer = adapted(model).merge_and_unload().model.layers[0].self_attn.q_proj
    print(f"after merge_and_unload(): {type(layer).__name__}, {layer.weight.dtype}")
    print(next(str(one.message) for one in said if "Merge" in str(one.message)))


def parameters_of_dora() -> None:
    """Claim 29: what DoRA adds to LoRA r=16 in the tutorial's own code, and with layers of Llama 2 7B's real shape."""
    attention, up, down = [(4096, 4096)] * 4, [(4096, 11008)] * 2, [(11008, 4096)]
    shapes = {"tutorial, layers of 4096 x 4096": [(4096, 4096)] * 7, "Llama 2 7B": attention + up + down}
    for name, layers in shapes.items():
        lora = 32 * sum(16 * (inputs + outputs) for inputs, outputs in layers)
        more = 32 * sum(outputs for _, outputs in layers)
        print(f"{name}: {lora:,} of LoRA, {more:,} more of DoRA, {100 * more / lora:.1f} %")


CLAIMS = {
    12: smaller,
    15: forgotten_config,
    18: own_calculator,
    20: levels,
    21: projection,
    22: arguments_of_trl,
    23: activations,
    24: renamed,
    25: speeds,
    26: counts_and_merge,
    29: parameters_of_dora,
}


def main() -> None:
    """Print what each claim is about, and the right values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", type=int, metavar="CLAIM", help="numbers of the page; default: all")
    chosen = parser.parse_args().claims
    if unknown := {*chosen} - {*CLAIMS}:
        parser.error(f"no claim {min(unknown)}; there are {', '.join(map(str, CLAIMS))}")
    quiet()  # before the libraries are imported
    for number in chosen or CLAIMS:
        print(f"\n{number}. {(CLAIMS[number].__doc__ or '').partition(': ')[2]}")
        CLAIMS[number]()


if __name__ == "__main__":
    main()
