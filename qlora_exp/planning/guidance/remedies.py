"""Find changes with which a run that does not fit its device would fit."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import takewhile

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.config.validate import from_dict
from qlora_exp.planning.advisor import LENGTH_STEP, largest
from qlora_exp.planning.fit import room
from qlora_exp.planning.gpus import Gpu
from qlora_exp.utils.errors import ConfigError, UserError


def remedies(config: Config, gpu: Gpu) -> list[str]:
    """Return up to two changes with which a run that does not fit would fit, as words of the command line.

    They keep the rows of a step: smaller batches, recomputation, 4-bit weights of the base, or some of these together.
    Shorter rows are named only if none of these is enough: the longest that fit, one in a batch. No more are looked
    for, as each is a few plans.
    """
    found: list[str] = []
    tried: list[tuple[_Reach, list[str]]] = []
    for words, changed in _with_less_memory(config, gpu):
        if len(found) == 2:
            break
        with suppress(UserError):  # it cannot be planned, or not be combined
            reach = _Reach(changed, gpu)
            if (batches := reach.batches()) is not None:
                found.append(" ".join([*words, *batches]))
            tried.append((reach, words))
    if found or not tried:
        return found
    reach, words = min(tried, key=lambda each: each[0].least)
    length = reach.length()
    return [" ".join([*words, *reach.smallest, f"training.max_length={length}"])] if length else []


def advice(found: Sequence[str], gpu: Gpu) -> str:
    """Return what `remedies` found for a device as text."""
    if not found:
        if gpu.limited_by:
            return (
                f"no smaller batch or shorter row is sure to fit in what {gpu.limited_by} allows: raise that limit, or "
                "take a smaller model"
            )
        return "no smaller batch, recomputation, 4-bit base or shorter row fits; `qlora-exp advise` compares models"
    cut = ", which cuts longer rows" if any("max_length=" in words for words in found) else ""
    cut += ", which makes LoRA QLoRA" if any("quantization=" in words for words in found) else ""
    likely = "would" if gpu.type == "cuda" or gpu.calibration else "should"  # plans for CPUs count tensors only
    return f"it {likely} fit with {', or with '.join(found)}{cut}"


def _with_less_memory(config: Config, gpu: Gpu) -> Iterator[tuple[list[str], Config]]:
    """Yield a config with less and less memory, and the words that change it so.

    It is as it is; with attention that keeps no matrix of all pairs of tokens; with recomputation; on a base in 4 bits;
    on a GPU, with what saves the memory of long rows.
    """
    from qlora_exp.planning.planner import resolved_on

    changes: list[tuple[list[str], Config]] = [([], config)]
    if config.model.attn_implementation == "eager":
        fused = config.model.model_copy(update={"attn_implementation": "sdpa"})
        changes.append((["model.attn_implementation=sdpa"], config.model_copy(update={"model": fused})))
    if not (resolved_on(config, gpu.device).gradient_checkpointing or config.refusal("gradient_checkpointing")):
        recomputing = config.training.model_copy(update={"gradient_checkpointing": True})
        words, least = changes[-1]
        words = [*words, "training.gradient_checkpointing=true"]
        changes.append((words, least.model_copy(update={"training": recomputing})))
    yield from changes
    if config.method.peft_type == "LORA" and not config.quantization.quantized:
        stored = compose(["method=qlora"]).quantization
        with suppress(ConfigError):  # another setting does not go with it
            quantized = {"quantization": stored.model_dump()}
            changes = [
                ([f"quantization={stored.name}", *words], from_dict(changed.model_dump() | quantized))
                for words, changed in changes
            ]
            yield from changes
    if gpu.type == "cuda":
        words, least = changes[-1]
        keys = {"activation_offloading": True, "tiled_mlp": True}
        with suppress(ConfigError):
            values = least.model_dump()
            yield (
                [*words, *(f"training.{key}=true" for key in keys)],
                from_dict(values | {"training": values["training"] | keys}),
            )


class _Reach:
    """What of a run fits a GPU: its batches, or the length of its rows.

    Raises:
        ConfigError: the run cannot be planned.
        ModelError: the architecture is not available locally.
    """

    def __init__(self, config: Config, gpu: Gpu) -> None:
        from qlora_exp.planning.planner import Planner, resolved_on
        from qlora_exp.planning.tuning import fixed_rows

        self._config, self._resolved = config, resolved_on(config, gpu.device)
        self._plans = Planner(config, self._resolved)
        self._most = config.training.max_length
        self._rows, self._batches = (
            self._resolved.per_device_train_batch_size,
            self._resolved.gradient_accumulation_steps,
        )
        sizes = [size for size in range(1, self._rows + 1) if self._rows % size == 0]
        self._sizes = sizes[-1:] if fixed_rows(config, self._plans.has_router) else sizes
        shared = config.distributed
        self.least = 0
        """Planned bytes of the smallest batch, once `batches` was called."""
        self.smallest: list[str] = []
        """Words for the smallest batches, once `length` was called."""
        self._room = room(gpu, ranks=1 if shared.engine == "none" else int(shared.num_processes))

    def _need(self, size: int, length: int, evaluated: int | None = 0) -> int:
        divided = {"per_device_train_batch_size": size, "gradient_accumulation_steps": self._accumulated(size)}
        return self._plans.computing(**divided).predict(length=length, evaluated=evaluated).peak

    def _accumulated(self, size: int) -> int:
        return self._rows * self._batches // size

    def _words(self, size: int) -> list[str]:
        if size == self._rows:
            return []
        return [
            f"training.per_device_train_batch_size={size}",
            f"training.gradient_accumulation_steps={self._accumulated(size)}",
        ]

    def _evaluate(self, size: int) -> list[str]:
        """Plan evaluation with batches of at most so many rows, and return the words for that."""
        from qlora_exp.planning.planner import Planner

        if self._config.training.per_device_eval_batch_size <= size:
            return []
        fewer = self._config.training.model_copy(update={"per_device_eval_batch_size": size})
        self._plans = Planner(self._config.model_copy(update={"training": fewer}), self._resolved)
        return [f"training.per_device_eval_batch_size={size}"]

    def batches(self) -> list[str] | None:
        """Return words for the largest batches of the run's step that fit; None if none do."""
        self.least = self._need(self._sizes[0], self._most)
        if self.least > self._room:
            return None
        larger = takewhile(lambda size: self._need(size, self._most) <= self._room, self._sizes[1:])
        fitting = [self._sizes[0], *larger]
        words = self._words(fitting[-1])
        if self._need(fitting[-1], self._most, None) > self._room:
            words += self._evaluate(fitting[-1])
        return words if self._need(fitting[-1], self._most, None) <= self._room else None

    def length(self) -> int:
        """Return the length of the longest rows that fit in the smallest batches; 0: none."""
        self.smallest = [*self._words(self._sizes[0]), *self._evaluate(self._sizes[0])]
        steps = self._most // LENGTH_STEP
        need = cache(lambda count: self._need(self._sizes[0], LENGTH_STEP * count, None))
        return LENGTH_STEP * largest(need, self._room, steps, steps)
