"""State what is known of methods before anything is trained: expected quality and usual settings, each with its source.

Every statement carries a mark, so that nobody takes advice for a measurement: `measured here` (a page or a run of this
project), `published` (with the source) or `rule of thumb`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_exp.config.schema import Config
from qlora_exp.utils.units import GIB

PUBLISHED, RULE, OWN = "published", "rule of thumb", "measured here"
PAGE = "docs/explanation/choosing.md"
"""Page with all of this at length."""
PAGE_OF_RATES = "docs/explanation/peft_methods.md"
_PEFT = "PEFT's comparison, Llama-3.2-3B on GSM8K"
UNKNOWN_RANK = 3


@dataclass(frozen=True)
class Known:
    """A statement about a method."""

    text: str
    mark: str
    source: str = ""
    rank: int = UNKNOWN_RANK
    """Order of expected quality, 1 the best; methods of equal rank are not told apart by what is known."""

    def __str__(self) -> str:
        return f"{self.text} ({self.mark}{': ' if self.source else ''}{self.source})"


QUALITY = {
    "full": Known("47.2 % solved; the reference", PUBLISHED, _PEFT, 1),
    "lora": Known("47.8 % solved, as full fine-tuning", PUBLISHED, _PEFT, 1),
    "dora": Known("46.9 % solved, as LoRA; its authors: 1 to 4 points above", PUBLISHED, _PEFT, 1),
    "miss": Known("48.7 % solved, as LoRA", PUBLISHED, _PEFT, 1),
    "oft": Known("49.1 % solved, as LoRA", PUBLISHED, _PEFT, 1),
    "houlsby": Known("0.4 points below full fine-tuning on GLUE", PUBLISHED, "Houlsby et al. 2019", 1),
    "qlora": Known("MMLU 53.1, in 16 bits 53.0; small models lose more", PUBLISHED, "Dettmers et al. 2023", 2),
    "qdora": Known("as QLoRA or a little above", RULE, rank=2),
    "loha": Known("39.3 % solved, LoRA 47.8", PUBLISHED, _PEFT, 3),
    "adalora": Known("37.3 % solved, LoRA 47.8", PUBLISHED, _PEFT, 3),
    "vera": Known("35.4 % solved, LoRA 47.8", PUBLISHED, _PEFT, 3),
    "ia3": Known("31.1 % solved, LoRA 47.8", PUBLISHED, _PEFT, 4),
    "prefix_tuning": Known("18.6 % solved, LoRA 47.8", PUBLISHED, _PEFT, 5),
    "p_tuning": Known("as prefix tuning", RULE, rank=5),
    "prompt_tuning": Known("as full only from 10 B on (Lester et al. 2021); 5.7 % solved", PUBLISHED, _PEFT, 6),
}
"""By kind. PEFT's figures: `method_comparison/MetaMathQA`, one run and one learning rate for each method."""


def kind_of(method: str, dora: bool, quantized: bool) -> str:
    """Return the kind of a way to train: `qlora` is LoRA on a quantized base, whatever its option is called."""
    if method in ("lora", "qlora"):
        return f"q{'dora' if dora else 'lora'}" if quantized else "dora" if dora else "lora"
    return f"{method}, quantized" if quantized else method


def kind(config: Config) -> str:
    """Return the kind of a config."""
    dora = any(part.settings.get("use_dora") for part in (config.method, config.lora_variant))
    return kind_of(config.method.name, bool(dora), config.quantization.quantized)


def quality(config: Config) -> Known:
    """Return what is known of a method's quality."""
    unknown = Known("no figure known: train it beside LoRA (`qlora-exp train -m method=lora,...`)", RULE)
    return QUALITY.get(kind(config), unknown)


def settings(config: Config, parameters: int, memory_gib: float) -> Iterator[Known]:
    """Yield usual settings of a method, each with its mark.

    Args:
        config: the run.
        parameters: parameters of the model.
        memory_gib: memory of the GPU; 0: unknown.
    """
    match kind(config):
        case "full":
            yield from _full(parameters)
        case "lora" | "dora" | "qlora" | "qdora":
            yield from _lora(config, parameters)
        case "ia3":
            yield Known("training.learning_rate=3e-3", PUBLISHED, "Liu et al. 2022")
            yield Known("IA3 for few rows, many adapters or the last few MiB; else LoRA", RULE)
        case "prompt_tuning" | "prefix_tuning" | "p_tuning":
            yield from _virtual_tokens(parameters)
        case _:
            rate = f"{config.training.learning_rate:g}"
            yield Known(
                f"training.learning_rate={rate} is this config's; sweep it: it matters most", OWN, PAGE_OF_RATES
            )
    if 0 < memory_gib < 16 and config.optimizer.name not in ("paged_adamw_8bit", "adamw_bnb_8bit"):
        yield Known("below 16 GB optimizer=paged_adamw_8bit, where states are a large part", RULE)


def _lora(config: Config, parameters: int) -> Iterator[Known]:
    yield Known("method.r=16; 8 for style and format, 64 for code, mathematics, a new domain", RULE)
    yield Known("method.lora_alpha = 2 r", RULE)
    yield Known("method.target_modules=all-linear, else it falls behind", PUBLISHED, "Dettmers et al. 2023")
    if parameters >= 3e10:
        yield Known("training.learning_rate=1e-4", PUBLISHED, "Dettmers et al. 2023, from 33 B on")
    elif parameters >= 1e9:
        yield Known("training.learning_rate=2e-4", PUBLISHED, "Dettmers et al. 2023, up to 13 B")
    else:
        yield Known("training.learning_rate of 2e-4 to 3e-3; sweep it", OWN, f"{PAGE_OF_RATES}, 135 M")
    if config.quantization.bitsandbytes:
        yield Known("optimizer=paged_adamw_32bit, max_grad_norm=0.3", PUBLISHED, "Dettmers et al. 2023")
    yield Known("lora_variant=rslora from r=32 on, whose scale does not fall with r", PUBLISHED, "Kalajdzievski 2023")
    yield Known("lora_variant=dora where LoRA is nearly good enough; it is slower", RULE)


def _full(parameters: int) -> Iterator[Known]:
    if parameters < 1e9:
        yield Known("training.learning_rate of 2e-5 to 2e-4; sweep it", OWN, f"{PAGE_OF_RATES}, 135 M")
    else:
        yield Known("training.learning_rate of 1e-5 to 2e-5", RULE)
    yield Known("optimizer=adamw_torch_fused, which needs no second copy of the weights", OWN, "`qlora-exp plan`")


def _virtual_tokens(parameters: int) -> Iterator[Known]:
    yield Known("method.num_virtual_tokens of 20 to 100", PUBLISHED, "Lester et al. 2021")
    yield Known("training.learning_rate 10 to 100 times LoRA's; sweep it", RULE)
    if parameters < 1e10:
        yield Known("this model is small for it: LoRA if it fits", PUBLISHED, "Lester et al. 2021, below 10 B")


def gib(nbytes: float) -> str:
    """Return bytes as GiB, for sentences."""
    return f"{nbytes / GIB:.1f} GiB"
