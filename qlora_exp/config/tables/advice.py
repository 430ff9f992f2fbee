"""What is known about good values of keys: measured here, published, or a rule of thumb.

`qlora-exp keys KEY` prints it.
"""

from dataclasses import dataclass
from typing import Literal

Basis = Literal["measured here", "published", "rule of thumb"]


@dataclass(frozen=True)
class Advice:
    """One piece of advice on a key."""

    text: str
    basis: Basis
    source: str = ""
    """Page of these docs or paper; empty for a rule of thumb that nobody measured."""

    def __str__(self) -> str:
        """Return the advice with what it rests on."""
        return f"{self.text} [{self.basis}{f': {self.source}' if self.source else ''}]"


_QLORA = "Dettmers et al. 2023, arXiv 2305.14314"
_TUNED = "docs/explanation/peft_methods.md"

ADVICE: dict[str, tuple[Advice, ...]] = {
    "method.r": (
        Advice("8 or 16 for one style or one task, 32 to 64 for much new knowledge or code.", "rule of thumb"),
        Advice(
            "If all linear layers have adapters, r from 8 to 256 made no difference to LLaMA 7B.",
            "published",
            f"{_QLORA}, appendix A.1",
        ),
        Advice(
            "Parameters, their gradients and optimizer states grow in proportion; `qlora-exp plan` says how much.",
            "measured here",
            "docs/how_to/plan.md",
        ),
    ),
    "method.lora_alpha": (
        Advice(
            "Twice r, and changed along with r: the update is scaled by lora_alpha / r, which acts like a learning "
            "rate.",
            "rule of thumb",
        ),
        Advice(
            "r=64 with lora_alpha=16 (a scale of 0.25) in all runs of the QLoRA paper.",
            "published",
            f"{_QLORA}, section 4",
        ),
        Advice(
            "With use_rslora the scale is lora_alpha / sqrt(r), four times as large at r=16: lower the learning "
            "rate or lora_alpha.",
            "published",
            "Kalajdzievski 2023, arXiv 2312.03732",
        ),
    ),
    "method.lora_dropout": (
        Advice("0.1 for models up to 13B parameters, 0.05 for 33B and 65B.", "published", f"{_QLORA}, appendix B.2"),
        Advice(
            "0 to 0.05 for training of one epoch; more if the held-out loss rises while the training loss falls.",
            "rule of thumb",
        ),
    ),
    "method.target_modules": (
        Advice(
            "all-linear: adapters on all linear layers are needed to reach full fine-tuning; attention alone does "
            "not, at any r.",
            "published",
            f"{_QLORA}, section 4 and figure 2",
        ),
        Advice(
            "q_v or attention take less memory; add mlp next if the held-out loss is not good enough.", "rule of thumb"
        ),
    ),
    "method.bias": (
        Advice("none: a trained bias cannot be removed with the adapter, and is not in most servers.", "rule of thumb"),
    ),
    "method.modules_to_save": (
        Advice(
            "[embed_tokens, lm_head] only if tokens are new to the model: both are trained and saved whole, which "
            "takes more memory than all adapters; trainable_token_indices trains the new rows alone.",
            "rule of thumb",
        ),
    ),
    "method.rank_pattern": (
        Advice("Give its layers an alpha_pattern too: their scale is lora_alpha / their rank.", "rule of thumb"),
    ),
    "method.init_lora_weights": (
        Advice(
            "Choose it by lora_variant=pissa, olora, eva, corda, lora_ga, loftq, orthogonal or gaussian.",
            "rule of thumb",
        ),
        Advice(
            "LoftQ, PiSSA and OLoRA begin nearer to the unquantized model on a 4-bit base or learn faster at "
            "first; tune the learning rate again.",
            "published",
            "Li et al. 2023, arXiv 2310.08659; Meng et al. 2024, arXiv 2404.02948",
        ),
    ),
    "lora_variant.use_dora": (
        Advice(
            "Worth a try where LoRA is nearly good enough, most at low ranks.",
            "published",
            "Liu et al. 2024, arXiv 2402.09353",
        ),
        Advice(
            "It takes more memory and time in each step than LoRA; `qlora-exp plan lora_variant=lora,dora` says how "
            "much.",
            "measured here",
            "docs/how_to/plan.md",
        ),
    ),
    "lora_variant.use_rslora": (
        Advice(
            "For r of 32 and more, where lora_alpha / r makes updates too small.",
            "published",
            "Kalajdzievski 2023, arXiv 2312.03732",
        ),
    ),
    "training.learning_rate": (
        Advice(
            "The rate matters more than the method: tune it first (`sweep=tuned_methods`). In 12 steps on the "
            "built-in model the best was 3e-3 for LoRA and 2.4e-4 for full fine-tuning.",
            "measured here",
            _TUNED,
        ),
        Advice("QLoRA: 2e-4 up to 13B parameters, 1e-4 for 33B and 65B.", "published", f"{_QLORA}, appendix B.2"),
        Advice(
            "LoRA 1e-4 to 3e-4; full fine-tuning 1e-5 to 5e-5; IA3 and prompt tuning 3e-3 and more. Long runs "
            "want lower rates.",
            "rule of thumb",
        ),
    ),
    "training.max_grad_norm": (Advice("0.3 for QLoRA.", "published", f"{_QLORA}, appendix B.2"),),
    "training.num_train_epochs": (
        Advice(
            "1 to 3; watch the held-out loss (training.eval_strategy=epoch, training.load_best_model_at_end=true).",
            "rule of thumb",
        ),
    ),
    "training.packing": (
        Advice(
            "true for rows much shorter than max_length: the same gradients without padding.",
            "measured here",
            "docs/how_to/own_data.md",
        ),
    ),
    "optimizer.optim": (
        Advice(
            "paged_adamw_8bit on cards below 16 GB: its states take a quarter, and peaks go to the machine's memory.",
            "rule of thumb",
        ),
    ),
    "quantization.bnb_4bit_quant_type": (
        Advice(
            "nf4: its error is lower than fp4's on a model's weights.",
            "measured here",
            "docs/explanation/quantization.md",
        ),
    ),
}
"""Advice by key. A setting of PEFT stands under the section in which it is usually set."""


MEANINGS = {
    "r": "Rank of the update: a layer with weights of shape (out, in) gets matrices A (r, in) and B (out, r): "
    "r * (in + out) trained parameters, and adds B A x * scale to its output.",
    "lora_alpha": "The scale of the update is lora_alpha / r; with use_rslora it is lora_alpha / sqrt(r).",
    "lora_dropout": "Share of a layer's inputs that are set to zero on the way to A in training.",
    "bias": "Which biases are trained too: none, all, or those of adapted layers (lora_only).",
}
"""What settings of PEFT's LoraConfig mean whose help in PEFT only repeats their names."""


def on(key: str) -> tuple[Advice, ...]:
    """Return the advice on a key of the config; settings of PEFT are the same in `method` and `lora_variant`."""
    section, _, name = key.partition(".")
    other = {"method": "lora_variant", "lora_variant": "method"}.get(section, section)
    return ADVICE.get(key) or ADVICE.get(f"{other}.{name}", ())
