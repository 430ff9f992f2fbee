"""Explain the PEFT settings that people choose most, with advice that says where it comes from.

PEFT's own help of these is short ("Lora alpha"). Values from a paper are those of its authors' experiments; a rule of
thumb is common practice that no single experiment shows. The learning rate matters as much: tune it first.
"""

from dataclasses import dataclass
from typing import Literal

RATES = "docs/explanation/peft_methods.md"
"""Page with the best learning rates of methods, as measured."""
_QLORA = "QLoRA, https://arxiv.org/abs/2305.14314"


Basis = Literal["measured here", "published", "rule of thumb"]


@dataclass(frozen=True)
class Advice:
    """One piece of advice.

    Attributes:
        text: the advice.
        basis: what it rests on.
        source: paper or page with the evidence; empty for a rule of thumb.
    """

    text: str
    basis: Basis
    source: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.basis}{': ' if self.source else ''}{self.source})"


@dataclass(frozen=True)
class Note:
    """What a setting of LoRA means, and advice on its value."""

    meaning: str
    advice: tuple[Advice, ...]


RANK = Advice(
    "16; 8 for a style or a format, 32 to 64 for much that is new: a domain, code, mathematics", "rule of thumb"
)
ALPHA = Advice("twice r; or fix it, and tune the learning rate instead", "rule of thumb")
LAYERS = Advice(
    "all linear layers are needed to match full fine-tuning; the attention alone does not",
    "published",
    f"{_QLORA}, figure 2",
)
RSLORA = Advice(
    "for high ranks, at which lora_alpha / r makes learning slow",
    "published",
    "rsLoRA, https://arxiv.org/abs/2312.03732",
)
DORA = Advice("where LoRA is nearly good enough, at a low rank; a step is slower", "rule of thumb")
RATE_UP_TO_13B = Advice("2e-4 for LoRA and QLoRA up to 13B parameters", "published", f"{_QLORA}, appendix B")
RATE_FROM_33B = Advice("1e-4 for LoRA and QLoRA of 33B and 65B", "published", f"{_QLORA}, appendix B")
RATE_OF_SMALL = Advice(
    "2e-4 to 3e-3 for LoRA of models below 1B parameters; sweep it", "measured here", f"{RATES}, 135 M"
)
RATE_OF_FULL = Advice("1e-5 to 2e-5 for full fine-tuning", "rule of thumb")
RATE_OF_SMALL_FULL = Advice(
    "2e-5 to 2e-4 for full fine-tuning of models below 1B parameters; sweep it", "measured here", f"{RATES}, 135 M"
)

NOTES = {
    "r": Note(
        "Rank of the update: a layer of weight W learns W + lora_alpha / r * B A, where A has r rows and B r columns. "
        "Parameters, gradients and optimizer states of the adapter grow in proportion to r.",
        (
            RANK,
            Advice("with all linear layers adapted, ranks of 8 to 256 gave the same quality on Alpaca",
                   "published", f"{_QLORA}, appendix A"),
            Advice("tuning a 7B on instructions: r=16 and 64 fell short of full fine-tuning on code, and 256 did not; "
                   "on mathematics 64 nearly did. Lower ranks forget less",
                   "published", "LoRA Learns Less and Forgets Less, https://arxiv.org/abs/2405.09673v2, section 4"),
            Advice("`-m sweep=rank_scaling` compares r = 8 to 128 on your rows", "rule of thumb"),
        ),
    ),
    "lora_alpha": Note(
        "Scale of the update: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. It acts like a factor of the "
        "adapter's learning rate.",
        (
            ALPHA,
            Advice("fixed, it leaves less to tune again when you vary r",
                   "published", "LoRA, https://arxiv.org/abs/2106.09685, section 4.1"),
        ),
    ),
    "lora_dropout": Note(
        "Share of the inputs of A that are set to zero at random in training. 0: none, which is also the fastest.",
        (
            Advice("0.1 for models up to 13B parameters, 0.05 for 33B and 65B",
                   "published", f"{_QLORA}, appendix B"),
            Advice("0.05 helped models of 7B and 13B, and not larger ones", "published", f"{_QLORA}, appendix A"),
            Advice("0 for a single epoch over many rows", "rule of thumb"),
        ),
    ),
    "target_modules": Note(
        "Layers that get an adapter: names of modules, a regular expression of full names, or a preset. all-linear: "
        "every linear layer but the output layer. attention: the attention's projections. mlp: those of the MLP. q_v: "
        "the query and value projections. outputs: the last layer of each attention and MLP.",
        (
            LAYERS,
            Advice("of equal size, adapters of all four matrices of the attention at r=2 did better than of one at r=8",
                   "published", "LoRA, https://arxiv.org/abs/2106.09685, table 5"),
            Advice("q_v trains the fewest parameters, with the least memory", "rule of thumb"),
        ),
    ),
    "use_rslora": Note(
        "Scale the update by lora_alpha / sqrt(r) (rsLoRA), so that high ranks learn as fast as low ones.",
        (
            RSLORA,
            Advice("divide lora_alpha by sqrt(r) when you switch it on, so that the scale stays the same",
                   "rule of thumb"),
        ),
    ),
    "use_dora": Note(
        "Learn the magnitude and the direction of each weight separately (DoRA). A step takes longer, and more memory.",
        (
            DORA,
            Advice("at low ranks, where it gained most over LoRA", "published", "DoRA, https://arxiv.org/abs/2402.09353"),
            Advice("`plan lora_variant=dora` says what it takes in memory; merged, it costs nothing", "rule of thumb"),
        ),
    ),
    "init_lora_weights": Note(
        "How A and B begin. true: A random, B zero, so that training begins with the base model itself. The options of "
        "lora_variant set it, with what each needs.",
        (
            Advice("true, unless you compare initializations: `-m sweep=lora_starts`", "rule of thumb"),
            Advice("pissa converges faster than the default; here it needs an unquantized base",
                   "published", "PiSSA, https://arxiv.org/abs/2404.02948"),
            Advice("loftq for bases in 4 bits and below, where the quantization error is large",
                   "published", "LoftQ, https://arxiv.org/abs/2310.08659"),
        ),
    ),
    "modules_to_save": Note(
        "Modules that are trained in full beside the adapter, and saved with it: names such as lm_head.",
        (
            Advice("null; for new tokens, model.new_tokens trains only their embeddings", "rule of thumb"),
            Advice("embed_tokens and lm_head cost memory as in full fine-tuning: vocabulary x hidden size each",
                   "rule of thumb"),
        ),
    ),
    "bias": Note(
        "Which biases are trained too. none; all: every bias of the model; lora_only: those of the adapted layers.",
        (Advice("none: with other values the base model is not what it was when the adapter is switched off",
                "published", "PEFT, https://huggingface.co/docs/peft/package_reference/lora"),),
    ),
    "rank_pattern": Note(
        "Ranks of layers that differ from r: layer names or regular expressions, each with its rank. "
        "method.rank_pattern={q_proj: 32}. alpha_pattern does the same for lora_alpha.",
        (Advice("empty; lora_variant=eva distributes ranks by what it sees in training rows", "rule of thumb"),),
    ),
}  # fmt: skip
"""Notes by the name of LoRA's setting."""
LEARNING_RATE = (
    Advice(
        "tune it before anything else: it moved the loss as much as the choice among eight methods did",
        "measured here",
        RATES,
    ),
    RATE_UP_TO_13B,
    RATE_FROM_33B,
    RATE_OF_SMALL,
    RATE_OF_FULL,
    RATE_OF_SMALL_FULL,
)
"""Advice on `training.learning_rate`."""
