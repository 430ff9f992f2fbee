"""State what is known of methods before anything is trained: expected quality and usual settings, each with its source.

Advice on single settings is that of `qlora-exp keys` (`config.describe.notes`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from qlora_exp.config.describe import notes
from qlora_exp.config.describe.notes import Advice
from qlora_exp.config.schema import Config
from qlora_exp.utils.units import GIB

PUBLISHED: Final = "published"
RULE: Final = "rule of thumb"
PAGE = "docs/explanation/choosing.md"
"""Page with all of this at length."""
_DETTMERS = "Dettmers et al. 2023"
_PEFT = "PEFT's comparison, Llama-3.2-3B on GSM8K"
UNKNOWN_RANK = 3
_SMALL_GIB = 16
"""Memory of a GPU below which guides advise optimizer states in 8 bits."""


@dataclass(frozen=True)
class Quality(Advice):
    """What is known of the quality that a method reaches."""

    rank: int = UNKNOWN_RANK
    """Order of expected quality, 1 the best; methods of equal rank are not told apart by what is known."""


QUALITY = {
    "full": Quality("47.2 % solved; the reference", PUBLISHED, _PEFT, 1),
    "lora": Quality("47.8 % solved, as full fine-tuning", PUBLISHED, _PEFT, 1),
    "dora": Quality("46.9 % solved, as LoRA; its authors: 1 to 4 points above", PUBLISHED, _PEFT, 1),
    "miss": Quality("48.7 % solved, as LoRA", PUBLISHED, _PEFT, 1),
    "oft": Quality("49.1 % solved, as LoRA", PUBLISHED, _PEFT, 1),
    "houlsby": Quality("0.4 points below full fine-tuning on GLUE", PUBLISHED, "Houlsby et al. 2019", 1),
    "qlora": Quality("MMLU 53.1, in 16 bits 53.0; small models lose more", PUBLISHED, _DETTMERS, 2),
    "qdora": Quality("as QLoRA or a little above", RULE, rank=2),
    "loha": Quality("39.3 % solved, LoRA 47.8", PUBLISHED, _PEFT, 3),
    "adalora": Quality("37.3 % solved, LoRA 47.8", PUBLISHED, _PEFT, 3),
    "vera": Quality("35.4 % solved, LoRA 47.8", PUBLISHED, _PEFT, 3),
    "ia3": Quality("45.5 % solved at the best of three settings, 31.1 % at the worst; LoRA 47.8", PUBLISHED, _PEFT, 3),
    "prefix_tuning": Quality("41.6 % solved at the best of three settings, 18.6 % at the worst", PUBLISHED, _PEFT, 4),
    "p_tuning": Quality("35.0 % solved, LoRA 47.8", PUBLISHED, _PEFT, 4),
    "prompt_tuning": Quality("34.3 % solved at the best of three settings, 5.7 % at the worst", PUBLISHED, _PEFT, 5),
}
"""By kind. PEFT's figures: `method_comparison/MetaMathQA`, one run for each setting, few settings for each method."""


def kind_of(method: str, dora: bool, quantized: bool) -> str:
    """Return the kind of a way to train: `qlora` is LoRA on a quantized base, whatever its option is called."""
    if method in ("lora", "qlora"):
        return f"q{'dora' if dora else 'lora'}" if quantized else "dora" if dora else "lora"
    return f"{method}, quantized" if quantized else method


def kind(config: Config) -> str:
    """Return the kind of a config."""
    dora = any(part.settings.get("use_dora") for part in (config.method, config.lora_variant))
    return kind_of(config.method.name, bool(dora), config.quantization.quantized)


def quality(config: Config) -> Quality:
    """Return what is known of a method's quality."""
    unknown = Quality("no figure known: train it beside LoRA (`qlora-exp train -m method=lora,...`)", RULE)
    return QUALITY.get(kind(config), unknown)


def settings(config: Config, parameters: int, memory_gib: float) -> Iterator[tuple[str, Advice]]:
    """Yield usual settings of a method: the key, or its value, and the advice.

    Args:
        config: the run.
        parameters: parameters of the model.
        memory_gib: memory of the GPU; 0: unknown.
    """
    match kind(config):
        case "full":
            yield "training.learning_rate", notes.RATE_OF_SMALL_FULL if parameters < 1e9 else notes.RATE_OF_FULL
            fused = Advice("needs no second copy of the weights", "measured here", "`qlora-exp plan`")
            yield "optimizer=adamw_torch_fused", fused
        case "lora" | "dora" | "qlora" | "qdora":
            yield from _lora(config, parameters, memory_gib)
        case "ia3":
            yield "training.learning_rate", Advice("3e-3, with Adafactor", PUBLISHED, "Liu et al. 2022")
            yield "method=ia3", Advice("for few rows, many adapters or the last few MiB; else LoRA", RULE)
        case "prompt_tuning" | "prefix_tuning" | "p_tuning":
            yield from _virtual_tokens(parameters)
        case _:
            yield f"training.learning_rate={config.training.learning_rate:g}", notes.LEARNING_RATE[0]
    if 0 < memory_gib < _SMALL_GIB and config.optimizer.name not in ("paged_adamw_8bit", "adamw_bnb_8bit"):
        yield "optimizer=paged_adamw_8bit", Advice("below 16 GB, where states are a large part", RULE)


def _lora(config: Config, parameters: int, memory_gib: float) -> Iterator[tuple[str, Advice]]:
    yield "method.r", notes.RANK
    yield "method.lora_alpha", notes.ALPHA
    yield "method.target_modules=all-linear", notes.LAYERS
    of_large = notes.RATE_FROM_33B if parameters >= 3e10 else notes.RATE_UP_TO_13B
    yield "training.learning_rate", of_large if parameters >= 1e9 else notes.RATE_OF_SMALL
    if config.quantization.bitsandbytes and not 0 < memory_gib < _SMALL_GIB:
        yield "optimizer=paged_adamw_32bit", Advice("with max_grad_norm=0.3", PUBLISHED, _DETTMERS)
    yield "lora_variant=rslora", notes.RSLORA
    yield "lora_variant=dora", notes.DORA


def _virtual_tokens(parameters: int) -> Iterator[tuple[str, Advice]]:
    yield "method.num_virtual_tokens", Advice("20 to 100; beyond 20 little is gained", PUBLISHED, "Lester et al. 2021")
    yield "training.learning_rate", Advice("10 to 100 times LoRA's; sweep it", RULE)
    if parameters < 1e10:
        yield "model", Advice("small for this method: LoRA if it fits", PUBLISHED, "Lester et al. 2021, below 10 B")


def gib(nbytes: float) -> str:
    """Return bytes as GiB, for sentences."""
    return f"{nbytes / GIB:.1f} GiB"
